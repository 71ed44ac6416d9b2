"""Numbers and their nouns agree in all that people read."""

from __future__ import annotations

import re
from pathlib import Path

import lightning_gradguard

ROOT = Path(lightning_gradguard.__file__).parents[1]
NOUNS = (
    *("alerts", "batches", "bytes", "cells", "characters", "columns", "dimensions", "elements", "errors", "events", "files"),
    *(
        "gradients",
        "histograms",
        "layers",
        "lines",
        "modules",
        "optimizers",
        "parameters",
        "points",
        "ranks",
        "rows",
        "runs",
    ),
    *("runs", "samples", "snapshots", "steps", "tensors", "values"),
)
SAID = re.compile(rf"\}}+ (?:(?:logged|measured|more|other) )?(?:{'|'.join(NOUNS)})\b")
"""A plural after a value that is put into a text, as `{number} alerts`."""
NEVER_ONE = (
    # what is before it is no number
    ("forensics/nonfinite/wording.py", "{begin} rows"),
    # nothing is said of one layer
    ("forensics/flow", "layers"),
    # a number of it, of which there are more than that
    ("report.html.jinja", "{{ report.series|length }} optimizers"),
    ("jinja", '{{ "{:,}".format(reports|length) }} runs'),
    # numbers of it in the examples are constants
    ("examples", "_steps} steps"),
    ("examples", "_steps} of {max_steps} steps"),
    ("json_lines.py", "_BYTES:,} bytes"),
    # with one rank there is no such sentence
    ("flow/report.py", "{num_ranks} ranks"),
    # one gradient, and others
    ("nonfinite.py", "more of {"),
    # says it otherwise where it is one
    ("index.js", "this.numOthers === 1 ?"),
)


def test_no_plural_follows_a_number_that_may_be_one():
    """`counted` says both; what can't be one is listed above."""
    sources = [
        *(path for ending in ("py", "jinja", "js") for path in (ROOT / "lightning_gradguard").rglob(f"*.{ending}")),
        *(ROOT / "examples").glob("*.py"),
    ]
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in sources
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if SAID.search(line) and not any(part in str(path) and text in line for part, text in NEVER_ONE)
    ]
    assert found == []
