"""Passing over batches, so that the Trainer's loop stays in order."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_gradguard.trainer.packages import is_left_to_the_module

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


def skip_batches(trainer: Trainer, num_batches: int) -> int:
    """Take batches from the running epoch without training on them. Call at the end of a batch, on all ranks.

    Whole accumulation windows are passed over, never beyond the epoch's end, and not beyond a batch after which validation
    is due. Batches count as seen: `batch_idx` goes on, `global_step` does not.

    Returns:
        How many were passed over.
    """
    loop, fetcher = trainer.fit_loop.epoch_loop, trainer.fit_loop._data_fetcher
    if fetcher is None or is_left_to_the_module(fetcher):  # the module fetches its batches itself
        return 0
    window = trainer.accumulate_grad_batches
    wanted = -(-num_batches // window) * window
    num_passed = 0
    while num_passed < wanted and not (loop._num_ready_batches_reached() or loop._should_check_val_fx(fetcher)):
        try:
            next(fetcher)
        except StopIteration:  # an iterable data set that did not know its length
            break
        num_passed += 1
        loop.batch_progress.increment_by(1, is_last_batch=fetcher.done)
    if num_passed and loop._num_ready_batches_reached():
        # The Trainer has asked for the epoch's end before this batch's end, and won't again.
        loop.update_lr_schedulers("epoch", update_plateau_schedulers=False)
    return num_passed
