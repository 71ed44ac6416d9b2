"""Lightning's `BoringModel`, on which most of its own tests train: is it falling apart where `explosion="stop"` ends it?

Its learning rate is 0.1, and a tenth and a hundredth of that in the second and third epoch of 64 steps: that is `StepLR`.
The loss is (w x - 1)^2, mean over two outputs; x is normal, with 32 elements. A step with rate r then multiplies the squared
distance to the solution by about 1 - 2 r + 34 r^2 on average: by 1.14 at 0.1, by 0.98 at 0.01. So the same model with 0.01
is the training that a guard should let run. Each seed is trained with a guard that only measures, and with one that stops.
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections import Counter
from statistics import median
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel

from benchmarks._report import begin, parser, table
from lightning_gradguard import GradGuard
from lightning_gradguard.record import Record

RATES = (0.1, 0.01)
SEEDS, EPOCHS, EPOCH_STEPS, ENDS = 40, 3, 64, 16


class _OtherRate(BoringModel):
    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def configure_optimizers(self) -> Any:
        optimizers, schedulers = super().configure_optimizers()
        for group in optimizers[0].param_groups:
            group["lr"] = group["initial_lr"] = self.rate
        schedulers[0].base_lrs = [self.rate]
        return optimizers, schedulers


def train(rate: float, seed: int, **settings: Any) -> tuple[list[tuple[float, float]], GradGuard]:
    """Norm and loss at each step, and the guard."""
    torch.manual_seed(seed)
    seen: list[tuple[float, float]] = []

    def note(record: Record) -> None:
        assert record.measurement.loss is not None
        seen.append((record.measurement.global_norm, record.measurement.loss))

    with tempfile.TemporaryDirectory() as folder:
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
        guard = GradGuard(**settings, sinks=[note])
        run = {"accelerator": "cpu", "max_epochs": EPOCHS, "limit_val_batches": 0}
        Trainer(default_root_dir=folder, callbacks=[guard], **quiet, **run).fit(_OtherRate(rate))
    return seen, guard


def _rise(values: list[float], until: int) -> float:
    return median(values[max(until - ENDS, 0) : until]) / median(values[:ENDS])


def _spread(values: list[float]) -> str:
    return f"{median(values):.3g} ({min(values):.3g} to {max(values):.3g})" if values else ""


def row(rate: float, seeds: int) -> list[str]:
    """How far norm and loss rise in the first epoch; how many trainings are ended, where, and how far they had risen."""
    norms, losses, at_stop, before, stops = [], [], [], [], Counter[int]()
    num_growing = 0
    for seed in range(seeds):
        plain, _ = train(rate, seed, explosion=None, nonfinite=None, vanishing=None)
        norms.append(_rise([norm for norm, _ in plain], EPOCH_STEPS))
        losses.append(_rise([loss for _, loss in plain], EPOCH_STEPS))
        guarded, guard = train(rate, seed, explosion="stop", nonfinite="stop")
        num_growing += any("keeps growing" in alert.message for alert in guard.alerts)
        if (step := len(guarded) - 1) < EPOCHS * EPOCH_STEPS - 1:
            stops[step] += 1
            at_stop.append(_rise([loss for _, loss in guarded], step))
            before.append(guarded[-1][0] / median(norm for norm, _ in guarded[-1 - ENDS : -1]))
    where = ", ".join(f"{step}: {count}" for step, count in sorted(stops.items()))
    return [
        f"{rate:g}",
        _spread(norms),
        _spread(losses),
        str(num_growing),
        f"{stops.total()} of {seeds}",
        where,
        _spread(at_stop),
        _spread(before),
    ]


def main() -> None:
    """Both rates."""
    chosen = parser(__doc__).parse_args()
    console = begin(chosen)
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.fabric", "lightning_gradguard"):
        logging.getLogger(name).setLevel(logging.ERROR)
    rows = [row(rate, 1 if chosen.quick else SEEDS) for rate in RATES]
    columns = ["rate", "norm, first epoch", "loss, first epoch", "told that it grows", "stopped", "at step: trainings"]
    columns += ["loss risen by then", "norm over the 16 before"]
    title = "Median of 16 steps over that of the first 16; median (smallest to largest) of the seeds"
    console.print(table(title, columns, rows))


if __name__ == "__main__":
    main()
