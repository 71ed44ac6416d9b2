"""Which parameters the flow shows, and in which order, where someone searches or sorts."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

from lightning_gradguard.layout import Floats, Ints
from lightning_gradguard.tensorboard_plugin.alerts import Alert
from lightning_gradguard.tensorboard_plugin.data import Snapshot
from lightning_gradguard.tensorboard_plugin.wire import CODES_PER_DECADE, Codes, is_finite_code

MAX_ROWS = 1_000
_RECENT = 20
SORTS = ("norm", "change", "alert")


def rows(snapshot: Snapshot, alerts: Iterable[Alert], search: str = "", sort: str = "") -> dict[str, Any]:
    """The parameters whose name matches, in the order asked for.

    Args:
        snapshot: the steps.
        alerts: of the run.
        search: a pattern of names (fnmatch) where it has one of `*?[`, else a part of them in either case.
        sort: "norm": the largest last norm first; "change": the largest change of the last norms from the median first, up
            or down; "alert": in the order in which alerts have named them; anything else: model order.
    """
    paths = snapshot.tree.paths
    leaves = [int(node) for node in np.flatnonzero(snapshot.tree.is_leaf) if matches(paths[node], search)]
    if sort in ("norm", "change") and len(snapshot.steps):
        scores = _scores(snapshot.codes[:, leaves], is_change=sort == "change")
        leaves = [leaves[index] for index in np.argsort(-scores, kind="stable")]
    elif sort == "alert":
        first: dict[str, int] = {}
        for alert in alerts:
            for parameter in alert["parameters"]:
                first.setdefault(parameter["name"], len(first))
        leaves = sorted((leaf for leaf in leaves if paths[leaf] in first), key=lambda leaf: first[paths[leaf]])
    return {"nodes": leaves[:MAX_ROWS], "num_found": len(leaves)}


def matches(name: str, search: str) -> bool:
    """Whether a name is meant.

    >>> matches("net.0.weight", "NET.0"), matches("net.0.weight", "net.*.bias")
    (True, False)
    """
    if any(character in search for character in "*?["):
        return fnmatchcase(name, search)
    return search.casefold() in name.casefold()


def _scores(codes: Codes, *, is_change: bool) -> Floats:
    """Last norms in decades, or how far they are from the median; damage is larger than any number."""
    last: Ints = np.percentile(codes[-_RECENT:], 50, axis=0, method="inverted_cdf").astype(np.int64)
    worst = codes.max(axis=0).astype(np.int64)
    if not is_change:
        return np.where(is_finite_code(worst), last, worst) / CODES_PER_DECADE
    usual: Ints = np.percentile(codes, 50, axis=0, method="inverted_cdf").astype(np.int64)
    return np.abs(np.where(is_finite_code(worst), last, worst) - usual) / CODES_PER_DECADE
