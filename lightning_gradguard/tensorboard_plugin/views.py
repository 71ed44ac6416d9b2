"""What each view of the tab is sent: downsampled so that it stays small, and so that nothing that matters is lost.

Heat map: logged steps are drawn together in columns of equal count, and each cell is sent as the largest and the smallest
norm of its column, where NaN is larger than Inf is larger than any number, so that no spike, hole or damage can fall between
two columns. Curves: of each stretch of steps those where one of the curves is largest or smallest are sent, with the steps
that were skipped or have an alert, up to `MAX_POINTS` in all. Alerts are sent in pages, and counted in full.
"""

from __future__ import annotations

import base64
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_gradguard.layout import Floats, Ints
from lightning_gradguard.tensorboard_plugin.data import Snapshot
from lightning_gradguard.tensorboard_plugin.wire import CODES_PER_DECADE, Codes, is_finite_code

MAX_COLUMNS = 500
MAX_CELLS = 250_000
MAX_POINTS = 4_000
MAX_SAMPLES = 200
"""Steps that medians and quantiles are computed from."""
MAX_HISTOGRAMS = 200
ALERTS_PER_PAGE = 100
_MAX_NAMED = 50
_FEW_ROWS = 200
_ROOM = 0.7 * CODES_PER_DECADE

Alert = Mapping[str, Any]


def layout(snapshot: Snapshot) -> dict[str, Any]:
    """The tree of modules and parameters."""
    tree = snapshot.tree
    leaves = tree.parameters.clip(0)
    return {
        "labels": tree.labels,
        "paths": tree.paths,
        "depths": tree.depths.tolist(),
        "parents": tree.parents.tolist(),
        "parameters": tree.parameters.tolist(),
        "numels": np.where(tree.is_leaf, snapshot.numels[leaves], 0).tolist(),
        "ndims": np.where(tree.is_leaf, snapshot.ndims[leaves], 0).tolist(),
    }


