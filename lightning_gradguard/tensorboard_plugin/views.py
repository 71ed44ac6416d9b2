"""What each view of the tab is sent: downsampled so that it stays small, and so that nothing that matters is lost.

Heat map: logged steps are drawn together in columns of equal count, and each cell is sent as the largest and the smallest
norm of its column, where NaN is larger than Inf is larger than any number, so that no spike, hole or damage can fall between
two columns. Curves: of each stretch of steps those where one of the curves is largest or smallest are sent, with the steps
that were skipped or have an alert, up to `MAX_POINTS` in all. Alerts are sent in pages, and counted in full.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_gradguard.layout import Floats, Ints
from lightning_gradguard.tensorboard_plugin.alerts import Alert
from lightning_gradguard.tensorboard_plugin.data import Snapshot
from lightning_gradguard.tensorboard_plugin.wire import CODES_PER_DECADE, INFINITE, NAN, Bins, Codes, is_finite_code

MAX_COLUMNS = 500
MAX_CELLS = 250_000
MAX_POINTS = 4_000
MAX_SAMPLES = 200
"""Steps that medians and quantiles are computed from."""
MAX_HISTOGRAMS = 200
_FEW_ROWS = 200
_ROOM = 0.7 * CODES_PER_DECADE


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


def flow(
    snapshot: Snapshot, alerts: Iterable[Alert], nodes: Sequence[int], max_columns: int = MAX_COLUMNS
) -> dict[str, Any]:
    """Norms of some nodes over time, with what happened in each column."""
    rows = np.array([node for node in nodes if 0 <= node < len(snapshot.tree.labels)], dtype=np.int64)
    steps = snapshot.steps
    is_few = len(rows) < _FEW_ROWS  # then it is quicker to pick them out first
    bounds = _bounds(len(steps), min(max_columns, MAX_CELLS // max(len(rows), 1)))
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
        "median": _median(sample),
        "range": _colour_range(largest),
        "marks": _marks(snapshot, alerts, bounds),
    }


def norms(snapshot: Snapshot, alerts: Iterable[Alert]) -> dict[str, Any]:
    """The curves of the whole model."""
    happened = _steps_of(alerts, snapshot.steps) | (snapshot.fact("skipped") > 0)
    leading = ("global_norm", "clipped_norm", "clip_coef", "explosion_limit")
    chosen = extremes([snapshot.fact(name) for name in leading], happened)
    curves = {
        name: plain(snapshot.fact(name)[chosen])
        for name in (
            *("global_norm", "clipped_norm", "explosion_limit", "clip_coef", "loss"),
            *("learning_rate", "weight_norm", "update_ratio"),
        )
    }
    return {
        "steps": snapshot.steps[chosen].tolist(),
        "num_steps": len(snapshot.steps),
        **curves,
        "clipped_so_far": plain(snapshot.fact("num_clipped")[chosen]),
        "skipped_so_far": plain(snapshot.fact("num_skipped")[chosen]),
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
    # Values that were there: between a number and "no gradient" or "NaN" there is none.
    quantiles = np.percentile(sample, [10, 50, 90], axis=0, method="inverted_cdf").astype(np.int16)
    return {
        "step": int(snapshot.steps[index]),
        "first_step": int(snapshot.steps[0]),
        "last_step": int(snapshot.steps[-1]),
        "nodes": leaves.tolist(),
        "codes": _pack(snapshot.codes[index, leaves]),
        "quantiles": [_pack(row) for row in quantiles],
        "global_norm": plain(snapshot.fact("global_norm")[index : index + 1])[0],
    }


def distribution(histograms: Sequence[tuple[int, Bins]], snapshot: Snapshot, parameter: int) -> dict[str, Any]:
    """Histograms of one parameter over time on common bins, each as parts of its elements, and where it was damaged.

    Args:
        histograms: as `Series.histograms` gives them.
        snapshot: the steps of the whole run.
        parameter: its index.
    """
    chosen = histograms[:: math.ceil(len(histograms) / MAX_HISTOGRAMS) or 1]
    # A run that was taken up again by another version may have bins of another width: the widest hold them all.
    per_decade = min((bins.per_decade for _, bins in chosen), default=1)
    placed = [_placed(bins, per_decade) for _, bins in chosen]
    full = np.concatenate([where for where, _ in placed]) if placed else np.zeros(0, dtype=np.int64)
    begin, end = (int(full.min()), int(full.max()) + 1) if len(full) else (0, 0)
    table = np.zeros((len(chosen), end - begin))
    for row, (where, shares) in zip(table, placed, strict=True):
        np.add.at(row, where - begin, shares)
    apart = np.array([bins.shares[0, :3] for _, bins in chosen]).reshape(-1, 3)
    codes = snapshot.codes[:, np.flatnonzero(snapshot.tree.parameters == parameter)[0]]
    return {
        "steps": [step for step, _ in chosen],
        "num_histograms": len(histograms),
        "num_clipped": sum(bins.clipped for _, bins in histograms),
        # Whether a row holds what lies beyond it, too: of this parameter, since the bins are those of all.
        "is_open": [
            any(bins.is_open[end] and bins.shares[0, column] > 0 for _, bins in chosen) for end, column in ((0, 3), (1, -1))
        ],
        "edges": (np.arange(begin, end + 1) / per_decade).tolist(),
        "shares": table.round(5).tolist(),
        **{name: plain(apart[:, column]) for column, name in enumerate(("zero", "nan", "inf"))},
        "nan_steps": snapshot.steps[codes == NAN][-MAX_POINTS:].tolist(),
        "inf_steps": snapshot.steps[codes == INFINITE][-MAX_POINTS:].tolist(),
        "num_steps": len(snapshot.steps),
        "first_step": int(snapshot.steps[0]) if len(snapshot.steps) else None,
        "last_step": int(snapshot.steps[-1]) if len(snapshot.steps) else None,
    }


def _placed(bins: Bins, per_decade: int) -> tuple[Ints, Floats]:
    """Which bins of that width one histogram has elements in, and their shares."""
    shares = bins.shares[0, 3:]
    full = np.flatnonzero(shares)
    return np.floor((bins.first + full) * per_decade / bins.per_decade).astype(np.int64), shares[full]


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


def _median(codes: Codes) -> list[int]:
    """Of each column the median of what was there: between a number and "no gradient" there is none."""
    return np.percentile(codes, 50, axis=0, method="inverted_cdf").astype(int).tolist() if len(codes) else []


def _colour_range(codes: Codes) -> list[float]:
    """Decades between which colours differ: what is usual, and at either end room in which an outlier stands out."""
    finite = codes[is_finite_code(codes)]
    if not len(finite):
        return [0.0, 0.0]
    low, high = np.percentile(finite, [2, 98])
    lowest, highest = max(finite.min(), low - _ROOM), min(finite.max(), high + _ROOM)
    return [float(lowest) / CODES_PER_DECADE, float(highest) / CODES_PER_DECADE]


def _marks(snapshot: Snapshot, alerts: Iterable[Alert], bounds: Ints) -> list[dict[str, Any]]:
    """What happened in each column in which something did, one entry a kind, under its first step.

    Alerts of all optimizers are marked, so that none is missed in the view of another. Beside the kinds of alerts there are
    "skip" and "resume".
    """
    if not len(snapshot.steps):
        return []
    edges = snapshot.steps[bounds[:-1]]
    marks: dict[tuple[int, str], dict[str, Any]] = {}

    def add(step: float, kind: str, alert: Alert | None = None) -> None:
        if not snapshot.steps[0] <= step <= snapshot.steps[-1]:
            return
        column = max(int(np.searchsorted(edges, step, side="right")) - 1, 0)
        mark = marks.setdefault(
            (column, kind), {"column": column, "x": int(step), "kind": kind, "count": 0, "optimizers": []}
        )
        mark["count"] += 1
        if alert is not None:
            mark.setdefault("id", alert["id"])
            if alert["optimizer"] not in mark["optimizers"]:
                mark["optimizers"].append(alert["optimizer"])

    for alert in alerts:
        add(alert["x"], alert["kind"], alert)
    for step in snapshot.steps[snapshot.fact("skipped") > 0]:
        add(step, "skip")
    for step in snapshot.resumes:
        add(step, "resume")
    return [marks[key] for key in sorted(marks)]


def _steps_of(alerts: Iterable[Alert], steps: Ints) -> NDArray[np.bool_]:
    return np.isin(steps, [alert["x"] for alert in alerts])


def extremes(curves: Sequence[Floats], happened: NDArray[np.bool_], most: int = MAX_POINTS) -> Ints:
    """Which steps curves are drawn from: all, or in each stretch the largest and smallest of each curve.

    Args:
        curves: [num_steps] each.
        happened: which steps are kept in any case, as far as they are half of `most`.
        most: number of steps at most.
    """
    count = len(happened)
    if count <= most:
        return np.arange(count)
    reserved = np.flatnonzero(happened)[-most // 2 :]
    bounds = _bounds(count, most // (4 * len(curves)))
    chosen = [reserved, [0, count - 1]]
    for values in curves:
        order = np.where(np.isnan(values), np.inf, values)
        for begin, end in pairwise(bounds.tolist()):
            part = order[begin:end]
            chosen.append([begin + int(part.argmax()), begin + int(part.argmin())])
    return np.unique(np.concatenate([np.asarray(part, dtype=np.int64) for part in chosen]))


def _pack(codes: Codes) -> str:
    """Sixteen-bit numbers, little-endian, row by row, in base64: a fifth of what JSON would take."""
    return base64.b64encode(np.ascontiguousarray(codes, dtype="<i2").tobytes()).decode()


def plain(values: Floats) -> list[float | str | None]:
    """As JSON allows it: NaN and infinities by name; six digits."""
    return [float(f"{value:.6g}") if math.isfinite(value) else str(value) for value in values.tolist()]


def _last(values: Floats) -> int | None:
    """The last of some counts; None where they are not known, as where something else clips after the guard."""
    if not len(values):
        return 0
    return int(values[-1]) if math.isfinite(values[-1]) else None
