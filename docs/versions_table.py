"""Writes a row of the table in docs/versions.md, from inside the environment whose versions it names.

python docs/versions_table.py NAME report.xml

`nox` calls it after each environment of the matrix; the report is pytest's `--junitxml`. Rows of other environments stay.
"""

from __future__ import annotations

import argparse
import datetime as dt
import platform
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from xml.etree import ElementTree as ET

PAGE = Path(__file__).parent / "versions.md"
PACKAGES = ("torch", "lightning", "pytorch-lightning", "tensorboard", "numpy")
BEGIN, END = "<!-- matrix -->", "<!-- end -->"
HEAD = f"| environment | Python | {' | '.join(PACKAGES)} | tests passed | failed | left out | run on |"


def main(name: str, report: str, page: Path = PAGE) -> None:
    """Write the row."""
    text = page.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    table, after = rest.split(END)
    rows = {row.split("|")[1].strip(): row for row in table.strip().splitlines()[2:]}
    rows[name] = row_of(name, report)
    lines = [HEAD, re.sub(r"[^|]+", "---", HEAD), *rows.values()]
    page.write_text(f"{before}{BEGIN}\n" + "\n".join(lines) + f"\n{END}{after}", encoding="utf-8")


def row_of(name: str, report: str) -> str:
    """What ran here, and what came of it."""
    cases = list(ET.parse(report).iter("testcase"))
    failed = sum(case.find("failure") is not None or case.find("error") is not None for case in cases)
    left_out = sum(case.find("skipped") is not None for case in cases)
    counts = [f"{len(cases) - failed - left_out:,}", f"{failed:,}", f"{left_out:,}"]
    today = dt.datetime.now(tz=dt.timezone.utc).date().isoformat()
    versions = [installed(package) for package in PACKAGES]
    return f"| {' | '.join([name, platform.python_version(), *versions, *counts, today])} |"


def installed(package: str) -> str:
    """Its version; a dash where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "-"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name")
    parser.add_argument("report")
    chosen = parser.parse_args()
    main(chosen.name, chosen.report)
