"""Optimizers that evaluate the gradients several times inside one step, moving the weights in between."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from lightning_gradguard.act.gate import Gate
from lightning_gradguard.act.pending import PendingStep
from lightning_gradguard.clippers import Clipped
from lightning_gradguard.judge.judge import SkipThreshold
from lightning_gradguard.measure.step import MeasuredStep
from lightning_gradguard.record import Decision, Measurement


class InClosure:
    """Carries out decisions about LBFGS, whose closure is evaluated several times a step; a bad evaluation undoes all of it.

    Args:
        gate: of the optimizer.
        undoable: the optimizer's steps.
    """

    wants_threshold = False

    def __init__(self, gate: Gate, undoable: UndoableStep) -> None:
        self._gate = gate
        self._undoable = undoable
        self._history: dict[str, Any] | None = None
        self._is_repeated = False

    def note_evaluation(self) -> bool:
        """An evaluation begins; True if it belongs to a step that has had one before."""
        self._is_repeated = self._undoable.note_evaluation()
        return self._is_repeated

    def begin_(self, step: MeasuredStep, threshold: SkipThreshold | None) -> PendingStep:  # noqa: ARG002 - the protocol
        """Nothing is queued."""
        return PendingStep.of(step)

    def finish_(self, pending: PendingStep, measurement: Measurement, decision: Decision) -> Clipped:
        """Clip, or undo the step; one step is one entry of a clipper's history, and a step undone is none."""
        if decision.skip:
            self._gate.skip_()
            self._undoable.undo_()
            self._gate.return_to(self._history)
            return Clipped(coef=1.0, norm=measurement.global_norm)
        assert pending.step is not None
        if not self._is_repeated:
            self._history = self._gate.history()
        return self._gate.clip_(pending.step, measurement, is_entry=not self._is_repeated)

    def detach(self) -> None:
        """Take the hooks off the optimizer."""
        self._undoable.detach()


class UndoableStep:
    """Makes one step of LBFGS undoable, and tells its evaluations apart from steps.

    LBFGS calls its closure up to twenty times a step. When a later call turns out bad, the weights have been moved
    already, and without gradients LBFGS takes itself for converged right there. So weights and state are kept as they were
    at the beginning of each step (one copy; LBFGS itself keeps up to two hundred), and put back at the end of a bad one.

    Args:
        optimizer: its `step` gets a hook before and one after.
        parameters: what the optimizer trains.
    """

    def __init__(self, optimizer: torch.optim.LBFGS, parameters: Iterable[Tensor]) -> None:
        self._optimizer = optimizer
        self._parameters = list(parameters)
        self._saved: list[Tensor] = []
        self._saved_state: dict[Any, dict[str, Any]] = {}
        self._num_evaluations = 0
        self._is_running = False
        self._is_bad = False
        self._hooks = (
            optimizer.register_step_pre_hook(lambda *_: self._begin()),
            optimizer.register_step_post_hook(lambda *_: self._end()),
        )

    def note_evaluation(self) -> bool:
        """Count an evaluation; True if it belongs to a step that has had one before."""
        self._num_evaluations += self._is_running
        return self._num_evaluations > 1

    @torch.no_grad()
    def undo_(self) -> None:
        """Put weights and state back to the beginning of the step, now and once more when the step ends."""
        if not self._is_running:
            return
        self._is_bad = True
        for parameter, saved in zip(self._parameters, self._saved, strict=True):  # DTensors have no `_foreach_copy_`
            parameter.copy_(saved)
        self._optimizer.state.clear()
        for key, values in self._saved_state.items():
            self._optimizer.state[key] = _copy(values)

    def detach(self) -> None:
        """Take the hooks off."""
        for hook in self._hooks:
            hook.remove()

    def _begin(self) -> None:
        self._is_running, self._is_bad, self._num_evaluations = True, False, 0
        self._saved = [parameter.detach().clone() for parameter in self._parameters]
        self._saved_state = {key: _copy(values) for key, values in self._optimizer.state.items()}

    def _end(self) -> None:
        if self._is_bad:
            self.undo_()
        self._is_running, self._num_evaluations = False, 0
        self._saved, self._saved_state = [], {}


def _copy(values: dict[str, Any]) -> dict[str, Any]:
    """Lists are copied without the tensors in them: LBFGS changes its lists, but never a direction stored in one."""

    def one(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.clone()
        return list(value) if isinstance(value, list) else value

    return {key: one(value) for key, value in values.items()}
