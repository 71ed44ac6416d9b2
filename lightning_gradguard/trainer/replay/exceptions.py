"""Finds out whether NaN or infinity is the reason of an exception, and who made it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from torch.optim import Optimizer

from lightning_gradguard.alert import Culprit
from lightning_gradguard.forensics.nonfinite.layout import SampleDim, iterators_in
from lightning_gradguard.forensics.nonfinite.proof import Proof
from lightning_gradguard.forensics.nonfinite.raised import WithoutCollectives, is_gone_without_damage, is_in_torch, is_same
from lightning_gradguard.forensics.nonfinite.report import culprit_of
from lightning_gradguard.forensics.nonfinite.samples import exchanged
from lightning_gradguard.forensics.nonfinite.search import Search
from lightning_gradguard.forensics.nonfinite.seen import seen_around, speaks_of_it
from lightning_gradguard.forensics.nonfinite.suspects import suspects_of
from lightning_gradguard.forensics.nonfinite.trial import tried
from lightning_gradguard.forensics.state import State
from lightning_gradguard.layout import clean_name
from lightning_gradguard.trainer.replay.replay import Replay, Replayed
from lightning_gradguard.trainer.replay.window import MicroBatch, Window

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

_MAX_PROOF_RUNS = 24
_MAX_PROOF_SECONDS = 20.0


@dataclass(frozen=True)
class Cause:
    """NaN or infinity that an exception was raised because of.

    Attributes:
        culprit: who made it; None where that is not known.
        is_in_torch: whether torch raised the exception.
        seen: what holds it, in words, where nothing was replayed, so that it is not known to be the reason.
    """

    culprit: Culprit | None
    is_in_torch: bool
    seen: str = ""


class Causes(Protocol):
    """Finds out whether NaN or infinity is the reason of an exception."""

    def of(self, error: Exception, optimizer: Optimizer) -> Cause | None:
        """The damage that an exception was raised because of; None if there is none, or it can't be told.

        Args:
            error: what was raised.
            optimizer: one of the Trainer's.
        """


class ExceptionCause:
    """Replays the micro-batch that an exception has ended: once to follow the damage on its way there, then without damage.

    Only where the exception comes again with the damage, and is gone without it, damage is the reason. Hooks are not run
    again: where an exception that speaks of NaN does not come again, it is told that there is damage.

    Args:
        trainer: the Trainer.
        module: the one that is trained.
        window: the running micro-batches.
        replay: runs them again.
        sample_dim: what the user says about where samples lie.
        is_alone: whether there is one process only.
    """

    def __init__(
        self,
        trainer: Trainer,
        module: LightningModule,
        window: Window,
        replay: Replay,
        *,
        sample_dim: SampleDim = None,
        is_alone: bool = True,
    ) -> None:
        self._trainer = trainer
        self._module = module
        self._window = window
        self._replay = replay
        self._sample_dim = sample_dim
        self._is_alone = is_alone

    def of(self, error: Exception, optimizer: Optimizer) -> Cause | None:
        """See `Causes`."""
        batch = self._window.running()
        if batch is None or any(iterators_in(batch.batch)):
            return None
        run = partial(self._run, optimizer, batches=[batch], may_raise=True)
        search, seconds, again = self._follow(run)
        if search.blame is None or not (speaks_of_it(error) if again is None else is_same(error, again)):
            return None
        detailed, _, _ = self._follow(run, follow_rows=True)
        if detailed.blame is not None and detailed.blame.is_like(search.blame):
            search = detailed
        if again is None:  # raised by a hook, which a replay does not run
            return Cause(
                self._culprit(run, search, batch, seconds), is_in_torch=False, seen="a replay of the step makes NaN or Inf"
            )
        # Not with other samples in the places of the bad ones: these may hold a reason that is none of ours as well.
        if not is_gone_without_damage(lambda context: run(observe=lambda *_: context).error):
            return None
        culprit = self._culprit(run, search, batch, seconds)
        return Cause(culprit, search.is_raised_by_operator or is_in_torch(error))

    def _run(self, optimizer: Optimizer, **settings: Any) -> Replayed:
        # Where a wrapper reduces gradients, its hooks would be set off.
        is_apart = self._trainer.strategy.model is not self._module
        with nullcontext() if self._is_alone else WithoutCollectives():  # type: ignore[no-untyped-call]
            return self._replay.run(optimizer, is_apart=is_apart, **settings)

    def _follow(self, run: Callable[..., Replayed], *, follow_rows: bool = False) -> tuple[Search, float, Exception | None]:
        search = Search(self._module, self._sample_dim, follow_rows=follow_rows)

        @contextmanager
        def observe(micro_batch: MicroBatch, state: State) -> Iterator[None]:
            with search.watch(micro_batch.batch, state.tensors):
                yield

        begin = time.perf_counter()
        replayed = run(observe=observe)
        return search, time.perf_counter() - begin, replayed.error

    def _culprit(self, run: Callable[..., Replayed], search: Search, batch: MicroBatch, seconds: float) -> Culprit:
        assert search.blame is not None

        def is_bad(rows: Sequence[int]) -> bool:
            return not run(change=_changed(search, batch, rows)).is_finite()

        runs = min(_MAX_PROOF_RUNS, int(_MAX_PROOF_SECONDS / max(seconds, 1e-3)))
        # What one rank replays alone must not take long, since others wait.
        proof = Proof(is_bad, search.layout.size, runs) if self._is_alone else None
        suspects = suspects_of(search.blame, search.layout, search.rows, proof)
        culprit = culprit_of(search.blame, suspects, rank=self._trainer.global_rank, reproduced=True)

        def is_in_order(context: AbstractContextManager[object]) -> bool:
            with context:
                return run().is_finite()

        return tried(culprit, is_in_order) if self._is_alone else culprit


class SeenDamage:
    """Looks at what is there, where no rank can run a step again without the others.

    Args:
        module: the one that is trained.
        window: the running micro-batches.
        sample_dim: what the user says about where samples lie.
    """

    def __init__(self, module: LightningModule, window: Window, sample_dim: SampleDim = None) -> None:
        self._module = module
        self._window = window
        self._sample_dim = sample_dim

    def of(self, error: Exception, optimizer: Optimizer) -> Cause | None:  # noqa: ARG002 - of the protocol
        """See `Causes`."""
        running = self._window.running()
        named = ((clean_name(name), parameter) for name, parameter in self._module.named_parameters())
        seen = seen_around(error, None if running is None else running.batch, named, self._sample_dim)
        return Cause(None, is_in_torch=False, seen=seen) if seen else None


def _changed(search: Search, batch: MicroBatch, rows: Sequence[int]) -> Callable[[Any], Any]:
    def change(value: Any) -> Any:
        return exchanged(value, search.layout, rows) if value is batch.batch else value

    return change
