"""The only place that changes gradients: clips them, or keeps a step from being applied."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from lightning_gradguard.act.buffers import BufferRepair
from lightning_gradguard.act.closures import UndoableStep
from lightning_gradguard.clippers import Clipped, Clipper, FactorClipper
from lightning_gradguard.judge.judge import SkipThreshold
from lightning_gradguard.measure.gradients import Gradients
from lightning_gradguard.measure.measurement import Facts
from lightning_gradguard.measure.parameters import WatchedParameters
from lightning_gradguard.measure.shards import Parameter
from lightning_gradguard.record import Measurement

DEFERRING_DEVICES = {"cuda"}
"""Where the host runs ahead of the device, so that waiting for a fact costs time."""


def skip_(parameters: Iterable[Parameter]) -> None:
    """Take the gradients away, so that the optimizer passes the parameters over.

    Every torch optimizer leaves a parameter without a gradient alone: its value, its state, its step counter and its
    weight decay. Gradients of zero would still move momentum and decay the weights. In place, no sync, rank-local.
    """
    for parameter in parameters:
        parameter.grad = None


class FusedKernel:
    """Clipping and skipping inside the kernel of a fused optimizer, which costs no pass over the gradients.

    Fused SGD, Adam, AdamW and Adagrad read two attributes of the optimizer that are meant for a GradScaler: they divide the
    gradients by `grad_scale` (and write them back), and do nothing at all where `found_inf` is 1. Nobody removes them
    without a scaler, so a hook does, after each step.

    Args:
        optimizer: one for which `fits` is true.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        optimizer.register_step_post_hook(lambda *_: self.clear())

    @staticmethod
    def fits(optimizer: torch.optim.Optimizer | None) -> bool:
        """Whether the optimizer's kernel reads the attributes."""
        return getattr(optimizer, "_step_supports_amp_scaling", False)

    @property
    def can_skip(self) -> bool:
        """Whether a skip leaves the state as it was.

        torch's fused SGD with momentum leaves its buffer uninitialised when its very first step is skipped.
        """
        groups = self._optimizer.param_groups
        has_momentum = any(group.get("momentum") for group in groups)
        return not has_momentum or len(self._optimizer.state) >= sum(len(group["params"]) for group in groups)

    def scale(self, coef: Tensor) -> None:
        """Have the next step multiply the gradients by `coef`, scalar. No sync."""
        self._optimizer.grad_scale = coef.float().reciprocal()  # type: ignore[attr-defined]

    def skip(self, is_bad: Tensor) -> None:
        """Have the next step do nothing if `is_bad`, bool scalar. No sync."""
        # Exactly 1.0: Adam subtracts it from its step counter.
        self._optimizer.found_inf = is_bad.float()  # type: ignore[attr-defined]

    def clear(self) -> None:
        """Take both back."""
        vars(self._optimizer).pop("grad_scale", None)
        vars(self._optimizer).pop("found_inf", None)


