"""Checks and measures on a CUDA device what the tests prove on a CPU and on the meta device.

It prints Markdown for docs/performance.md, and ends with an error if a check fails. Ten minutes at most: what there is no
time for is left out, and said so.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
import warnings
from collections.abc import Sequence

import lightning.pytorch
import torch
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.gpu.checks import CHECKS
from benchmarks.gpu.loop import LeftOutError
from benchmarks.gpu.networks import DRY_TRAININGS, TRAININGS
from benchmarks.gpu.steps import COLUMNS, release, row, time_steps
from benchmarks.gpu.trainer_checks import TRAINER_CHECKS
from lightning_gradguard.act import choice

MAX_SECONDS = 540.0
"""After so long nothing new is begun; a training takes less than a minute."""

MAX_SECONDS_OF_A_TRAINING = 45.0
WIDTH = 400
"""Of the console: Markdown knows no line breaks in a table."""

OK, FAILED, LEFT_OUT = "ok", "**failed**", "left out"


def main() -> int:
    """Check and measure.

    Returns:
        1 if a check has failed, else 0; 2 without a device.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--dry-run", action="store_true", help="on a CPU, in miniature: whether it runs; the figures mean nothing"
    )
    chosen = parser.parse_args()
    if not chosen.dry_run and not torch.cuda.is_available():
        print("There is no CUDA device. `--dry-run` goes through the motions on a CPU.", file=sys.stderr)
        return 2
    device = torch.device("cpu" if chosen.dry_run else "cuda")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    torch.set_float32_matmul_precision("high")
    if chosen.dry_run:  # the ways that decisions take on a GPU
        choice.DEFERRING_DEVICES = {"cuda", "cpu"}
    begin = time.perf_counter()
    console = Console(width=WIDTH, file=sys.stdout)
    console.print(_where(device))
    outcomes = _check(device)
    console.print(_table(("check", "result", "what was looked at"), outcomes))
    rows = _measure(device, begin)
    console.print(_table(COLUMNS, rows))
    num_failed = sum(outcome[1] == FAILED for outcome in outcomes)
    console.print(f"{len(outcomes)} checks, {num_failed} failed; {time.perf_counter() - begin:.0f} s.")
    return 1 if num_failed else 0


def _where(device: torch.device) -> str:
    """What the figures belong to."""
    what = f"{torch.cuda.get_device_name()}, " if device.type == "cuda" else "Dry run on a CPU: the figures mean nothing. "
    return f"{what}torch {torch.__version__}, lightning {lightning.pytorch.__version__}.\n"


def _check(device: torch.device) -> list[list[str]]:
    """A row for each check; one that fails doesn't keep the others from being made."""
    rows = []
    for title, check in {**CHECKS, **TRAINER_CHECKS}.items():
        try:
            rows.append([title, OK, check(device)])
        except LeftOutError as reason:
            rows.append([title, LEFT_OUT, str(reason)])
        except Exception as error:  # noqa: BLE001 - whatever it is, it is the result
            rows.append([title, FAILED, _one_line(error)])
        release(device)
    return rows


def _measure(device: torch.device, begin: float) -> list[list[str]]:
    """A row for each training."""
    is_dry = device.type != "cuda"
    rows = []
    for training in DRY_TRAININGS if is_dry else TRAININGS:
        left = MAX_SECONDS - (time.perf_counter() - begin)
        if left < MAX_SECONDS_OF_A_TRAINING:
            rows.append(_left_out(training.title, "no time was left"))
            continue
        try:
            timings = time_steps(training, device, max_seconds=MAX_SECONDS_OF_A_TRAINING, is_dry=is_dry)
            rows.append(row(training.title, timings))
        except torch.OutOfMemoryError:
            rows.append(_left_out(training.title, "out of memory"))
        release(device)
    return rows


def _left_out(title: str, reason: str) -> list[str]:
    return [title, f"{LEFT_OUT}: {reason}", *[""] * (len(COLUMNS) - 2)]


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300].replace("|", "\\|")


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(*columns, box=box.MARKDOWN)
    for each in rows:
        table.add_row(*each)
    return table


if __name__ == "__main__":
    sys.exit(main())
