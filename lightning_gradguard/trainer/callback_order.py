"""The guard's place among the callbacks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_gradguard.trainer.packages import is_checkpoint

if TYPE_CHECKING:
    from lightning.pytorch import Callback, Trainer


def callbacks_of(trainer: Trainer) -> list[Callback]:
    """The Trainer's callbacks, in the order in which they are called."""
    return trainer.callbacks  # type: ignore[attr-defined,no-any-return]  # set by a connector


def remove(trainer: Trainer, guard: Callback) -> None:
    """Take the guard out of the Trainer."""
    # A new list here and below: the Trainer may be walking over the old one.
    trainer.callbacks = [callback for callback in callbacks_of(trainer) if callback is not guard]  # type: ignore[attr-defined]


def move_behind(trainer: Trainer, guard: Callback) -> None:
    """Put the guard behind all other callbacks but the checkpoints, so that it sees what they make of the gradients.

    A checkpoint has to come later, to save what the guard has decided.
    """
    callbacks = callbacks_of(trainer)
    others = [callback for callback in callbacks if callback is not guard]
    before = [callback for callback in others if not is_checkpoint(callback)]
    after = [callback for callback in others if is_checkpoint(callback)]
    trainer.callbacks = [*before, guard, *after]  # type: ignore[attr-defined]
