"""Optimizers that evaluate the gradients several times inside one step, moving the weights in between."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


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
        optimizer.register_step_pre_hook(lambda *_: self._begin())
        optimizer.register_step_post_hook(lambda *_: self._end())

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
