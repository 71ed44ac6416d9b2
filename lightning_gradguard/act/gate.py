"""Lets steps through, clipped, or keeps them from being applied."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from lightning_gradguard.act.buffers import Buffers
from lightning_gradguard.act.fused import FusedKernel
from lightning_gradguard.act.pending import PendingStep
from lightning_gradguard.clippers import Clipped, Clipper, FactorClipper
from lightning_gradguard.judge.judge import state_for
from lightning_gradguard.measure.parameters import WatchedParameters
from lightning_gradguard.measure.shards import Parameter
from lightning_gradguard.measure.step import MeasuredStep
from lightning_gradguard.record import Decision, Measurement


def skip_(parameters: Iterable[Parameter]) -> list[tuple[Parameter, Tensor]]:
    """Take the gradients away, so that the optimizer passes the parameters over.

    Every torch optimizer leaves a parameter without a gradient alone: its value, its state, its step counter and its
    weight decay. Gradients of zero would still move momentum and decay the weights. In place, no sync, rank-local.

    Returns:
        The parameters that had one, and those gradients.
    """
    taken: list[tuple[Parameter, Tensor]] = []
    for parameter in parameters:
        if (grad := parameter.grad) is not None:
            taken.append((parameter, grad))
            parameter.grad = None
    return taken


_KNOWN = ("torch.", "lightning.", "lightning_fabric.", "pytorch_lightning.", "deepspeed.")
"""Where optimizers come from whose `step` is torch's, wraps it, or is replaced by an engine of its own."""


