"""Names the culprit of a step that is damaged, vanishes or explodes, by replaying it."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed
from torch.optim import Optimizer

from lightning_gradguard.act.buffers import Buffers
from lightning_gradguard.alert import Culprit
from lightning_gradguard.errors import GuardWarning, type_and_text
from lightning_gradguard.forensics.nonfinite.layout import SampleDim, iterators_in
from lightning_gradguard.forensics.nonfinite.proof import Proof
from lightning_gradguard.forensics.nonfinite.report import culprit_of, culprit_outside
from lightning_gradguard.forensics.nonfinite.samples import exchanged
from lightning_gradguard.forensics.nonfinite.search import Search
from lightning_gradguard.forensics.nonfinite.suspects import suspects_of
from lightning_gradguard.forensics.nonfinite.trial import tried
from lightning_gradguard.forensics.state import State
from lightning_gradguard.forensics.tensors import plain
from lightning_gradguard.measure.distributed import Ranks, is_sharded
from lightning_gradguard.policy import Action
from lightning_gradguard.record import Measurement, Outcome, Position
from lightning_gradguard.trainer.replay.diagnosis import Diagnosis
from lightning_gradguard.trainer.replay.earlier import EarlierCulprits
from lightning_gradguard.trainer.replay.replay import Replay, Replayed, average_over_ranks_, can_replay, compare
from lightning_gradguard.trainer.replay.time_probe import TimeProbe
from lightning_gradguard.trainer.replay.window import MicroBatch, Window

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

_MAX_PROOF_RUNS = 24
_MAX_PROOF_SECONDS = 20.0

Prepare = Callable[[State], None]
"""What is done before a replay begins."""


class Investigation:
    """Replays bad steps, up to a number of times in a run, and says who is to blame.

    Args:
        trainer: the Trainer.
        module: the one that is trained.
        window: the running micro-batches.
        buffers: their values from before the step.
        max_replays: steps that are looked into, besides the one that ends the run.
        sample_dim: the dimension of batches that samples lie along, or that of each leaf; None: it is inferred.
    """

    def __init__(
        self,
        trainer: Trainer,
        module: LightningModule,
        window: Window,
        buffers: Buffers,
        max_replays: int,
        *,
        sample_dim: SampleDim = None,
    ) -> None:
        self._trainer = trainer
        self._module = module
        self._window = window
        self._replay = Replay(trainer, module, window, buffers)
        self._max_replays = max_replays
        self._sample_dim = sample_dim
        self._known: Culprit | None = None
        self.num_done = 0
        """Steps looked into so far."""
        self._earlier = EarlierCulprits()
        self._ranks = Ranks.current()
        self._is_sharded = is_sharded([*module.parameters()])
        self.diagnosis = Diagnosis(module, window, self._replay, num_ranks=self._ranks.size)

    def note(self, optimizer: Optimizer, outcome: Outcome | None, *, is_pending: bool = False) -> None:
        """A step has been decided; where `is_pending`, the outcome is of the one before."""
        self._known = None
        self.diagnosis.note(optimizer, outcome, is_pending=is_pending)

    def time_probe(self, action: Action) -> TimeProbe | None:
        """Looks whether gradients vanish in time, which no detector sees; None where nothing recurs, or can be replayed."""
        if self._is_sharded or not TimeProbe.can_find(self._module) or not can_replay(self._trainer, self._module):
            return None
        return TimeProbe(self._module, self._window, self._replay, action)

    def set_culprit(self, culprit: Culprit) -> None:
        """Say who is to blame for the next step that is asked about."""
        self._known = culprit

    def clear(self) -> None:
        """Let go of all batches."""
        self.diagnosis.clear()

    def __call__(
        self, position: Position, measurement: Measurement, kind: str, *, silent: Sequence[str] = (), ends_run: bool = False
    ) -> Culprit | None:
        """Who is to blame for a step; None if it can't be told. Its gradients should still be there, to compare with.

        What ends the run is looked into however many steps have been before, and is said to agree or not with those. Where
        several ranks train together, all of them have to ask: each replays its own part, without a collective but
        those of the module itself, and one gather tells whose part it was.
        """
        if self._known is not None:
            return self._known
        is_spent = self.num_done >= self._max_replays
        if (is_spent and not ends_run) or not can_replay(self._trainer, self._module):
            return None
        self.num_done += 1
        culprit = self._find(position, measurement, kind, silent)
        if ends_run:
            return self._earlier.final(position.optimizer, kind, culprit)
        self._earlier.note(position.optimizer, kind, position.step, culprit)
        return culprit

    def _find(self, position: Position, measurement: Measurement, kind: str, silent: Sequence[str]) -> Culprit | None:
        optimizer = self._trainer.optimizers[position.optimizer]
        if (name := self._used_up(optimizer, position)) is not None:
            _warn_of(f"`{name}` is an iterator, which the step has used up; a list could be replayed")
            return None
        if kind != "nonfinite":
            ask = partial(self.diagnosis.look, optimizer, position, measurement, kind, silent)
            return None if self._is_sharded else self._diagnose(ask)
        looked, failure = _Look(), None
        try:
            looked = self._look(optimizer, position, measurement)
        except Exception as error:  # noqa: BLE001 - training goes on as if nothing had been tried
            failure = _warn(error)
        if self._ranks.size == 1:
            return looked.culprit
        return self._agree(looked, failure, optimizer, measurement)

    def _used_up(self, optimizer: Optimizer, position: Position) -> str | None:
        """Name of a part of the batches that can be read only once; with several ranks it is left to all of them to fail."""
        batches = self._window.of(optimizer, position.step) if self._ranks.size == 1 else []
        return next((name for it in batches for name in iterators_in(it.batch)), None)

    def _diagnose(self, ask: Callable[[], tuple[Culprit | None, float]]) -> Culprit | None:
        """Why a step vanished or exploded: with several ranks as the one says that has the largest gradients."""
        found: tuple[Culprit | None, float] = (None, 0.0)
        try:
            found = ask()
        except Exception as error:  # noqa: BLE001 - training goes on as if nothing had been tried
            _warn(error)
        everyone = [found] * self._ranks.size
        if self._ranks.size > 1:
            distributed.all_gather_object(everyone, found)
        return max((pair for pair in everyone if pair[0] is not None), key=lambda pair: pair[1], default=found)[0]

    def _agree(self, looked: _Look, failure: str | None, optimizer: Optimizer, measurement: Measurement) -> Culprit | None:
        """One verdict on all ranks: that of the rank which was first to see damage, else of the first that found any."""
        everyone: list[tuple[Culprit | None, str | None]] = [(None, None)] * self._ranks.size
        distributed.all_gather_object(everyone, (looked.culprit, failure))
        first = None if measurement.damage is None else measurement.damage.rank
        found = [culprit for culprit, _ in everyone if culprit is not None]
        chosen = next((culprit for culprit in found if culprit.rank == first), found[0] if found else None)
        if chosen is None or self._is_sharded or looked.is_late or any(reason for _, reason in everyone):
            return chosen
        parameters = _trained_by(optimizer)
        average_over_ranks_(looked.replayed, parameters, self._ranks)
        reproduced, error = compare(looked.replayed, parameters)
        return replace(chosen, reproduced=reproduced, error=error)

    def _look(self, optimizer: Optimizer, position: Position, measurement: Measurement) -> _Look:
        held = position.step if self._window.is_held(position.step) else None
        # What one rank replays alone may wait for the others.
        is_alone = self._ranks.size == 1
        search = _Search(self._module, self._sample_dim, follow_rows=not is_alone)
        begin = time.perf_counter()
        replayed = self._replay.run(optimizer, step=held, observe=search.observe, passed=search.forget)
        seconds = time.perf_counter() - begin
        looked = _Look(replayed, is_late=held is not None)
        prepare: Prepare = _as_it_is
        reproduced, error = (False, None) if looked.is_late else compare(replayed, _trained_by(optimizer))
        blame = search.blame
        if blame is not None and blame.is_state and is_alone:
            # The failing step may have poisoned what the module keeps. Once more, with that made finite.
            again = _Search(self._module, self._sample_dim)
            self._replay.run(optimizer, step=held, observe=again.observe, passed=again.forget, prepare=_make_finite)
            if again.blame is not None:
                search, blame, reproduced, error, prepare = again, again.blame, False, None, _make_finite
        if blame is None:
            looked.culprit = _outside(looked, measurement, position.rank) if is_alone else None
            return looked
        proof = None
        if is_alone:
            if blame.phase != "weights":
                search = self._follow_rows(optimizer, held, search, prepare)
                blame = search.blame or blame
            proof = self._proof(optimizer, held, search, seconds, prepare)
        suspects = suspects_of(blame, search.layout, search.rows, proof)
        looked.culprit = culprit_of(blame, suspects, rank=position.rank, reproduced=reproduced, error=error)
        if is_alone:
            looked.culprit = tried(looked.culprit, self._is_in_order(optimizer, held, prepare))
        return looked

    def _is_in_order(
        self, optimizer: Optimizer, held: int | None, prepare: Prepare
    ) -> Callable[[AbstractContextManager[object]], bool]:
        """Replays the step inside a context."""

        def run(context: AbstractContextManager[object]) -> bool:
            with context:
                return self._replay.run(optimizer, step=held, prepare=prepare).is_finite(_trained_by(optimizer))

        return run

    def _follow_rows(self, optimizer: Optimizer, held: int | None, search: _Search, prepare: Prepare) -> _Search:
        """Once more, looking at which sample each value belongs to; the search before if this finds something else."""
        detailed = search
        # Where two samples meet that never should, time may be the first dimension, and samples lie along the second.
        for is_other in (False, True):
            if is_other and (detailed.rows is None or not detailed.rows.mixes or not detailed.layout.may_begin_with_time):
                break
            again = _Search(self._module, self._sample_dim, follow_rows=True, is_other=is_other)
            self._replay.run(optimizer, step=held, observe=again.observe, passed=again.forget, prepare=prepare)
            is_same = again.blame is not None and search.blame is not None and again.blame.is_like(search.blame)
            if is_same and not (is_other and again.rows is not None and again.rows.mixes):
                detailed = again
        return detailed

    def _proof(self, optimizer: Optimizer, held: int | None, search: _Search, seconds: float, prepare: Prepare) -> Proof:
        """Replays in which samples of the damaged micro-batch take the places of others."""

        def is_bad(rows: Sequence[int]) -> bool:
            def change(batch: Any) -> Any:
                return exchanged(batch, search.layout, rows) if batch is search.batch else batch

            replayed = self._replay.run(optimizer, step=held, change=change, prepare=prepare)
            return not replayed.is_finite(_trained_by(optimizer))

        runs = min(_MAX_PROOF_RUNS, int(_MAX_PROOF_SECONDS / max(seconds, 1e-3)))
        return Proof(is_bad, search.layout.size, runs)


@dataclass
class _Look:
    """What one rank has found.

    Attributes:
        replayed: what the replay gave.
        culprit: who made the damage, in this rank's part.
        is_late: whether the step's own gradients are gone, so that there is nothing to compare with.
    """

    replayed: Replayed = field(default_factory=Replayed)
    culprit: Culprit | None = None
    is_late: bool = False


def _outside(looked: _Look, measurement: Measurement, rank: int) -> Culprit | None:
    """That neither forward nor backward pass has made it, where the replay shows that."""
    losses = looked.replayed.losses
    if looked.is_late or measurement.loss is None or not losses:
        return None
    return culprit_outside(measurement.loss, [*looked.replayed.gradients.values()], float(losses[-1]), rank=rank)


def _warn(error: Exception) -> str:
    failure = type_and_text(error)
    _warn_of(failure)
    return failure


def _warn_of(reason: str) -> None:
    warnings.warn(
        f"The step could not be replayed ({reason}), so who is to blame is not known. Training goes on. "
        "`max_replays=0` turns replays off.",
        GuardWarning,
        stacklevel=3,
    )


def _trained_by(optimizer: Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


class _Search(Search):
    """A search in a replay under a Trainer."""

    @contextmanager
    def observe(self, micro_batch: MicroBatch, state: State) -> Iterator[None]:
        """Watch one micro-batch."""
        with self.watch(micro_batch.batch, state.tensors):
            yield


def _as_it_is(state: State) -> None:
    """Nothing has to be done."""


@torch.no_grad()
def _make_finite(state: State) -> None:
    """Make finite what a module keeps besides its weights."""
    for tensor in state.kept:
        _fill(tensor)


def _fill(tensor: Tensor) -> None:
    values = plain(tensor)
    if values is not None and not bool(values.isfinite().all()):
        # Not 0: a divisor or variance would make damage of its own.
        tensor.data.masked_fill_(~tensor.data.isfinite() & (tensor.data != -torch.inf), 1.0)
