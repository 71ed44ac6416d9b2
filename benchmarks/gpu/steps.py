"""Whole steps of the Trainer on a device: without clipping, with the Trainer's own, and with the guard."""

from __future__ import annotations

import gc
import tempfile
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from benchmarks._interleaved import Timings, Variant, interleave
from benchmarks.gpu.networks import Training
from benchmarks.step import GUARD, HISTOGRAM_EVERY, LOG_EVERY, MAX_NORM, PLAIN, TRAINER, PausingTrainer
from lightning_gradguard import GradGuard

ROUNDS, WARMUP, NUM_BATCHES = 100, 10, 4
MIN_ROUNDS = 5
"""On a device so slow that there is no time for more; the interval beside the ratio then says how little that is."""


class Timed(LightningModule):
    """A training as the Trainer takes it."""

    def __init__(self, training: Training, device: torch.device) -> None:
        super().__init__()
        with device:
            self.network = training.network()
        self.training_ = training

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The loss, logged as everybody does."""
        loss = self.network(batch)
        self.log("loss", loss, batch_size=1)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.training_.optimizer(self.network)


def time_steps(training: Training, device: torch.device, *, max_seconds: float, is_dry: bool) -> Timings:
    """Time a step of each variant; the Trainers take turns.

    Args:
        training: what is trained.
        device: where.
        max_seconds: of the rounds.
        is_dry: whether three rounds will do.

    Raises:
        torch.OutOfMemoryError: if the device can't hold three of these networks with their optimizers.
    """
    torch.manual_seed(0)
    batches = [training.batch(device) for _ in range(NUM_BATCHES)]
    guard = GradGuard(clip=MAX_NORM, histogram_every_n_steps=HISTOGRAM_EVERY)
    settings: dict[str, dict[str, Any]] = {
        PLAIN: {},
        TRAINER: {"gradient_clip_val": MAX_NORM},
        GUARD: {"callbacks": [guard]},
    }
    with tempfile.TemporaryDirectory() as folder:
        trainers = {}
        for index, (name, setting) in enumerate(settings.items()):
            torch.manual_seed(0)
            trainer = Trainer(
                accelerator="gpu" if device.type == "cuda" else "cpu",
                devices=1,
                precision=training.precision,  # type: ignore[arg-type]
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
            trainers[name] = PausingTrainer(trainer, Timed(training, device), batches)
        timings = interleave(
            {name: Variant(trainer.step) for name, trainer in trainers.items()},
            rounds=3 if is_dry else ROUNDS,
            warmup=2 if is_dry else WARMUP,
            max_seconds=max_seconds,
            min_rounds=MIN_ROUNDS,
            device=device.type,
        )
        for trainer in trainers.values():
            trainer.finish()
    return timings


def release(device: torch.device) -> None:
    """Give back the memory of what is no longer used."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def row(title: str, timings: Timings) -> list[str]:
    """Of the table: medians in ms, and the guard's over the others'."""
    medians = [f"{timings.median(name) * 1e3:.2f}" for name in (PLAIN, TRAINER, GUARD)]
    return [title, *medians, str(timings.ratio(GUARD, TRAINER)), str(timings.ratio(GUARD, PLAIN))]


COLUMNS = ("training", f"{PLAIN}, ms", f"`{TRAINER}`, ms", f"`{GUARD}`, ms", f"over `{TRAINER}`", f"over {PLAIN}")
