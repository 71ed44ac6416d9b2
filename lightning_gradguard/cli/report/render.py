"""A report as HTML, Markdown or JSON."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from lightning_gradguard.cli.report.content import MAX_LISTED, RunReport
from lightning_gradguard.tensorboard_plugin.assets import compressed, plotly_path
from lightning_gradguard.wording import counted

MAX_RUNS = 20
"""Runs that are told at length; a table has all."""

_TEMPLATES = Path(__file__).parent / "templates"


def to_html(reports: Sequence[RunReport], title: str) -> str:
    """One self-contained file. The plots are left out where plotly is not installed, and the file says so."""
    shown = at_length(reports)
    library = plotly_path()
    packed = ""
    figures: dict[str, str] = {}
    if library is not None and any(report.series for report in shown):
        # As it is, the library is 4.8 MB, and would be most of the file; compressed it is a third of that.
        packed = base64.b64encode(compressed(library)).decode()
        figures = _figures(shown)
    return _render("report.html.jinja", reports, shown, title, plotly=packed, figures=figures, has_plots=library is not None)


def to_markdown(reports: Sequence[RunReport], title: str) -> str:
    """The same in words and tables."""
    return _render("report.md.jinja", reports, at_length(reports), title)


def to_json(reports: Sequence[RunReport]) -> str:
    """The same for scripts: strict JSON, a list of runs."""
    return json.dumps([report.to_dict() for report in reports], allow_nan=False, indent=1)


def at_length(reports: Sequence[RunReport]) -> list[RunReport]:
    """The runs that are told at length: of many, those with alerts first."""
    if len(reports) <= MAX_RUNS:
        return list(reports)
    return sorted(reports, key=lambda report: not report.alerts)[:MAX_RUNS]


def _figures(reports: Sequence[RunReport]) -> dict[str, str]:
    from lightning_gradguard.cli.report.figures import flow_of, norms_of  # noqa: PLC0415 - needs plotly

    figures = {}
    for number, report in enumerate(reports):
        if report.optimizer is None or not len((series := report.series[report.optimizer]).snapshot().steps):
            continue
        figures[f"norms-{number}"] = norms_of(report, series).to_json()
        figures[f"flow-{number}"] = flow_of(report, series, len(reports)).to_json()
    # A script in HTML ends at the first "</script", wherever it stands.
    return {name: text.replace("<", "\\u003c") for name, text in figures.items()}


def _render(template: str, reports: Sequence[RunReport], shown: Sequence[RunReport], title: str, **more: Any) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=jinja2.select_autoescape(["html.jinja"]),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": _number, "spans": _spans, "cell": _cell, "ranges": ranges, "counted": counted}
    return environment.get_template(template).render(
        title=title, reports=reports, shown=shown, max_listed=MAX_LISTED, **more
    )


def _number(value: Any) -> str:
    """Four digits; NaN and infinity as they are."""
    number = float(value)
    return f"{number:.4g}" if math.isfinite(number) else str(number)


def _spans(text: str) -> list[tuple[bool, str]]:
    """A sentence with `code` in it, as pairs: whether it is code, and the text."""
    return [(index % 2 == 1, part) for index, part in enumerate(str(text).split("`"))]


def _cell(text: Any) -> str:
    """A text in a table of Markdown: one line, and nothing that becomes markup."""
    line = " ".join(str(text).split())
    for character, escaped in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ("|", "&#124;"), ("[", "&#91;")):
        line = line.replace(character, escaped)
    return line


def ranges(steps: Sequence[int], most: int = 100) -> str:
    """Numbers in ascending order, neighbours joined.

    >>> ranges([3, 4, 5, 9])
    '3-5, 9'
    """
    joined: list[list[int]] = []
    for step in steps:
        if joined and step == joined[-1][1] + 1:
            joined[-1][1] = step
        else:
            joined.append([step, step])
    texts = [f"{first:,}" if first == last else f"{first:,}-{last:,}" for first, last in joined[:most]]
    more = f" and {counted(len(joined) - most, 'more stretch', 'more stretches')}" if len(joined) > most else ""
    return ", ".join(texts) + more
