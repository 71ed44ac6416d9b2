"""Settings of Trainer and guard that exclude each other."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_gradguard.trainer.callback_order import callbacks_of
from lightning_gradguard.trainer.packages import MisconfigurationException, is_of_lightning

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule, Trainer


class ConflictError(MisconfigurationException, ValueError):
    """Trainer and guard are set up in ways that exclude each other."""


def refuse_second_guard(trainer: Trainer, of_type: type[Callback]) -> None:
    """Raise a `ConflictError` if the Trainer has more than one guard."""
    guards = [callback for callback in callbacks_of(trainer) if isinstance(callback, of_type)]
    if len(guards) > 1:
        raise ConflictError(
            f"`callbacks` must hold one {of_type.__name__}, got {len(guards)}: each would judge, clip and skip the same "
            "optimizer. Put their settings into one."
        )


def refuse_second_clipping(trainer: Trainer, module: LightningModule) -> None:
    """Raise a `ConflictError` if gradients would be clipped by someone else as well."""
    if trainer.gradient_clip_val:
        raise ConflictError(
            f"`gradient_clip_val` must be unset where GradGuard clips, got {trainer.gradient_clip_val!r}: gradients would "
            "be clipped twice. Remove `gradient_clip_val` from the Trainer, or `clip` from GradGuard."
        )
    owner = _owner_of(type(module), "configure_gradient_clipping")
    if not is_of_lightning(owner):
        raise ConflictError(
            f"`configure_gradient_clipping` must not be overridden where GradGuard clips, got {owner.__qualname__}'s: "
            "gradients would be clipped twice. Remove the method, or `clip` from GradGuard."
        )


def _owner_of(cls: type, method: str) -> type:
    """The class in `cls`'s ancestry that defines a method."""
    return next(ancestor for ancestor in cls.__mro__ if method in vars(ancestor))
