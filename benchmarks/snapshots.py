"""What snapshots for the action "rollback" cost: the time of one, over that of the steps between two by default.

A training with the guard runs step by step; between steps a snapshot is timed, as the guard takes it. The first one
of a kind has to get its memory from the system; later ones write into it again.
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from pathlib import Path

import numpy as np
from lightning.pytorch import Trainer
from rich.console import Console

from benchmarks._interleaved import Timings, Variant, interleave
from benchmarks._report import begin, parser, table
from benchmarks._workloads import WORKLOADS, Workload, describe
from benchmarks.step import PausingTrainer, Training
from lightning_gradguard import GradGuard, Rollback
from lightning_gradguard.trainer.recovery.run_state import RunState
from lightning_gradguard.trainer.recovery.snapshot_storage import InMemory, OnDisk

INTERVAL = Rollback().every_n_steps
WARMUP, ROUNDS, MAX_SECONDS = 3, 30, 15.0
STEP, MEMORY, DISK = "step of the Trainer with the guard", "snapshot in memory", "snapshot on disk"


def measure(workload: Workload, *, quick: bool) -> tuple[Timings, int]:
    """Time a step, and a snapshot of either kind; and the bytes of one."""
    guard = GradGuard(clip=1.0)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            accelerator="cpu",
            max_steps=10**9,
            max_epochs=-1,
            limit_val_batches=0,
            callbacks=[guard],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
        )
        module = Training(workload.model(quick), "fused")
        pausing = PausingTrainer(trainer, module, workload.batches())
        for _ in range(WARMUP):
            pausing.step()
        guards = list(guard._fit.guards)
        state = RunState(trainer, module, guards)
        memory, disk = InMemory(state), OnDisk(trainer, state, guards, Path(folder) / "kept")
        kept = [memory.write(0, None), memory.write(0, None)]
        timings = interleave(
            {
                STEP: Variant(pausing.step),
                MEMORY: Variant(lambda: kept.append(memory.write(0, kept.pop(0)))),
                DISK: Variant(lambda: disk.write(0, None)),
            },
            rounds=3 if quick else ROUNDS,
            warmup=1,
            max_seconds=MAX_SECONDS,
        )
        num_bytes = state.num_bytes()
        pausing.finish()
    return timings, num_bytes


def main() -> None:
    """All networks."""
    chosen = parser(__doc__).parse_args()
    console = begin(chosen)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    rows = []
    for workload in WORKLOADS.values():
        if workload.missing:
            console.print(f"{workload.title}: left out, {workload.missing}.")
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            timings, num_bytes = measure(workload, quick=chosen.quick)
        rows.append([f"{workload.title}, {describe(workload.model(chosen.quick))}", *_figures(timings, num_bytes)])
    _show(console, rows)


def _figures(timings: Timings, num_bytes: int) -> list[str]:
    step = timings.median(STEP)
    figures = [f"{1e3 * step:.1f}", f"{num_bytes / 1e6:.0f}"]
    for kind in (MEMORY, DISK):
        low, high = np.quantile(timings.seconds[kind], (0.25, 0.75))
        share = timings.median(kind) / (INTERVAL * step)
        figures += [f"{1e3 * timings.median(kind):.1f} ({1e3 * low:.1f} to {1e3 * high:.1f})", f"{share:.2%}"]
    return figures


def _show(console: Console, rows: list[list[str]]) -> None:
    columns = ["training", "step, ms", "MB", "in memory, ms (quartiles)", "of time", "on disk, ms (quartiles)", "of time"]
    console.print(table(f"One snapshot, and its share of the time of {INTERVAL} steps", columns, rows))


if __name__ == "__main__":
    main()
