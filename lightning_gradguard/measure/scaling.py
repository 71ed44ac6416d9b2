"""Loss scaling: true gradients whatever a GradScaler does, and whatever the optimizer leaves to its own kernel."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler, OptState


class Scaling(Protocol):
    """What a guard has to know of whoever scales the loss in fp16 training.

    Attributes:
        scales_losses: whether the losses that the guard is told of before a backward pass are scaled.
    """

    scales_losses: bool

    @property
    def scale(self) -> Tensor | None:
        """The present scale, scalar; None before the first loss was scaled. No sync."""

    def unscale_(self) -> None:
        """Bring the optimizer's gradients to their true size, unless that has been done. In place, no sync."""


class LossScaling:
    """A GradScaler's.

    Args:
        scaler: the one that scales the loss.
        optimizer: the one whose gradients are scaled.
    """

    scales_losses = True

    def __init__(self, scaler: GradScaler, optimizer: torch.optim.Optimizer) -> None:
        self._scaler = scaler
        self._optimizer = optimizer

    @property
    def scale(self) -> Tensor | None:
        """The present scale, scalar on the device; None before the first loss was scaled. No sync."""
        # `get_scale()` would wait for the device.
        return self._scaler._get_scale_async()

    def unscale_(self) -> None:
        """Bring the optimizer's gradients to their true size, unless that has been done. In place, no sync.

        Fused optimizers unscale inside their own kernel, so that Lightning leaves it to them and the gradients that
        callbacks see are scaled. Unscaling before is allowed; the scaler then knows and does not do it twice.
        """
        # The scaler raises if asked twice, and only its state tells who has asked.
        stage = self._scaler._per_optimizer_states[id(self._optimizer)]["stage"]
        groups = self._optimizer.param_groups
        has_gradients = any(parameter.grad is not None for group in groups for parameter in group["params"])
        if stage is OptState.READY and has_gradients:
            self._scaler.unscale_(self._optimizer)
            self._let_fused_read_it()

    def _let_fused_read_it(self) -> None:
        """Make a scalar of what was found: FSDP1's scaler keeps a vector of one, which torch's fused Adam refuses."""
        found = self._scaler._per_optimizer_states[id(self._optimizer)]["found_inf_per_device"]
        for device, is_infinite in found.items():
            found[device] = is_infinite.reshape(())


@contextmanager
def forgotten_step(scaler: GradScaler | None, optimizer: torch.optim.Optimizer | None) -> Iterator[None]:
    """Leave a GradScaler as if nobody had asked it to unscale: of a step that is given up before its `step`.

    Else it would take the gradients of the next step for unscaled.
    """
    yield
    if scaler is not None:
        scaler._per_optimizer_states.pop(id(optimizer), None)
