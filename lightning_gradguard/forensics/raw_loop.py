"""Names the culprit of a damaged step in a loop without a Trainer, by a function of the user's that runs it again."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

from lightning_gradguard.alert import Culprit
from lightning_gradguard.errors import GuardWarning, type_and_text
from lightning_gradguard.forensics.comparison import compare_gradients
from lightning_gradguard.forensics.nonfinite.layout import Variables
from lightning_gradguard.forensics.nonfinite.raised import (
    is_gone_without_damage,
    is_in_torch,
    is_same,
    warn_of_failed_replay,
)
from lightning_gradguard.forensics.nonfinite.report import culprit_of, culprit_outside
from lightning_gradguard.forensics.nonfinite.search import Search
from lightning_gradguard.forensics.nonfinite.suspects import suspects_of
from lightning_gradguard.forensics.nonfinite.trial import tried
from lightning_gradguard.forensics.state import RandomState, State, unchanged
from lightning_gradguard.forensics.variables import iterator_of, may_be_batch, module_among, variables_of
from lightning_gradguard.measure.distributed import Ranks
from lightning_gradguard.record import Measurement, Position, Record

HOW = (
    "To learn who made it, give the guard a function that runs the step again: `Guard(..., replay=lambda: loss_of(batch))`."
)
"""What is said to whoever has not."""

_USED_UP = (
    "`{}`, which `replay` refers to, is an iterator: running the step again would take the next batches out of your loop. "
    "Let `replay` use the batch itself, as `lambda: loss_of(batch)`"
)
_MAX_REPLAYS = 3
"""Damaged steps that are looked into."""


class RawLoop:
    """Replays damaged steps, up to three of a run.

    Module and batch are found among the variables that the function uses. Everything about the module is put back
    afterwards, and so are the random states. Where several ranks train together, all of them replay.

    Args:
        replay: runs forward, and gives the loss; or runs backward too, and gives None.
        parameters: those that are watched.
        scaler: what scales the loss; None: nothing does.
    """

    def __init__(
        self, replay: Callable[[], Tensor | None], parameters: Sequence[Tensor], scaler: GradScaler | None = None
    ) -> None:
        if not callable(replay):
            raise ValueError(
                f"`replay` must be a function without arguments that runs the step, got {replay!r}. As in "
                "`replay=lambda: loss_of(batch)`."
            )
        self._replay = replay
        self._parameters = parameters
        self._scaler = scaler
        self._num_left = _MAX_REPLAYS
        self._random = RandomState()

    def note(self, record: Record) -> None:  # noqa: ARG002 - called with every record
        """A step is done, and the next begins. Some ten microseconds."""
        self._random = RandomState()

    def __call__(
        self,
        position: Position,
        measurement: Measurement,
        kind: str,
        *,
        silent: Sequence[str] = (),  # noqa: ARG002 - of findings that are not looked into here
        ends_run: bool = False,
    ) -> Culprit | None:
        """Who is to blame for a step; None if it can't be told. What ends the run is always looked into."""
        if kind != "nonfinite" or not (self._num_left or ends_run):
            return None
        self._num_left = max(self._num_left - 1, 0)
        culprit = None
        try:
            culprit = self._look(position, measurement)
        except Exception as error:  # noqa: BLE001 - training goes on as if nothing had been tried
            warnings.warn(
                f"The step could not be replayed ({type_and_text(error)}), so who is to blame is not known. "
                "Training goes on.",
                GuardWarning,
                stacklevel=2,
            )
        return self._agreed(culprit, measurement)

    def cause_of(self, error: Exception) -> tuple[Culprit, bool] | None:
        """The damage that an exception was raised because of; None if there is none, or it can't be told.

        Returns:
            Who made it, and whether torch has raised the exception.
        """
        try:
            return self._cause_of(error)
        except Exception as failure:  # noqa: BLE001 - the exception that was there first matters more
            warn_of_failed_replay(error, failure)
            return None

    def batch(self) -> Variables:
        """Those among the variables that the function uses that may be data."""
        return _batch_among(dict(variables_of(self._replay)))

    def _cause_of(self, error: Exception) -> tuple[Culprit, bool] | None:
        if iterator_of(self._replay) is not None:
            return None
        variables = dict(variables_of(self._replay))
        module = module_among(variables, self._parameters)
        batch = _batch_among(variables)
        search = Search(module, follow_rows=True)

        def run(watch: Callable[[State], AbstractContextManager[object]]) -> Exception | None:
            with torch.enable_grad(), torch.compiler.set_stance("force_eager"), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                with unchanged(module) as state:
                    self._random.restore()
                    try:
                        with watch(state):
                            run_step(self._replay, self._scaler)
                    except Exception as again:  # noqa: BLE001 - it is the answer
                        return again
            return None

        again = run(lambda state: search.watch(batch, state.tensors))
        if again is None or search.blame is None or not is_same(error, again):
            return None
        if not is_gone_without_damage(lambda context: run(lambda _: context)):
            return None
        suspects = suspects_of(search.blame, search.layout, search.rows, None)
        culprit = culprit_of(search.blame, suspects, reproduced=True, root=_name_of(self._replay))
        return culprit, search.is_raised_by_operator or is_in_torch(error)

    def _look(self, position: Position, measurement: Measurement) -> Culprit | None:
        if (name := iterator_of(self._replay)) is not None:
            raise ValueError(_USED_UP.format(name))
        variables = dict(variables_of(self._replay))
        module = module_among(variables, self._parameters)
        is_alone = Ranks.current().size == 1
        batch = _batch_among(variables)
        search = Search(module, follow_rows=not is_alone)
        ran = self._run(module, search, batch)
        if search.blame is not None and is_alone:
            detailed = Search(module, follow_rows=True)
            self._run(module, detailed, batch)
            if detailed.blame is not None and detailed.blame.is_like(search.blame):
                search = detailed
        blame = search.blame
        if blame is None:
            if not is_alone or ran.loss is None or measurement.loss is None:
                return None
            return culprit_outside(measurement.loss, [*ran.gradients.values()], ran.loss, rank=position.rank)
        suspects = suspects_of(blame, search.layout, search.rows, None)
        root = _name_of(self._replay)
        culprit = culprit_of(blame, suspects, rank=position.rank, reproduced=ran.reproduced, error=ran.error, root=root)
        return tried(culprit, functools.partial(self._is_in_order, module)) if is_alone else culprit

    def _is_in_order(self, module: nn.Module, context: AbstractContextManager[object]) -> bool:
        """Whether no loss and no gradient is damaged in a replay inside a context."""
        with torch.enable_grad(), torch.compiler.set_stance("force_eager"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with unchanged(module), context:
                self._random.restore()
                loss = run_step(self._replay, self._scaler)
                values = [it.grad for it in self._parameters if it.grad is not None]
                return all(bool(it.isfinite().all()) for it in ([] if loss is None else [loss]) + values)

    def _run(self, module: nn.Module, search: Search, batch: Variables) -> _Ran:
        """One replay."""
        with torch.enable_grad(), torch.compiler.set_stance("force_eager"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with unchanged(module) as state:
                self._random.restore()
                with search.watch(batch, state.tensors):
                    loss = run_step(self._replay, self._scaler)
                scale = 1.0 if self._scaler is None else self._scaler.get_scale()
                gradients = {id(it): it.grad / scale for it in self._parameters if it.grad is not None}
        return _Ran(*compare_gradients(gradients, self._parameters), gradients, None if loss is None else float(loss))

    def _agreed(self, culprit: Culprit | None, measurement: Measurement) -> Culprit | None:
        """One verdict on all ranks: that of the rank which was first to see damage, else of the first that found any."""
        ranks = Ranks.current()
        if ranks.size == 1:
            return culprit
        everyone: list[Culprit | None] = [None] * ranks.size
        torch.distributed.all_gather_object(everyone, culprit)
        first = None if measurement.damage is None else measurement.damage.rank
        found = [it for it in everyone if it is not None]
        return next((it for it in found if it.rank == first), found[0] if found else None)


class _Ran(NamedTuple):
    """What a replay gave: whether the gradients that are there, their relative error, its own, and its loss if known."""

    reproduced: bool
    error: float | None
    gradients: dict[int, Tensor]
    loss: float | None


def run_step(replay: Callable[[], Tensor | None], scaler: GradScaler | None) -> Tensor | None:
    """Forward, and backward where the function has not run it; the loss, where it gives one."""
    loss = replay()
    if not isinstance(loss, Tensor):
        return None
    (loss if scaler is None else scaler.scale(loss)).backward()  # type: ignore[no-untyped-call]
    return loss.detach()


def _batch_among(variables: dict[str, Any]) -> Variables:
    return Variables({name: value for name, value in variables.items() if may_be_batch(value)})


def _name_of(function: Any) -> str:
    """Its name; "replay" for what has none."""
    name = getattr(getattr(function, "func", function), "__name__", "<")
    return "replay" if name.startswith("<") else str(name)
