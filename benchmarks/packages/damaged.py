"""Trainings that end in an exception of torch because of NaN in one row: without the guard, and with it.

The row is written before the training begins; which of a batch it is, a callback notes from the batch itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from benchmarks.packages.trainings import Training
from lightning_gradguard import GradGuard
from lightning_gradguard.trainer.packages import Callback

COLUMNS = ("training", "end", "batches", "with NaN", "skipped", "alerts with the right rows")
NAMES = ("scvi-tools", "gluonts")
EPOCHS = 3


class DamagedRows(Callback):
    """Notes which rows of each batch hold NaN, and how many steps there were."""

    def __init__(self) -> None:
        self.rows: dict[int, set[int]] = {}
        self.num_batches = 0

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Look at the batch."""
        self.rows[self.num_batches] = set().union(*map(_damaged_rows, _tensors(batch)))
        self.num_batches += 1


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor) and value.is_floating_point():
        yield value
    elif isinstance(value, Mapping):
        for entry in value.values():
            yield from _tensors(entry)


def _damaged_rows(tensor: Tensor) -> set[int]:
    return set(tensor.flatten(1).isnan().any(1).nonzero().flatten().tolist()) if tensor.dim() > 1 else set()


def rows_and_message(name: str, training: Training) -> tuple[list[list[str]], str]:
    """A row without the guard, one with it, and the first thing that it says."""
    guard = GradGuard(max_replays=100, max_bundle_mib=None)
    rows = [[f"{name}, without the guard", *_play(training, None)], [f"{name}, with the guard", *_play(training, guard)]]
    return rows, next((alert.message for alert in guard.alerts), "")


def _play(training: Training, guard: GradGuard | None) -> list[str]:
    """How a training ends, and whether the guard names the rows that hold NaN."""
    noted = DamagedRows()
    try:
        training.train([noted] if guard is None else [noted, guard], damaged=True, max_epochs=EPOCHS)
        end = "finished"
    except Exception as error:  # noqa: BLE001 - it is the finding
        end = f"{type(error).__name__}: {str(error).splitlines()[0][:60]}"
    num_damaged = sum(1 for rows in noted.rows.values() if rows)
    row = [end, str(noted.num_batches), str(num_damaged)]
    if guard is None:
        return [*row, "", ""]
    culprits = [(alert.step, alert.culprit) for alert in guard.alerts if alert.kind == "nonfinite"]
    right = sum(
        1 for step, it in culprits if it and set(it.samples or it.probable_samples or ()) == noted.rows.get(step, set())
    )
    return [*row, str(guard.num_skipped), f"{right} of {len(culprits)}"]
