"""Settings of Trainer and guard that exclude each other."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lightning_gradguard.errors import GuardWarning
from lightning_gradguard.settings import Settings
from lightning_gradguard.trainer.clipping import clips_later, overrides_clipping
from lightning_gradguard.trainer.packages import MisconfigurationException
from lightning_gradguard.trainer.progress import fetches_batches

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule, Trainer


class ConflictError(MisconfigurationException, ValueError):
    """Trainer and guard are set up in ways that exclude each other."""


def refuse_second_guards(guard: Callback, others: Sequence[Callback]) -> None:
    """Raise a `ConflictError` if the Trainer has more than one guard."""
    if others:
        raise ConflictError(
            f"`callbacks` must hold one {type(guard).__name__}, got {len(others) + 1}: each would judge, clip and skip the "
            "same optimizer. Put their settings into one."
        )


def can_quarantine(mode: str, module: LightningModule) -> bool:
    """Whether it is known which batches a step has seen; if not, raise a `ConflictError` where they are to be left out."""
    if not fetches_batches(module):
        return True
    reason = (
        "`training_step` takes `dataloader_iter` and fetches its own batches: which of them a step has seen is not known"
    )
    if mode == "skip":
        raise ConflictError(f"`quarantine` must be None where {reason}, got 'skip'. Take `batch` in `training_step`.")
    warnings.warn(f"No batches are listed in quarantine, since {reason}.", GuardWarning, stacklevel=2)
    return False


def refuse_clipping(trainer: Trainer, module: LightningModule, settings: Settings) -> None:
    """Raise a `ConflictError` if gradients would be clipped twice, or clipped unseen where they are to be shown clipped."""
    if settings.clipper is not None:
        refuse_second_clipping(trainer, module)
    elif settings.histograms_of == "clipped" and clips_later(trainer, module):
        raise ConflictError(
            "`histograms_of` must be 'raw' where Trainer or module clip, got 'clipped': what comes of that is not seen. Let "
            "GradGuard clip, by `clip`."
        )


def refuse_second_clipping(trainer: Trainer, module: LightningModule) -> None:
    """Raise a `ConflictError` if gradients would be clipped by someone else as well."""
    if trainer.gradient_clip_val:
        raise ConflictError(
            f"`gradient_clip_val` must be unset where GradGuard clips, got {trainer.gradient_clip_val!r}: gradients would "
            "be clipped twice. Remove `gradient_clip_val` from the Trainer, or `clip` from GradGuard. Where a package sets "
            "it, pass None through that package's arguments for its Trainer; gluonts, and `optimize_hyperparameters` of "
            "pytorch-forecasting, take `trainer_kwargs={'gradient_clip_val': None}`."
        )
    owner = overrides_clipping(module)
    if owner is not None:
        raise ConflictError(
            f"`configure_gradient_clipping` must not be overridden where GradGuard clips, got {owner.__qualname__}'s: "
            "gradients would be clipped twice. Remove the method, or `clip` from GradGuard."
        )
