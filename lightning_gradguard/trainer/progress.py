"""Where the Trainer stands, and whether it can stop."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from lightning_gradguard.errors import GuardWarning
from lightning_gradguard.trainer.packages import takes_argument

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


def log_step(trainer: Trainer) -> int:
    """The x value that Lightning's own logging uses for the running batch."""
    # Private, and the only place where it can be had; Lightning's LearningRateMonitor reads it in the same way.
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def fetches_batches(module: LightningModule) -> bool:
    """Whether `training_step(dataloader_iter)` fetches its batches by itself: hooks are then told of the one before."""
    return takes_argument(module.training_step, "dataloader_iter", explicit=True)


def log_interval(trainer: Trainer) -> int:
    """How often the Trainer logs, in steps; 0: never."""
    return trainer.log_every_n_steps  # type: ignore[attr-defined,no-any-return]  # set by a connector


def stop_is_deferred_by(trainer: Trainer) -> str | None:
    """What keeps the Trainer from honouring `should_stop` now, as a text; None if nothing does."""
    # The Trainer looks after the running step, and at the epoch's end; given `min_steps` alone, it sets `min_epochs` to 1.
    if trainer.min_steps and trainer.global_step + 1 < trainer.min_steps:
        return f"min_steps={trainer.min_steps}"
    num_epochs = trainer.current_epoch + trainer.is_last_batch
    if trainer.min_epochs and num_epochs < trainer.min_epochs:
        return f"min_epochs={trainer.min_epochs}"
    return None


def request_stop(trainer: Trainer) -> None:
    """Have the Trainer end as after early stopping; say so where its own settings defer that."""
    if not trainer.should_stop and (reason := stop_is_deferred_by(trainer)):
        warnings.warn(
            f"GradGuard stops the training, but `{reason}` keeps the Trainer going until then. Bad steps stay skipped.",
            GuardWarning,
            stacklevel=2,
        )
    trainer.should_stop = True
