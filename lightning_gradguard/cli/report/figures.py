"""The plots of a report: the norm with its limit and what happened, and the flow through the modules."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from plotly import graph_objects as go
from plotly.subplots import make_subplots

from lightning_gradguard.cli.report.content import RunReport
from lightning_gradguard.layout import Floats
from lightning_gradguard.tensorboard_plugin import views
from lightning_gradguard.tensorboard_plugin.data import Series, Snapshot
from lightning_gradguard.tensorboard_plugin.wire import CODES_PER_DECADE, INFINITE, NAN, NO_GRADIENT, ZERO, is_finite_code

MAX_ROWS = 80
MAX_CELLS = 60_000
_INK, _GRID = "#76808f", "rgba(128, 128, 128, 0.25)"
_BLUE, _OCHRE, _ORANGE = "#1f77c9", "#b8860b", "#d55e00"
_MARKS = {
    "nonfinite": ("x", "#a0328c"),
    "explosion": ("triangle-up", "#d55e00"),
    "vanishing": ("triangle-down", "#0072b2"),
    "overflow": ("diamond", "#8a7a00"),
    "rollback": ("triangle-left", "#00795c"),
    "skip": ("square", "#76808f"),
    "resume": ("star", "#4a9ad4"),
}
_OTHER = ("circle", "#76808f")
_SPECIAL = {
    NO_GRADIENT: ("no gradient", "#d9dce1"),
    ZERO: ("0 (or below 1e-22)", "#8f959c"),
    INFINITE: ("Inf", "#e66100"),
    NAN: ("NaN", "#ff2fbf"),
}
_CURVES = (
    ("loss", "loss", "log"),
    ("learning_rate", "learning<br>rate", "linear"),
    ("update_ratio", "update /<br>weight", "log"),
    ("weight_norm", "weight<br>norm", "linear"),
)


def norms_of(report: RunReport, series: Series) -> go.Figure:
    """Norm before and after clipping with its limit and what happened; below it what else is known of each step."""
    snapshot = series.snapshot()
    data = views.norms(snapshot, report.alerts)
    curves = {name: _floats(data[name]) for name in ("global_norm", "clipped_norm", "explosion_limit")}
    below = [(name, title, kind) for name, title, kind in _CURVES if np.isfinite(_floats(data[name])).any()]
    for_marks = 0.08 if data["marks"] else 0.005
    heights = [for_marks, 1.0 - for_marks - 0.14 * len(below), *(0.14 for _ in below)]
    figure = make_subplots(rows=2 + len(below), cols=1, shared_xaxes=True, vertical_spacing=0.02, row_heights=heights)
    styles = (
        ("global_norm", "global norm", {"color": _BLUE, "width": 2}),
        ("clipped_norm", "after clipping", {"color": _OCHRE, "dash": "dot"}),
        ("explosion_limit", "explosion limit", {"color": _ORANGE, "dash": "dash"}),
    )
    steps = np.asarray(data["steps"])
    for name, title, line in styles:
        figure.add_scatter(x=steps, y=curves[name], name=title, line=line, mode=_mode(steps), row=2, col=1)
    for mark in _marks(data["marks"]):
        figure.add_trace(mark, row=1, col=1)
    for row, (name, title, kind) in enumerate(below, 3):
        values = _floats(data[name])
        line = {"color": _INK, "width": 1.5}
        figure.add_scatter(
            x=steps,
            y=values,
            name=title.replace("<br>", " "),
            line=line,
            mode=_mode(steps),
            showlegend=False,
            connectgaps=name != "loss",
            row=row,
            col=1,
        )
        is_log = kind == "log" and bool(np.all(values[np.isfinite(values)] > 0))
        scale = _log_axis(values, 3) if is_log else {"nticks": 4, "rangemode": "tozero"}
        figure.update_yaxes(title_text=title, row=row, col=1, **scale)
    figure.update_yaxes(visible=False, range=[0, 1], row=1, col=1)
    figure.update_yaxes(title_text="gradient norm", row=2, col=1, **_log_axis(np.concatenate([*curves.values()]), 8))
    figure.update_xaxes(title_text="step", tickformat=",d", row=2 + len(below), col=1)
    return _styled(figure, height=380 + 90 * len(below))


def flow_of(report: RunReport, series: Series, num_runs: int = 1) -> go.Figure:
    """Norm of modules and parameters by step; modules are unfolded as far as there is room.

    Args:
        report: of the run.
        series: of the optimizer.
        num_runs: runs in the same file, which share its size.
    """
    snapshot = series.snapshot()
    nodes = unfolded(snapshot, MAX_ROWS if num_runs == 1 else MAX_ROWS // 2)
    width = max(MAX_CELLS // (len(nodes) * num_runs), 50)
    data = views.flow(snapshot, report.alerts, nodes, max_columns=width)
    codes = np.frombuffer(base64.b64decode(data["largest"]), dtype="<i2").reshape(len(nodes), -1)
    names = [_label(snapshot, node) for node in nodes]
    values = np.where(is_finite_code(codes), codes / CODES_PER_DECADE, np.nan).astype(np.float32)
    common = {"x": np.asarray(data["edges"]), "y": list(range(len(nodes))), "customdata": None}
    figure = go.Figure()
    figure.add_heatmap(
        **common,
        z=values,
        colorscale="Viridis",
        zmin=data["range"][0],
        zmax=max(data["range"][1], data["range"][0] + 0.1),
        colorbar={"title": "norm", "tickprefix": "10<sup>", "ticksuffix": "</sup>", "thickness": 12, "tickformat": ".2~f"},
        hovertemplate="%{y}, step %{x:,}: norm 10^%{z:.2f}<extra></extra>",
    )
    for code, (text, colour) in _SPECIAL.items():
        if (codes == code).any():
            cells = np.where(codes == code, 1.0, np.nan).astype(np.float32)
            scale = [[0, colour], [1, colour]]
            hover = f"%{{y}}, step %{{x:,}}: {text}<extra></extra>"
            figure.add_heatmap(**common, z=cells, colorscale=scale, showscale=False, hovertemplate=hover)
            figure.add_scatter(
                x=[None], y=[None], mode="markers", name=text, marker={"symbol": "square", "size": 10, "color": colour}
            )
    ticks = {"tickmode": "array", "tickvals": list(range(len(nodes))), "ticktext": names}
    figure.update_yaxes(**ticks, autorange="reversed", automargin=True)
    figure.update_xaxes(title_text="step", tickformat=",d")
    return _styled(figure, height=120 + max(16 * len(nodes), 120))


def unfolded(snapshot: Snapshot, most: int) -> list[int]:
    """The nodes of the tree that are shown: level by level, as long as there are not too many."""
    tree = snapshot.tree
    for depth in range(int(tree.depths.max(initial=0)), -1, -1):
        nodes = [int(node) for node in np.flatnonzero(tree.depths <= depth)]
        if len(nodes) <= most:
            return nodes
    return [int(node) for node in np.flatnonzero(tree.depths == 0)[:most]]


def _label(snapshot: Snapshot, node: int) -> str:
    path = snapshot.tree.paths[node]
    short = path if len(path) <= 48 else f"{path[:20]}...{path[-25:]}"
    return short.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _marks(marks: Sequence[dict[str, Any]]) -> list[go.Scatter]:
    kinds = dict.fromkeys(str(mark["kind"]) for mark in marks)
    found = []
    for index, kind in enumerate(kinds):
        symbol, colour = _MARKS.get(kind, _OTHER)
        x = [mark["x"] for mark in marks if mark["kind"] == kind]
        name = kind.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
        y = [1 - (index + 0.5) / len(kinds)] * len(x)
        marker = {"symbol": symbol, "size": 9, "color": colour}
        hover = f"step %{{x:,}}: {name}<extra></extra>"
        found.append(go.Scatter(x=x, y=y, mode="markers", name=name, marker=marker, hovertemplate=hover))
    return found


def _log_axis(values: Floats, num_ticks: int) -> dict[str, Any]:
    """A logarithmic axis. Over several decades it says each of them once; over less, numbers between, written out (of a bare
    5 nobody knows the decade), and over much less there are no round ones but in even steps.
    """
    usable = values[np.isfinite(values) & (values > 0)].astype(np.float64)
    span = float(np.ptp(np.log10(usable))) if len(usable) else 0.0
    if span > 1.5:
        return {"type": "log", "dtick": math.ceil(span / num_ticks)}
    if span > 0.7 or span == 0.0:
        return {"type": "log", "dtick": "D2", "tickformat": "~g"}
    return {"type": "log", "dtick": f"L{_round_step(float(np.ptp(usable)) / min(num_ticks, 4)):g}", "tickformat": "~g"}


def _round_step(step: float) -> float:
    """The next larger of 1, 2 or 5 times a power of ten.

    >>> _round_step(0.3), _round_step(7.0)
    (0.5, 10.0)
    """
    power = 10.0 ** math.floor(math.log10(step))
    return next(factor for factor in (1.0, 2.0, 5.0, 10.0) if factor * power >= step) * power


def _mode(steps: Floats) -> str:
    return "lines" if len(steps) > 1 else "markers"


def _floats(values: Sequence[float | str]) -> Floats:
    """Numbers of which the ones that are not finite go by name; gaps in their place."""
    numbers = np.array([float(value) for value in values], dtype=np.float32)
    return np.where(np.isfinite(numbers), numbers, np.nan)


def _styled(figure: go.Figure, *, height: int) -> go.Figure:
    clear = "rgba(0,0,0,0)"
    figure.update_layout(
        template="none",
        height=height,
        paper_bgcolor=clear,
        plot_bgcolor=clear,
        font={"color": _INK, "size": 12},
        margin={"l": 70, "r": 20, "t": 40, "b": 45},
        legend={"orientation": "h", "x": 0, "y": 1, "yref": "container", "yanchor": "top"},
    )
    figure.update_xaxes(gridcolor=_GRID, linecolor=_GRID, zeroline=False)
    figure.update_yaxes(gridcolor=_GRID, linecolor=_GRID, zeroline=False, exponentformat="power", title_font_size=11)
    return figure