def is_of_torch(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimizer's `step` is torch's own, so that it is known what it does; Lightning's wrappers pass it on."""
    definers = (cls.__module__ for cls in type(optimizer).__mro__ if "step" in vars(cls))
    return all(module.startswith(_KNOWN) for module in definers)


def is_ours(clipper: Clipper) -> bool:
    """Whether it is one of this package."""
    return type(clipper).__module__.startswith("lightning_gradguard.")


class Gate:
    """Lets the steps of one optimizer through, clipped, or keeps them from being applied.

    Args:
        parameters: whose gradients.
        clipper: what clips them; None for nothing.
        buffers: what the forward pass of a skipped step has changed.
        uses_scaler: whether a GradScaler steps the optimizer; it takes the two attributes of the kernel for itself.
    """

    def __init__(
        self, parameters: WatchedParameters, clipper: Clipper | None, buffers: Buffers, *, uses_scaler: bool
    ) -> None:
        optimizer = parameters.optimizer
        self._watched = parameters
        self.buffers = buffers
        self.clipper = clipper
        self._on_host = clipper if isinstance(clipper, FactorClipper) and is_ours(clipper) else None
        # The kernel scales all gradients of the optimizer, also those that are excluded.
        can_fuse = (
            optimizer is not None
            and is_of_torch(optimizer)
            and FusedKernel.fits(optimizer)
            and not uses_scaler
            and parameters.only.keeps_all
        )
        self.kernel = FusedKernel(optimizer) if optimizer and can_fuse else None
        self.taken: list[tuple[Parameter, Tensor]] = []
        """The gradients of the last step, where they were taken away; the next one forgets them."""

    @property
    def parameters(self) -> list[Parameter]:
        """All parameters of the optimizer."""
        return self._watched.everything

    @property
    def clips_unseen(self) -> bool:
        """Whether it can clip before the host knows the norm; also where there is nothing that clips."""
        return self.clipper is None or (isinstance(self.clipper, FactorClipper) and not self.clipper.needs_host)

    @property
    def clips_on_host(self) -> bool:
        """Whether it clips by one factor that the host computes from the norm alone; also where nothing clips."""
        clipper = self._on_host
        return self.clipper is None or (clipper is not None and clipper.coefficient_on_host(1.0) is not None)

    def open(self) -> None:
        """Before a step: take back what an earlier one may have left, as when it ended in an error."""
        self.taken = []
        self.buffers.look()
        if self.kernel is not None:
            self.kernel.clear()

    def skip_(self) -> None:
        """Keep the step from being applied. No sync."""
        self.taken = skip_(self.parameters)
        self.buffers.restore_()

    def clip_(self, step: MeasuredStep, measurement: Measurement, *, is_entry: bool = True) -> Clipped:
        """Let the step through, clipped. At most one sync but for those of the clipper's own.

        Args:
            step: whose gradients are clipped.
            measurement: of it.
            is_entry: whether the step is one in a clipper's history; a damaged one never is.
        """
        gradients, norm = step.gradients, step.facts.total_norm
        is_below = isinstance(self.clipper, FactorClipper) and self.clipper.passes(measurement.global_norm)
        if self.clipper is None or is_below or not gradients.tensors:
            return Clipped(coef=1.0, norm=measurement.global_norm)
        if measurement.overflowed:
            norm = torch.tensor(measurement.global_norm, dtype=torch.float64)
            gradients.measured = torch.from_numpy(measurement.norms[measurement.has_grad])
        if is_entry and measurement.is_finite and not measurement.overflowed:
            return self._clip_(self.clipper, step, norm)
        history = self.history()
        clipped = self._clip_(self.clipper, step, norm)
        self.return_to(history)
        return clipped

    def clip_on_host_(self, gradients: list[Tensor], global_norm: float) -> float:
        """Let a step through, clipped; the factor. Only where `clips_on_host`, in float32, with a norm that is finite.

        Args:
            gradients: all of them, dense, on the CPU; changed in place.
            global_norm: of these.
        """
        clipper = self._on_host
        if clipper is None or clipper.passes(global_norm):
            return 1.0
        coef = clipper.coefficient_on_host(global_norm)
        assert coef is not None
        clipper.learn(global_norm)
        if coef < 1.0:
            factor = torch.scalar_tensor(coef, dtype=torch.float32)
            if self.kernel is None:
                torch._foreach_mul_(gradients, factor)
            else:
                self.kernel.scale(factor)
        return coef

    def detach(self) -> None:
        """Take the kernel's hook off the optimizer."""
        if self.kernel is not None:
            self.kernel.detach()

    def history(self) -> dict[str, Any] | None:
        """What the clipper has learnt so far; None without one."""
        return None if self.clipper is None else self.clipper.state_dict()

    def return_to(self, history: dict[str, Any] | None) -> None:
        """Have the clipper forget what it has learnt since."""
        if self.clipper is not None and history is not None:
            self.clipper.load_state_dict(history)

    def state_dict(self) -> dict[str, Any] | None:
        """The clipper's type and history, in plain types; None without one."""
        if self.clipper is None:
            return None
        return {"type": type(self.clipper).__qualname__, "state": self.clipper.state_dict()}

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Continue from a saved history; one of another clipper is left, with a warning."""
        if self.clipper is not None:
            self.return_to(state_for(self.clipper, state, "clipper"))

    def coefficient(self, step: MeasuredStep, *, skips_damage: bool = False) -> Tensor:
        """The factor of clipping, scalar; 1 without a clipper, and where the norm says nothing. No sync.

        Args:
            step: to be clipped.
            skips_damage: whether it is skipped anyway if the norm is NaN or infinite, whatever the factor.
        """
        norm = step.facts.total_norm
        if not isinstance(self.clipper, FactorClipper):
            return torch.ones_like(norm)
        if skips_damage:
            return self.clipper.coefficient(step.gradients, norm)
        if is_ours(self.clipper):  # does not mind a norm of 0, which saves a few launches
            return self.clipper.coefficient(step.gradients, norm.nan_to_num(nan=0.0, posinf=0.0))
        return torch.where(norm.isfinite(), self.clipper.coefficient(step.gradients, norm), torch.ones_like(norm))

    def clipped_histogram(self, step: MeasuredStep) -> Tensor | None:
        """What is counted of a step's gradients as the optimizer gets them, once clipping is queued; None if not wanted.

        No sync; a collective where they are sharded.
        """
        meter, gradients = step.clipped_histogram, step.gradients
        if meter is None:
            return None
        return gradients.sum_shards(meter.count(gradients, None if self.kernel is None else self.kernel.divisor))

    def histogram(self, pending: PendingStep, measurement: Measurement, decision: Decision) -> Tensor | None:
        """What was counted of a step that is decided and carried out: before clipping, or after; None on most steps.

        Of gradients after clipping a skipped step has none, since the optimizer has got nothing.
        """
        step = pending.step
        if not pending.counts_clipped:
            return pending.histogram
        if decision.skip:
            return None
        # What was queued before the host knew of an overflow has not clipped.
        is_late = step is not None and (pending.transfer is None or measurement.overflowed)
        return self.clipped_histogram(step) if step is not None and is_late else pending.histogram

    def _clip_(self, clipper: Clipper, step: MeasuredStep, norm: Tensor) -> Clipped:
        if self.kernel is None or not isinstance(clipper, FactorClipper):
            if not is_ours(clipper):
                step.gradients.begin_change_()  # one of the user's may write to the tensors
            return clipper.clip_(step.gradients, norm)
        factor, clipped = clipper.factor(step.gradients, norm)
        if clipped.coef < 1.0:
            self.kernel.scale(factor)
        return clipped
