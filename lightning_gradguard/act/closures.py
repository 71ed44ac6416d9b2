"""Optimizers that evaluate the gradients inside their step, once or several times, and may move the weights in between."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from lightning_gradguard.act.gate import Gate
from lightning_gradguard.act.pending import PendingStep
from lightning_gradguard.act.queued import Queued
from lightning_gradguard.act.stand_in import StandIn
from lightning_gradguard.clippers import Clipped
from lightning_gradguard.judge.judge import SkipThreshold
from lightning_gradguard.measure.step import MeasuredStep
from lightning_gradguard.record import Decision, Measurement


class Evaluations(Protocol):
    """The evaluations of the gradients inside the steps of one optimizer.

    Attributes:
        is_running: whether the optimizer is inside its step.
    """

    is_running: bool

    def note(self) -> bool:
        """An evaluation begins; True if it belongs to a step that has had one before."""

    def skip_(self) -> None:
        """The step is bad: leave weights and state as they were before it."""

    def leave(self) -> None:
        """Take the optimizer out of a bad step, where it would not end by itself. Raises inside of the step."""

    def detach(self) -> None:
        """Leave no trace on the optimizer."""


class InClosure:
    """Carries out decisions about an optimizer that may evaluate its closure several times a step.

    One step is one decision; each evaluation is clipped, as the Trainer would, and one that is bad undoes all of the step.

    Args:
        gate: of the optimizer.
        evaluations: of the optimizer.
        queued: clips before the host knows the norm; None where that can't be, or brings nothing.
    """

    wants_threshold = False

    def __init__(self, gate: Gate, evaluations: Evaluations, queued: Queued | None) -> None:
        self._gate = gate
        self._evaluations = evaluations
        self._queued = queued
        self._history: dict[str, Any] | None = None
        self._is_repeated = False

    def note_evaluation(self) -> bool:
        """An evaluation begins; True if it belongs to a step that has had one before."""
        self._is_repeated = self._evaluations.note()
        return self._is_repeated

    def begin_(self, step: MeasuredStep, threshold: SkipThreshold | None) -> PendingStep:
        """Queue what can be."""
        return PendingStep.of(step) if self._queued is None else self._queued.begin_(step, threshold)

    def finish_(self, pending: PendingStep, measurement: Measurement, decision: Decision) -> Clipped:
        """Clip, or undo the step; one step is one entry of a clipper's history, and a step undone is none."""
        if decision.skip:
            self._gate.skip_()
            self._evaluations.skip_()
            self._gate.return_to(self._history)
            self._history = None
            return Clipped(coef=1.0, norm=measurement.global_norm)
        if self._queued is not None:
            clipped = self._queued.finish_(pending, measurement, decision)
        else:
            assert pending.step is not None
            if not self._is_repeated:
                self._history = self._gate.history()
            clipped = self._gate.clip_(pending.step, measurement, is_entry=not self._is_repeated)
        if not self._evaluations.is_running:
            self._gate.buffers.note_boundary()
        return clipped

    def leave(self) -> None:
        """Take the optimizer out of a bad step."""
        self._evaluations.leave()

    def detach(self) -> None:
        """Leave no trace on the optimizer."""
        self._evaluations.detach()


class LBFGSEvaluations:
    """Those of LBFGS, which calls its closure up to twenty times a step.

    When a later call turns out bad, the weights have been moved already, and without gradients LBFGS takes itself for
    converged right there. So weights and state are kept as they were at the beginning of each step (one copy; LBFGS itself
    keeps up to two hundred), and put back at the end of a bad one.

    Args:
        optimizer: its `step` gets a hook before and one after.
        gate: of the optimizer.
    """

    def __init__(self, optimizer: torch.optim.LBFGS, gate: Gate) -> None:
        self._optimizer = optimizer
        self._gate = gate
        self._saved: SavedOptimizer | None = None
        self._num_evaluations = 0
        self._is_bad = False
        self.is_running = False
        self._hooks = (
            optimizer.register_step_pre_hook(lambda *_: self._begin()),
            optimizer.register_step_post_hook(lambda *_: self._end()),
        )

    def note(self) -> bool:
        """Count it."""
        self._num_evaluations += self.is_running
        return self._num_evaluations > 1

    def skip_(self) -> None:
        """Put weights and state back, now and once more when the step ends."""
        if self._saved is not None:
            self._is_bad = True
            self._saved.put_back_()

    def leave(self) -> None:
        """It ends by itself."""

    def detach(self) -> None:
        """Take the hooks off."""
        for hook in self._hooks:
            hook.remove()

    def _begin(self) -> None:
        self.is_running, self._is_bad, self._num_evaluations = True, False, 0
        self._gate.buffers.note_boundary()
        self._saved = SavedOptimizer(self._optimizer)

    def _end(self) -> None:
        if self._is_bad:
            self.skip_()
        self.is_running, self._num_evaluations, self._saved = False, 0, None


