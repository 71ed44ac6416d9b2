"""Writes docs/conformance.md from the results of tests/conformance.

pytest tests/conformance -m "slow or not slow" --junitxml conformance.xml
python docs/conformance_table.py conformance.xml
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import defaultdict
from pathlib import Path
from xml.etree import ElementTree as ET

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "tests" / "conformance"))

from cells import LOOPS, OPTIMIZERS, PRECISIONS, REASONS, TOPOLOGIES, Cell, reason_against  # noqa: E402

TITLES = {"single": "One process", "ddp": "DDP", "fsdp2": "FSDP2", "tp": "Tensor parallel", "fsdp1": "FSDP1"}
HEAD = """# Conformance

Written by `docs/conformance_table.py` from a run of `tests/conformance`; do not edit.

Each cell is one way to train: a precision, an optimizer with its kernel, a loop and a topology (all but the first with two
processes over gloo, on a CPU). In each of them these tests ran:

{tests}

The bar: weights and optimizer state equal to the last bit, but for clipping, which is bit-equal in fp32 on one device with
kernels that don't clip by themselves, and within 1e-5 of the weights' length elsewhere (1e-2 with bf16 weights); and for
norms, within 1e-6 (1e-12 in fp64). Under tensor parallelism LBFGS blows up the last bit of what ranks sum, so that below
fp64 the clipped gradients of its first evaluation are compared in place of the weights (1e-6; 1e-2 with bf16 weights). A
NaN, and a bad loss, come on one rank alone where there are two.

{summary}

`ok` followed by a number: so many tests passed, and none failed. A letter: the cell can't exist, for the reason below.
"""


def main(reports: list[str]) -> None:
    """Write the page."""
    passed: dict[str, int] = defaultdict(int)
    failed: dict[str, list[str]] = defaultdict(list)
    tests: dict[str, None] = {}
    for case in (case for report in reports for case in ET.parse(report).iter("testcase")):
        match = re.fullmatch(r"(test_\w+)\[(.+)\]", case.attrib["name"])
        if match is None or case.find("skipped") is not None:
            continue
        test, cell = match.groups()
        tests[test] = None
        if case.find("failure") is None and case.find("error") is None:
            passed[cell] += 1
        else:
            failed[cell].append(test)
    letters = dict(zip(REASONS, "abcdefghijkl", strict=False))
    summary = f"{len(passed):,} cells, {sum(passed.values()):,} tests passed, {sum(map(len, failed.values())):,} failed."
    names = "\n".join(f"- {test.removeprefix('test_').replace('_', ' ')}" for test in sorted(tests))
    parts = [HEAD.format(tests=names, summary=summary)]
    for topology in TOPOLOGIES:
        parts += [f"## {TITLES[topology]}\n", _table(topology, passed, failed, letters)]
    parts += ["## Cells that can't exist\n", *(f"- **{letter}**: {REASONS[key]}" for key, letter in letters.items())]
    parts += [
        "",
        "Fused SGD with bf16 weights is tested without momentum: on a CPU, torch 2.13 leaves elements of a new buffer",
        "uninitialised there, guard or not.",
    ]
    (ROOT / "docs" / "conformance.md").write_text("\n".join(parts) + "\n", encoding="utf-8")


def _table(topology: str, passed: dict[str, int], failed: dict[str, list[str]], letters: dict[str, str]) -> str:
    lines = ["| optimizer | precision | " + " | ".join(LOOPS) + " |", "|---" * (2 + len(LOOPS)) + "|"]
    for optimizer in OPTIMIZERS:
        for precision in PRECISIONS:
            cells = [Cell(precision, optimizer, loop, topology) for loop in LOOPS]
            entries = [_entry(cell, passed, failed, letters) for cell in cells]
            lines.append("| " + " | ".join([optimizer, precision, *entries]) + " |")
    return "\n".join(lines) + "\n"


def _entry(cell: Cell, passed: dict[str, int], failed: dict[str, list[str]], letters: dict[str, str]) -> str:
    if (reason := reason_against(cell)) is not None:
        return letters[reason]
    if failed.get(str(cell)):
        return "**failed**: " + ", ".join(failed[str(cell)])
    return f"ok {passed[str(cell)]}" if passed.get(str(cell)) else "not run"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reports", nargs="+", help="what pytest's --junitxml wrote, in one or several runs")
    main(parser.parse_args().reports)
