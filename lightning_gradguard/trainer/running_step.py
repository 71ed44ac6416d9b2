"""Where the running step stands: which micro-batches it has had, and its number."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_gradguard.record import Position
from lightning_gradguard.trainer.guards import Guards
from lightning_gradguard.trainer.precision import skips_without_backward
from lightning_gradguard.trainer.progress import fetches_batches, log_step

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


class RunningStep:
    """Follows the micro-batches of a step.

    Args:
        trainer: the Trainer.
        module: the one that is trained.

    Attributes:
        begins: whether the next micro-batch is the first of its step.
    """

    def __init__(self, trainer: Trainer, module: LightningModule) -> None:
        self._trainer = trainer
        self._module = module
        # Which batch a step sees is not known where the module fetches its own.
        self.knows_batches = not fetches_batches(module)
        self.begins = True
        self._rank = trainer.global_rank
        self._batch_idx: int | None = None
        self._batches: list[int] = []
        self.has_backward = False

    def begin_batch(self, batch_idx: int) -> None:
        """A micro-batch begins."""
        self.begins = self.has_backward = False
        if self.knows_batches:
            self._batch_idx = batch_idx

    def before_backward(self) -> None:
        """Its backward pass begins."""
        self.has_backward = True
        if self._batch_idx is not None:
            self._batches.append(self._batch_idx)

    def end_in_exception(self) -> int:
        """It has ended in an exception: it is one of its step all the same. Its number in the step."""
        if not self.has_backward:
            self.before_backward()
        return max(len(self._batches) - 1, 0)

    def is_skipped_by_lightning(self) -> bool:
        """Whether `training_step` has returned None, so that the optimizer will not step."""
        return not self.has_backward and skips_without_backward(self._trainer, self._module)

    def end(self) -> None:
        """An optimizer has stepped."""
        self.begins = True
        self._batches.clear()

    def position(self, index: int, guards: Guards) -> Position:
        """That of the step of an optimizer, by its number."""
        num_optimizers = len(guards)
        return Position(
            step=guards.num_steps,
            epoch=self._trainer.current_epoch,
            batch_idx=self._batch_idx,
            batches=tuple(self._batches) if num_optimizers == 1 else (),
            optimizer=index,
            num_optimizers=num_optimizers,
            rank=self._rank,
            log_step=log_step(self._trainer),
        )
