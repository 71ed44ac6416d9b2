"""What a healthy step costs more because batches are followed that might end in an exception.

Trainers of the same guard, weights and batches take turns step by step: one that follows exceptions as it does by default,
one that passes over none of them, one whose loops have been given back their own methods, and one that replays nothing at
all. Timed is what the training's thread computes: the difference is too small for a clock that other work on the machine
moves. What an exception itself costs is not measured here.
"""

from __future__ import annotations

import logging
import tempfile
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Trainer

from benchmarks._interleaved import Timings, Variant, interleave
from benchmarks._report import begin, parser, table, timing_table
from benchmarks._workloads import WORKLOADS, Workload, describe
from benchmarks.step import PausingTrainer, Training
from lightning_gradguard import GradGuard

DEFAULT = "GradGuard()"
NONE_PASSED = "skip_exceptions=None"
NOT_FOLLOWED = "not followed"
NO_REPLAYS = "max_replays=0"
BASELINES = (NONE_PASSED, NOT_FOLLOWED, NO_REPLAYS)
WARMUP, ROUNDS = 20, 2000
MAX_SECONDS = 120.0


class _NotFollowing(GradGuard):
    """Gives the Trainer's loops their own methods back."""

    def on_train_start(self, *args: Any) -> None:
        """Once it stands in for them."""
        super().on_train_start(*args)
        assert self._fit is not None
        assert self._fit._raised is not None
        self._fit._raised.detach()


GUARDS: dict[str, Callable[[], GradGuard]] = {
    DEFAULT: GradGuard,
    NONE_PASSED: lambda: GradGuard(skip_exceptions=None),
    NOT_FOLLOWED: _NotFollowing,
    NO_REPLAYS: lambda: GradGuard(max_replays=0),
}


def compare(workload: Workload, *, quick: bool) -> Timings:
    """Time a step of each variant."""
    batches = workload.batches()
    trainers = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, guard in GUARDS.items():
            torch.manual_seed(0)
            trainer = Trainer(
                accelerator="cpu",
                devices=1,
                max_steps=10**9,
                max_epochs=-1,
                limit_val_batches=0,
                logger=False,
                callbacks=[guard()],
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                default_root_dir=folder,
            )
            trainers[name] = PausingTrainer(trainer, Training(workload.model(quick), "fused"), batches)
        timings = interleave(
            {name: Variant(trainer.step) for name, trainer in trainers.items()},
            rounds=3 if quick else ROUNDS,
            warmup=2 if quick else WARMUP,
            max_seconds=MAX_SECONDS,
            clock=time.thread_time,
        )
        for trainer in trainers.values():
            trainer.finish()
    return timings


def main() -> None:
    """Compare on chosen networks."""
    arguments = parser(__doc__)
    arguments.add_argument("--models", nargs="+", choices=list(WORKLOADS), default=["mlp3"])
    chosen = arguments.parse_args()
    console = begin(chosen)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    for name in chosen.models:
        workload = WORKLOADS[name]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Lightning's advice about the machine
            timings = compare(workload, quick=chosen.quick)
        title = f"{workload.title}, {describe(workload.model(chosen.quick))}, fused AdamW, cpu"
        means = [str(timings.mean_ratio(DEFAULT, over)) for over in BASELINES]
        console.print(timing_table(title, timings, BASELINES))
        console.print(table("Means", ["variant", *(f"over {it}" for it in BASELINES)], [[DEFAULT, *means]]))


if __name__ == "__main__":
    main()
