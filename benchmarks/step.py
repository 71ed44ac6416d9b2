"""What a whole step of the Trainer costs: without clipping, with the Trainer's own, and with the guard.

Each variant has a Trainer of its own, with the same weights and batches. The Trainers take turns step by step. The
guard clips, has all its detectors, logs every 50 steps and writes histograms every 100, both to TensorBoard.
"""

from __future__ import annotations

import logging
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from itertools import cycle
from typing import Any

import greenlet
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from rich.console import Console
from torch import Tensor, nn

from benchmarks._interleaved import Timings, Variant, interleave
from benchmarks._report import begin, parser, timing_table
from benchmarks._workloads import WORKLOADS, Workload, adamw, describe
from lightning_gradguard import GradGuard

MAX_NORM = 1.0
LOG_EVERY, HISTOGRAM_EVERY = 50, 100
WARMUP = 20
ROUNDS = 2000
MAX_SECONDS = 20.0
OPTIMIZERS = ("fused", "foreach")
PLAIN, TRAINER, GUARD = "no clipping", f"gradient_clip_val={MAX_NORM}", f"GradGuard(clip={MAX_NORM})"


class Training(LightningModule):
    """A network with its optimizer."""

    def __init__(self, network: nn.Module, optimizer: str) -> None:
        super().__init__()
        self.network = network
        self.optimizer = optimizer

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The loss, logged as everybody does."""
        loss = self.network(batch)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return adamw(self.network, self.optimizer)


class PausingTrainer:
    """A Trainer that pauses whenever it asks for a batch, so that several can take turns in one thread.

    Args:
        trainer: has no end of its own.
        module: what it trains.
        batches: given out again and again.
    """

    def __init__(self, trainer: Trainer, module: LightningModule, batches: list[Any]) -> None:
        self._trainer = trainer
        self._batches = cycle(batches)
        self._fit = greenlet.greenlet(lambda: trainer.fit(module, self))

    def __iter__(self) -> Iterator[Any]:
        for batch in self._batches:
            self._fit.parent.switch()
            yield batch

    def step(self) -> None:
        """Go on to the next batch: one step, from one request for data to the next."""
        self._fit.switch()

    def finish(self) -> None:
        """Let the Trainer end as it does."""
        self._trainer.should_stop = True
        while not self._fit.dead:
            self._fit.switch()


def pausing_trainers(
    settings: Mapping[str, dict[str, Any]], workload: Workload, optimizer: str, *, accelerator: str, folder: str, quick: bool
) -> dict[str, PausingTrainer]:
    """A Trainer for each of some settings, with the same weights and batches."""
    batches = workload.batches()
    trainers = {}
    for index, (name, setting) in enumerate(settings.items()):
        torch.manual_seed(0)
        trainer = Trainer(
            accelerator=accelerator,
            devices=1,
            max_steps=10**9,
            max_epochs=-1,
            limit_val_batches=0,
            logger=TensorBoardLogger(folder, version=index),
            log_every_n_steps=LOG_EVERY,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            **setting,
        )
        trainers[name] = PausingTrainer(trainer, Training(workload.model(quick), optimizer), batches)
    return trainers


def compare(
    workload: Workload, optimizer: str, accelerator: str, *, quick: bool, cpu_time: bool = False
) -> tuple[Timings, str]:
    """Time a step of each variant; how many of the guard's steps were clipped, too."""
    guard = GradGuard(clip=MAX_NORM, histogram_every_n_steps=HISTOGRAM_EVERY)
    settings: dict[str, dict[str, Any]] = {
        PLAIN: {},
        TRAINER: {"gradient_clip_val": MAX_NORM},
        GUARD: {"callbacks": [guard]},
    }
    with tempfile.TemporaryDirectory() as folder:
        trainers = pausing_trainers(settings, workload, optimizer, accelerator=accelerator, folder=folder, quick=quick)
        timings = interleave(
            {name: Variant(trainer.step) for name, trainer in trainers.items()},
            rounds=3 if quick else ROUNDS,
            warmup=2 if quick else WARMUP,
            max_seconds=MAX_SECONDS,
            device="cuda" if accelerator == "gpu" else "cpu",
            clock=time.process_time if cpu_time else time.perf_counter,
        )
        for trainer in trainers.values():
            trainer.finish()
    return timings, f"{guard.num_clipped} of {guard.num_steps}, {len(guard.alerts)} alerts"


def main() -> None:
    """Compare all networks, optimizers and devices."""
    arguments = parser(__doc__)
    arguments.add_argument("--models", nargs="+", choices=list(WORKLOADS), default=list(WORKLOADS))
    arguments.add_argument(
        "--cpu-time", action="store_true", help="the time that the process computes, whatever else the machine does"
    )
    chosen = arguments.parse_args()
    console = begin(chosen)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    for name in chosen.models:
        workload = WORKLOADS[name]
        if workload.missing:
            console.print(f"{workload.title}: left out, {workload.missing}.")
            continue
        for accelerator in ("cpu", "gpu") if torch.cuda.is_available() else ("cpu",):
            for optimizer in OPTIMIZERS:
                _show(console, workload, optimizer, accelerator, quick=chosen.quick, cpu_time=chosen.cpu_time)


def _show(console: Console, workload: Workload, optimizer: str, accelerator: str, *, quick: bool, cpu_time: bool) -> None:
    with warnings.catch_warnings():
        # Lightning's advice about the machine, and the guard's about a network that learns nothing.
        warnings.simplefilter("ignore")
        timings, clipped = compare(workload, optimizer, accelerator, quick=quick, cpu_time=cpu_time)
    title = f"{workload.title}, {describe(workload.model(quick))}, {optimizer} AdamW, {accelerator}"
    title += ", CPU time" * cpu_time
    more = {f"mean over {over}": {GUARD: str(timings.mean_ratio(GUARD, over))} for over in (PLAIN, TRAINER)}
    if cpu_time:
        more = {
            f"ms over {PLAIN}": {
                name: f"{(timings.median(name) - timings.median(PLAIN)) * 1e3:.3f}" for name in (TRAINER, GUARD)
            }
        }
    console.print(timing_table(title, timings, [PLAIN, TRAINER], more | {"clipped steps": {GUARD: clipped}}))


if __name__ == "__main__":
    main()
