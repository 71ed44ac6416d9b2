"""What the Trainer's precision does to gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.amp.grad_scaler import GradScaler

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


def scaler_of(trainer: Trainer) -> GradScaler | None:
    """The scaler of fp16 training; None in every other precision."""
    # Only some precision plugins have the attribute, and bf16 sets it to None.
    return getattr(trainer.precision_plugin, "scaler", None)


def skips_without_backward(trainer: Trainer, module: LightningModule) -> bool:
    """Whether the Trainer leaves the optimizer alone when `training_step` has returned None.

    It does under a GradScaler, in automatic optimization, and leaves gradients of earlier micro-batches scaled: there is no
    step to decide about.
    """
    return scaler_of(trainer) is not None and module.automatic_optimization
