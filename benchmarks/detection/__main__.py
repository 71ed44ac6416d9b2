"""Score the detectors and the rules of others on labelled trainings, and write docs/accuracy.md.

Trainings are run once, about three minutes on one core, and kept in .cache/detection.
"""

from __future__ import annotations

import argparse

import torch
from rich.console import Console
from rich.progress import track

from benchmarks._report import table
from benchmarks.detection.recording import recorded
from benchmarks.detection.report import DOCUMENT, by_detector, by_fault, by_rule, document, half
from benchmarks.detection.split import FRESH_SEEDS, HALVES, SEEDS
from benchmarks.detection.trainings import KINDS


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.detection", description=__doc__)
    parser.add_argument("--tuning-only", action="store_true", help="leave the test half alone, for work on the detectors")
    chosen = parser.parse_args()
    torch.set_num_threads(1)  # the trainings are too small for more
    console = Console(width=150)
    names = ["tuning"] if chosen.tuning_only else list(HALVES)
    runs = [
        (kind, seed)
        for name in names
        for kind in sorted(HALVES[name])
        for seed in (*SEEDS, *(FRESH_SEEDS if KINDS[kind].is_healthy else ()))
    ]
    for kind, seed in track(runs, "Trainings", console=console):
        recorded(KINDS[kind], seed)
    halves = [half(name) for name in names]
    for one in halves:
        for sheet in (by_fault(one), by_detector(one), by_rule(one)):
            console.print(table(sheet.title, sheet.columns, sheet.rows))
        console.print(f"Not found: {', '.join(one.ours.missed) or 'none'}")
        console.print(f"False alarms: {one.ours.alarmed or 'none'}; on fresh seeds: {one.fresh.alarmed or 'none'}")
    DOCUMENT.write_text(document(halves), encoding="utf-8")
    console.print(f"Written to {DOCUMENT.relative_to(DOCUMENT.parents[1])}")


main()