class Gate:
    """Applies decisions to the gradients of one optimizer.

    Args:
        parameters: whose gradients.
        clipper: what clips them; None for nothing.
        buffers: what a skipped forward pass may have damaged.
        uses_scaler: whether a GradScaler steps the optimizer; it takes the two attributes of the kernel for itself.
    """

    def __init__(
        self, parameters: WatchedParameters, clipper: Clipper | None, buffers: BufferRepair, *, uses_scaler: bool
    ) -> None:
        optimizer = parameters.optimizer
        self._parameters = parameters
        self._buffers = buffers
        self.clipper = clipper
        # The kernel scales all gradients of the optimizer, also those that are excluded.
        can_fuse = FusedKernel.fits(optimizer) and not uses_scaler and parameters.only.keeps_all
        self.kernel = FusedKernel(optimizer) if optimizer and can_fuse else None
        is_lbfgs = isinstance(optimizer, torch.optim.LBFGS)
        self.undoable = UndoableStep(optimizer, parameters.everything) if is_lbfgs else None  # type: ignore[arg-type]
        self._history_before: dict[str, Any] | None = None

    def open(self) -> None:
        """Before a step: take back what an earlier one may have left, as when it ended in an error."""
        if self.kernel is not None:
            self.kernel.clear()
        self._history_before = None

    def skip_(self) -> None:
        """Keep the step from being applied. One sync where there are buffers."""
        skip_(self._parameters.everything)
        if self.undoable is not None:
            self.undoable.undo_()
        if self.clipper is not None and self._history_before is not None:
            self.clipper.load_state_dict(self._history_before)
        self._buffers.repair_()

    def can_defer(self, gradients: Gradients) -> bool:
        """Whether the device can apply the decision by itself, so that the host need not wait for the facts."""
        return (
            self.kernel is not None
            and self.kernel.can_skip
            and gradients.device.type in DEFERRING_DEVICES
            and self._clips_unseen
        )

    @property
    def _clips_unseen(self) -> bool:
        """Whether the device can clip before the host knows the norm; also where there is nothing that clips."""
        return self.clipper is None or (isinstance(self.clipper, FactorClipper) and not self.clipper.needs_host)

    def defer_(self, gradients: Gradients, facts: Facts, threshold: SkipThreshold) -> Tensor:
        """Have the device skip or clip by itself; the factor of clipping, scalar on the device. No sync."""
        assert self.kernel is not None
        self.kernel.skip(facts.exceeds(threshold.max_norm, must_be_finite=threshold.must_be_finite))
        self._buffers.remember()
        coef = self._coefficient(gradients, facts)
        self.kernel.scale(coef)
        return coef

    def queue_clip_(self, gradients: Gradients, facts: Facts) -> Tensor | None:
        """On a GPU where the host has to decide about the step: clip before the host knows, so that it need wait only once.

        Returns:
            The factor, scalar on the device; None where the host has to know first. No sync.
        """
        if gradients.device.type not in DEFERRING_DEVICES or not self._clips_unseen:
            return None
        self._buffers.remember()
        coef = self._coefficient(gradients, facts)
        if self.clipper is not None and self.kernel is not None:
            self.kernel.scale(coef)
        elif self.clipper is not None:
            gradients.scale_(coef)
        return coef

    def _coefficient(self, gradients: Gradients, facts: Facts) -> Tensor:
        """The factor of clipping; 1 without a clipper, and where the norm says nothing. No sync."""
        one = torch.ones_like(facts.total_norm)
        if not isinstance(self.clipper, FactorClipper):
            return one
        return torch.where(facts.total_norm.isfinite(), self.clipper.coefficient(gradients, facts.total_norm), one)

    def settle(self, *, skipped: bool) -> None:
        """Once it is known what the device has done: repair buffers, or take them for good."""
        if skipped:
            self._buffers.repair_()
        else:
            self._buffers.confirm()

    def clip_(self, gradients: Gradients, facts: Facts, measurement: Measurement, *, is_repeated: bool = False) -> Clipped:
        """Let the step through, clipped. At most one sync but for those of the clipper's own.

        Args:
            gradients: to be clipped.
            facts: about them.
            measurement: the same on the host.
            is_repeated: whether an evaluation of the same step has been clipped before.
        """
        self._buffers.remember()
        self._buffers.confirm()
        if self.clipper is None or not gradients.tensors:
            return Clipped(coef=1.0, norm=measurement.global_norm)
        norm = facts.total_norm
        if measurement.overflowed:
            norm = torch.tensor(measurement.global_norm, dtype=torch.float64)
            gradients.measured = torch.from_numpy(measurement.norms[measurement.has_grad])
        # One step is one entry of a clipper's history, and a damaged one is none.
        is_no_entry = is_repeated or measurement.overflowed or not measurement.is_finite
        history = self.clipper.state_dict() if is_no_entry or self.undoable is not None else None
        clipped = self._clip_(self.clipper, gradients, norm)
        if is_no_entry and history is not None:
            self.clipper.load_state_dict(history)
        elif history is not None:
            self._history_before = history
        return clipped

    def _clip_(self, clipper: Clipper, gradients: Gradients, norm: Tensor) -> Clipped:
        if self.kernel is None or not isinstance(clipper, FactorClipper):
            return clipper.clip_(gradients, norm)
        factor, clipped = clipper.factor(gradients, norm)
        if clipped.coef < 1.0:
            self.kernel.scale(factor)
        return clipped
