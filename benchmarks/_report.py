"""Command line and tables that all benchmarks share."""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Mapping, Sequence

import torch
from rich.console import Console
from rich.table import Table

from benchmarks._interleaved import Timings

NUM_THREADS = 2


def parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with `--quick`."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--quick", action="store_true", help="smallest sizes, few rounds: whether it runs, not what it costs")
    made.add_argument("--threads", type=int, default=NUM_THREADS, help="threads that torch uses on the CPU")
    return made


def begin(chosen: argparse.Namespace) -> Console:
    """Set threads and seed, and say where this runs."""
    # Where cores are shared, two threads wait for each other at every barrier; quick runs have no use for them.
    threads = 1 if chosen.quick else chosen.threads
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    console = Console(width=125, file=sys.stdout)  # this one also where a benchmark silences what it runs
    where = f"{platform.machine()}, {threads} thread(s), torch {torch.__version__}"
    if torch.cuda.is_available():
        where += f", {torch.cuda.get_device_name()}"
    console.print(where)
    if chosen.quick:
        console.print("Quick: the figures mean nothing.")
    return console


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """A table whose columns after the first are numbers."""
    made = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        made.add_column(column, justify="right" if index else "left", overflow="fold")
    for row in rows:
        made.add_row(*row)
    return made


def timing_table(
    title: str, timings: Timings, baselines: Sequence[str], more: Mapping[str, Mapping[str, str]] | None = None
) -> Table:
    """A row for each variant: median, quartile distance, mean, and the ratio to each baseline.

    Args:
        title: above the table.
        timings: of all variants.
        baselines: names of the variants that the others are compared with.
        more: further columns, by title, then by variant.
    """
    more = more or {}
    rounds = len(next(iter(timings.seconds.values())))
    columns = ["variant", "median ms", "IQR ms", "mean ms", *(f"over {name}" for name in baselines), *more]
    rows = [
        [
            name,
            f"{timings.median(name) * 1e3:.3f}",
            f"{timings.iqr(name) * 1e3:.3f}",
            f"{timings.mean(name) * 1e3:.3f}",
            *(str(timings.ratio(name, baseline)) for baseline in baselines),
            *(values.get(name, "") for values in more.values()),
        ]
        for name in timings.seconds
    ]
    return table(f"{title}; {rounds} rounds", columns, rows)