class _LeftError(Exception):
    """Takes an optimizer out of its step."""


class ForeignEvaluations:
    """Those of an optimizer that is not torch's: whether it passes over missing gradients, and how often it evaluates its
    closure, is not known.

    A bad step is left by an exception, which the optimizer's `step` here stands in for; outside of a step the next call of
    `step` is passed over. Copies of weights and state are kept during the first step, and from then on for optimizers that
    were seen to evaluate more than once, or to move weights before they evaluate (SAM). Another one has not moved anything
    yet where its only evaluation ends.

    Args:
        optimizer: its `step` is stood in for.
        gate: of the optimizer.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, gate: Gate) -> None:
        self._optimizer = optimizer
        self._gate = gate
        self._saved: SavedOptimizer | None = None
        self._num_evaluations = 0
        self._needs_copies = True
        self._has_moved_early = False
        self._versions: list[int] = []
        self._is_bad = False
        self._passes_next = False
        self.is_running = False
        self._step = StandIn(optimizer, "step", self._run)

    def note(self) -> bool:
        """Count it."""
        self._passes_next = False  # what was meant was never called
        self._num_evaluations += self.is_running
        has_moved = self.is_running and self._versions != self._versions_now()
        self._has_moved_early |= has_moved or self._num_evaluations > 1
        return self._num_evaluations > 1

    def skip_(self) -> None:
        """Note it."""
        self._is_bad = self.is_running
        self._passes_next = not self.is_running

    def leave(self) -> None:
        """End the step from inside."""
        if self.is_running and self._is_bad:
            raise _LeftError

    def detach(self) -> None:
        """Give the optimizer its own `step` back."""
        self._step.remove()

    def _versions_now(self) -> list[int]:
        """How often each weight was changed in place."""
        return [parameter._version for group in self._optimizer.param_groups for parameter in group["params"]]

    def _run(self, step: Any, *args: Any, **kwargs: Any) -> Any:
        if self._passes_next:
            self._passes_next = False
            self._optimizer._opt_called = True  # type: ignore[attr-defined]  # torch's schedulers look for a first step
            return None
        self.is_running, self._is_bad, self._num_evaluations = True, False, 0
        self._has_moved_early, self._versions = False, self._versions_now()
        self._gate.buffers.note_boundary()
        self._saved = SavedOptimizer(self._optimizer, settings_only=not self._needs_copies)
        try:
            return step(*args, **kwargs)
        except _LeftError:
            self._saved.put_back_()
            return None
        except BaseException:
            if self._is_bad:
                self._saved.put_back_()
            raise
        finally:
            self._needs_copies = self._has_moved_early
            self.is_running, self._num_evaluations, self._saved = False, 0, None


class SavedOptimizer:
    """Weights, state and settings of an optimizer, to be put back.

    Args:
        optimizer: whose state and settings.
        settings_only: whether nothing else can have changed when they are put back.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, *, settings_only: bool = False) -> None:
        self._optimizer = optimizer
        self._settings = [
            {key: _copy(value) for key, value in group.items() if key != "params"} for group in optimizer.param_groups
        ]
        self._weights: list[tuple[Tensor, Tensor]] | None = None
        self._state: dict[Any, Any] = {}
        if not settings_only:
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            self._weights = [(parameter, parameter.detach().clone()) for parameter in parameters]
            self._state = {key: _copy(values) for key, values in optimizer.state.items()}

    @torch.no_grad()
    def put_back_(self) -> None:
        """As often as need be. No sync."""
        for group, settings in zip(self._optimizer.param_groups, self._settings, strict=False):
            group.update(_copy(settings))
        if self._weights is None:
            return
        for parameter, saved in self._weights:  # DTensors have no `_foreach_copy_`
            parameter.copy_(saved)
        self._optimizer.state.clear()
        for key, values in self._state.items():
            self._optimizer.state[key] = _copy(values)


def _copy(value: Any) -> Any:
    """Lists are copied without the tensors in them: LBFGS changes its lists, but never a direction stored in one."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: _copy(entry) for key, entry in value.items()}
    return list(value) if isinstance(value, list) else value