def flow(snapshot: Snapshot, alerts: Iterable[Alert], nodes: Sequence[int]) -> dict[str, Any]:
    """Norms of some nodes over time, with what happened in each column."""
    rows = np.array([node for node in nodes if 0 <= node < len(snapshot.tree.labels)], dtype=np.int64)
    steps = snapshot.steps
    is_few = len(rows) < _FEW_ROWS  # then it is quicker to pick them out first
    bounds = _bounds(len(steps), min(MAX_COLUMNS, MAX_CELLS // max(len(rows), 1)))
    largest, smallest = _reduce(snapshot.codes[:, rows] if is_few else snapshot.codes, bounds)
    if not is_few:
        largest, smallest = largest[:, rows], smallest[:, rows]
    is_exact = len(bounds) - 1 == len(steps)
    sample = largest[:: math.ceil(len(largest) / MAX_SAMPLES) or 1]
    return {
        "nodes": rows.tolist(),
        "edges": _edges(steps, bounds),
        "last": int(steps[-1]) if len(steps) else None,
        "largest": _pack(largest.T),
        "smallest": None if is_exact else _pack(smallest.T),
        "median": np.median(sample, axis=0).tolist() if len(sample) else [],
        "range": _colour_range(largest),
        "marks": _marks(snapshot, alerts, bounds),
    }


def norms(snapshot: Snapshot, alerts: Iterable[Alert]) -> dict[str, Any]:
    """The curves of the whole model."""
    happened = _steps_of(alerts, snapshot.steps) | (snapshot.fact("skipped") > 0)
    chosen = _extremes(snapshot, happened)
    curves = {
        name: _plain(snapshot.fact(name)[chosen]) for name in ("global_norm", "clipped_norm", "explosion_limit", "loss")
    }
    return {
        "steps": snapshot.steps[chosen].tolist(),
        "num_steps": len(snapshot.steps),
        **curves,
        "clip_coef": _plain(snapshot.fact("clip_coef")[chosen]),
        "skipped": snapshot.steps[snapshot.fact("skipped") > 0][-MAX_POINTS:].tolist(),
        "num_skipped": _last(snapshot.fact("num_skipped")),
        "num_clipped": _last(snapshot.fact("num_clipped")),
        "marks": _marks(snapshot, alerts, _bounds(len(snapshot.steps), MAX_COLUMNS)),
    }


def depth(snapshot: Snapshot, step: float | None) -> dict[str, Any]:
    """The norm of each parameter at the logged step next to one, beside what is usual for it."""
    if not len(snapshot.steps):
        return {"step": None}
    index = len(snapshot.steps) - 1 if step is None else int(np.abs(snapshot.steps - step).argmin())
    leaves = np.flatnonzero(snapshot.tree.is_leaf)
    sample = snapshot.codes[:: math.ceil(len(snapshot.steps) / MAX_SAMPLES)][:, leaves]
    quantiles = np.percentile(sample, [10, 50, 90], axis=0).round().astype(np.int16)
    return {
        "step": int(snapshot.steps[index]),
        "first_step": int(snapshot.steps[0]),
        "last_step": int(snapshot.steps[-1]),
        "nodes": leaves.tolist(),
        "codes": _pack(snapshot.codes[index, leaves]),
        "quantiles": [_pack(row) for row in quantiles],
        "global_norm": _plain(snapshot.fact("global_norm")[index : index + 1])[0],
    }


def distribution(
    histograms: Sequence[tuple[int, Floats]], steps: Ints, shares: Floats, bins_per_decade: int = 4
) -> dict[str, Any]:
    """Histograms of one parameter over time on common bins, each as parts of its elements.

    Args:
        histograms: by step, rows of left edge, right edge, count, as TensorBoard keeps them.
        steps: of the shares.
        shares: parts of the elements that are zero, NaN and infinite.
        bins_per_decade: of the common bins.
    """
    placed = [(step, np.rint(rows[:, 0] * bins_per_decade).astype(np.int64), rows[:, 2]) for step, rows in histograms]
    lefts = [left for _, left, _ in placed if len(left)]
    first = min((int(left.min()) for left in lefts), default=0)
    last = max((int(left.max()) for left in lefts), default=-1)
    table = np.zeros((len(placed), last - first + 1))
    for row, (_, left, counts) in enumerate(placed):
        np.add.at(table[row], left - first, counts / max(counts.sum(), 1.0))
    return {
        "steps": [step for step, _, _ in placed],
        "edges": (np.arange(first, last + 2) / bins_per_decade).tolist(),
        "shares": table.round(5).tolist(),
        "apart_steps": steps.tolist(),
        **{name: _plain(shares[:, column]) for column, name in enumerate(("zero", "nan", "inf"))},
    }


def alerts_page(alerts: Sequence[Alert], kind: str | None, offset: int) -> dict[str, Any]:
    """A page of alerts, newest first, and how many there are of each kind."""
    chosen = [alert for alert in reversed(alerts) if kind is None or alert["kind"] == kind]
    page = chosen[max(offset, 0) : max(offset, 0) + ALERTS_PER_PAGE]
    return {
        "kinds": Counter(alert["kind"] for alert in alerts),
        "total": len(chosen),
        "offset": max(offset, 0),
        "page_size": ALERTS_PER_PAGE,
        "alerts": [short(alert) for alert in page],
    }


def short(alert: Alert) -> dict[str, Any]:
    """What a line of the table shows."""
    names = [parameter["name"] for parameter in alert["parameters"]]
    keys = ("id", "x", "step", "epoch", "optimizer", "kind", "action", "time", "value", "limit", "message")
    return {key: alert[key] for key in keys} | {"where": names[0] if names else None, "culprit": alert["culprit"]}


def full(alert: Alert) -> dict[str, Any]:
    """Everything about one alert."""
    return {**alert, "parameters": alert["parameters"][:_MAX_NAMED], "where": short(alert)["where"]}


def _bounds(count: int, most: int) -> Ints:
    """Where each of at most `most` columns begins and ends among the logged steps, [num_columns + 1]."""
    return np.linspace(0, count, min(count, max(most, 1)) + 1).astype(np.int64)


def _reduce(codes: Codes, bounds: Ints) -> tuple[Codes, Codes]:
    """The largest and the smallest of each column, [num_columns, num_nodes]."""
    if len(bounds) - 1 >= len(codes):
        return codes, codes
    # Slice by slice: `reduceat` along the first axis takes twenty times as long.
    parts = [codes[begin:end] for begin, end in pairwise(bounds.tolist())]
    return np.stack([part.max(axis=0) for part in parts]), np.stack([part.min(axis=0) for part in parts])


def _edges(steps: Ints, bounds: Ints) -> list[float]:
    """Left edge of each column, and the right one of the last, which is as wide as is usual."""
    if not len(steps):
        return []
    lefts = steps[bounds[:-1]]
    usual = float(np.median(np.diff(lefts))) if len(lefts) > 1 else 1.0
    end = max(float(lefts[-1]) + max(usual, 1.0), float(steps[-1]) + 1.0)
    return [*lefts.astype(np.float64).tolist(), end]


def _colour_range(codes: Codes) -> list[float]:
    """Decades between which colours differ: what is usual, and at either end room in which an outlier stands out."""
    finite = codes[is_finite_code(codes)]
    if not len(finite):
        return [0.0, 0.0]
    low, high = np.percentile(finite, [2, 98])
    lowest, highest = max(finite.min(), low - _ROOM), min(finite.max(), high + _ROOM)
    return [float(lowest) / CODES_PER_DECADE, float(highest) / CODES_PER_DECADE]


def _marks(snapshot: Snapshot, alerts: Iterable[Alert], bounds: Ints) -> list[dict[str, Any]]:
    """What happened in each column in which something did, under its worst step."""
    if not len(snapshot.steps):
        return []
    edges = snapshot.steps[bounds[:-1]]
    columns: dict[int, dict[str, Any]] = {}

    def column_of(step: float) -> dict[str, Any]:
        column = max(int(np.searchsorted(edges, step, side="right")) - 1, 0)
        return columns.setdefault(
            column, {"column": column, "x": int(step), "alerts": 0, "skips": 0, "kinds": [], "id": None}
        )

    for alert in alerts:
        if snapshot.steps[0] <= alert["x"] <= snapshot.steps[-1]:
            mark = column_of(alert["x"])
            mark["alerts"] += 1
            if mark["id"] is None:
                mark["id"], mark["x"] = alert["id"], alert["x"]
            if alert["kind"] not in mark["kinds"] and len(mark["kinds"]) < 4:
                mark["kinds"].append(alert["kind"])
    for step in snapshot.steps[snapshot.fact("skipped") > 0]:
        column_of(step)["skips"] += 1
    return [columns[column] for column in sorted(columns)]


def _steps_of(alerts: Iterable[Alert], steps: Ints) -> NDArray[np.bool_]:
    return np.isin(steps, [alert["x"] for alert in alerts])


def _extremes(snapshot: Snapshot, happened: NDArray[np.bool_]) -> Ints:
    """Which steps the curves are drawn from: all, or in each stretch the largest and smallest of each curve."""
    count = len(snapshot.steps)
    if count <= MAX_POINTS:
        return np.arange(count)
    reserved = np.flatnonzero(happened)[-MAX_POINTS // 2 :]
    curves = ("global_norm", "clipped_norm", "clip_coef", "explosion_limit")
    bounds = _bounds(count, MAX_POINTS // (4 * len(curves)))
    chosen = [reserved, [0, count - 1]]
    for name in curves:
        values = snapshot.fact(name)
        order = np.where(np.isnan(values), np.inf, values)
        for begin, end in pairwise(bounds.tolist()):
            part = order[begin:end]
            chosen.append([begin + int(part.argmax()), begin + int(part.argmin())])
    return np.unique(np.concatenate([np.asarray(part, dtype=np.int64) for part in chosen]))


def _pack(codes: Codes) -> str:
    """Sixteen-bit numbers, little-endian, row by row, in base64: a fifth of what JSON would take."""
    return base64.b64encode(np.ascontiguousarray(codes, dtype="<i2").tobytes()).decode()


def _plain(values: Floats) -> list[float | str | None]:
    """As JSON allows it: NaN and infinities by name; six digits."""
    return [float(f"{value:.6g}") if math.isfinite(value) else str(value) for value in values.tolist()]


def _last(values: Floats) -> int:
    return int(values[-1]) if len(values) else 0
