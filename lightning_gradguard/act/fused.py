"""Clipping and skipping inside the kernel of a fused optimizer."""

from __future__ import annotations

import torch
from torch import Tensor


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
        self._hook = optimizer.register_step_post_hook(self.clear)

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
        # FSDP1 leaves an empty tensor where a rank holds nothing of a parameter; it never gets a state.
        num_tensors = sum(parameter.numel() > 0 for group in groups for parameter in group["params"])
        return not has_momentum or len(self._optimizer.state) >= num_tensors

    @property
    def divisor(self) -> Tensor | None:
        """What the next step is going to divide the gradients by, scalar; None: nothing."""
        return vars(self._optimizer).get("grad_scale")

    def scale(self, coef: Tensor) -> None:
        """Have the next step multiply the gradients by `coef`, scalar. No sync."""
        self._optimizer.grad_scale = coef.float().reciprocal()  # type: ignore[attr-defined]

    def skip(self, is_bad: Tensor) -> None:
        """Have the next step do nothing if `is_bad`, 1 or 0, scalar. No sync."""
        # Exactly 1.0: Adam subtracts it from its step counter.
        self._optimizer.found_inf = is_bad.float()  # type: ignore[attr-defined]

    def clear(self, *_: object) -> None:
        """Take both back."""
        vars(self._optimizer).pop("grad_scale", None)
        vars(self._optimizer).pop("found_inf", None)

    def detach(self) -> None:
        """Take the hook off, and both attributes back."""
        self.clear()
        self._hook.remove()
