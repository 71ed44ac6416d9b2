"""Where a run is read, and the steps of one of its optimizers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray
from tensorboard.data.provider import DataProvider, RunTagFilter, TensorDatum

from lightning_gradguard.layout import Bools, Floats, Ints
from lightning_gradguard.tensorboard_plugin.tree import Tree
from lightning_gradguard.tensorboard_plugin.wire import (
    EVENTS_PER_TAG,
    FACTS,
    NO_GRADIENT,
    NUM_FIRST_FACTS,
    PLUGIN_NAME,
    Bins,
    Codes,
    Tag,
    unpack_bins,
)

_SCALAR = TypeVar("_SCALAR", bound=np.generic)


@dataclass(frozen=True)
class Source:
    """Where a run is read.

    Attributes:
        provider: TensorBoard's.
        context: of the request.
        experiment: its id.
        run: the run's name.
    """

    provider: DataProvider
    context: Any
    experiment: str
    run: str

    def tags(self) -> dict[Tag, float]:
        """The tab's tags, each with the time of its last event."""
        listed = self.provider.list_tensors(
            self.context,
            experiment_id=self.experiment,
            plugin_name=PLUGIN_NAME,
            run_tag_filter=RunTagFilter(runs=[self.run]),
        )
        parsed = ((Tag.parse(tag), series.max_wall_time) for tag, series in listed.get(self.run, {}).items())
        return {tag: written for tag, written in parsed if tag is not None}

    def read(self, tags: Sequence[str], plugin: str = PLUGIN_NAME, at_most: int = EVENTS_PER_TAG) -> Mapping[str, Any]:
        """The events of some tags, oldest first."""
        found = self.provider.read_tensors(
            self.context,
            experiment_id=self.experiment,
            plugin_name=plugin,
            run_tag_filter=RunTagFilter(runs=[self.run], tags=list(tags)),
            # At exactly as many as there are, the Python loader would leave one out.
            downsample=at_most + 1,
        )
        series: Mapping[str, Any] = found.get(self.run, {})
        return series


class Rows(Generic[_SCALAR]):
    """An array that grows by rows, without being copied at each.

    Args:
        width: columns; 0: one number a row.
        dtype: of its numbers.
    """

    def __init__(self, width: int, dtype: type[_SCALAR]) -> None:
        self._rows = np.empty((64, width) if width else 64, dtype=dtype)
        self._count = 0

    def append(self, rows: NDArray[Any]) -> None:
        """Add rows."""
        needed = self._count + len(rows)
        if needed > len(self._rows):
            larger = np.empty((max(needed, 2 * len(self._rows)), *self._rows.shape[1:]), dtype=self._rows.dtype)
            larger[: self._count] = self._rows[: self._count]
            self._rows = larger
        self._rows[self._count : needed] = rows
        self._count = needed

    @property
    def all(self) -> NDArray[_SCALAR]:
        """The rows so far; a view."""
        rows: NDArray[_SCALAR] = self._rows[: self._count]
        return rows


@dataclass(frozen=True, eq=False)
class Snapshot:
    """The steps of one optimizer.

    Attributes:
        tree: its parameters and modules.
        numels: elements of each parameter.
        ndims: dimensions of each parameter.
        steps: x values, ascending, [num_steps].
        facts: [num_steps, len(FACTS)].
        codes: norm of each node of the tree, [num_steps, num_nodes].
        resumes: x values at which a run was taken up again.
    """

    tree: Tree
    numels: Ints
    ndims: Ints
    steps: Ints
    facts: Floats
    codes: Codes
    resumes: tuple[int, ...] = ()

    def fact(self, name: str) -> Floats:
        """One column of the facts."""
        column: Floats = self.facts[:, FACTS.index(name)]
        return column

    def between(self, first: float | None, last: float | None) -> Snapshot:
        """The steps of a range, ends included."""
        begin = 0 if first is None else int(np.searchsorted(self.steps, first, side="left"))
        end = len(self.steps) if last is None else int(np.searchsorted(self.steps, last, side="right"))
        part = slice(begin, end)
        return replace(self, steps=self.steps[part], facts=self.facts[part], codes=self.codes[part])


class Series:
    """What has been read of one optimizer.

    Args:
        layouts: names and sizes of the parameters that were watched, by session and number, oldest first.
    """

    def __init__(self, layouts: Mapping[tuple[str, int], Mapping[str, Any]]) -> None:
        sizes: dict[str, tuple[int, int]] = {}
        for layout in reversed(list(layouts.values())):  # the newest first, so that its order is the one shown
            for name, numel, ndim in zip(layout["names"], layout["numels"], layout["ndims"], strict=True):
                sizes.setdefault(name, (numel, ndim))
        self.settings: Mapping[str, str] = next(
            (layout["settings"] for layout in reversed(list(layouts.values())) if layout.get("settings")), {}
        )
        """Of the guard, in words; empty where the writer was not told."""
        index = {name: number for number, name in enumerate(sizes)}
        self.layout_key = f"{len(layouts)}-{max(layouts)[0]}"
        """Is another when the tree is."""
        self.names = tuple(sizes)
        self.tree = Tree.of(self.names)
        self._numels = np.array([numel for numel, _ in sizes.values()], dtype=np.int64)
        self._ndims = np.array([ndim for _, ndim in sizes.values()], dtype=np.int64)
        self._columns = {key: np.array([index[name] for name in layout["names"]]) for key, layout in layouts.items()}
        self._sessions: list[str] = []
        self._first_steps: list[int] = []
        self._session = Rows(0, np.int64)
        self._steps = Rows(0, np.int64)
        self._facts = Rows(len(FACTS), np.float64)
        self._codes = Rows(len(self.tree.labels), np.int16)
        self._bins: list[tuple[int, int, Bins]] = []
        self._snapshot: Snapshot | None = None

    def add(self, tag: Tag, facts: Sequence[TensorDatum], norms: Sequence[TensorDatum]) -> None:
        """Take events that the two tags of a chunk have in common. What doesn't fit the layout is left out."""
        columns = self._columns[tag.session, tag.layout]
        pairs = [
            (fact.step, padded, norm.numpy)
            for fact, norm in zip(facts, norms, strict=False)
            if (padded := padded_facts(fact.numpy)) is not None and norm.numpy.shape == columns.shape
        ]
        if not pairs:
            return
        steps, rows, values = (np.array(part) for part in zip(*pairs, strict=True))
        codes = np.full((len(values), len(self.names)), NO_GRADIENT, dtype=np.int16)
        codes[:, columns] = values
        self._session.append(np.full(len(steps), self._number(tag.session, int(steps[0]))))
        self._steps.append(steps)
        self._facts.append(rows)
        self._codes.append(self.tree.codes(codes))
        self._snapshot = None

    def add_bins(self, tag: Tag, events: Sequence[TensorDatum]) -> None:
        """Take histograms. What can't be read, or doesn't fit the layout, is left out."""
        columns = self._columns[tag.session, tag.layout]
        for event in events:
            try:
                bins = unpack_bins(event.numpy)
            except (ValueError, TypeError):
                continue
            if len(bins.shares) == len(columns):
                shares = np.full((len(self.names), bins.shares.shape[1]), np.nan)
                shares[columns] = bins.shares
                self._bins.append((self._number(tag.session, event.step), event.step, bins._replace(shares=shares)))

    def snapshot(self) -> Snapshot:
        """The steps so far, without those that a resumed run has taken again."""
        if self._snapshot is None:
            keep = is_current(self._session.all, self._steps.all, self._first_steps)
            part = slice(None) if keep.all() else np.flatnonzero(keep)  # a view, where nothing is left out
            steps, facts, codes = self._steps.all[part], self._facts.all[part], self._codes.all[part]
            resumes = tuple(self._first_steps[1:])
            self._snapshot = Snapshot(self.tree, self._numels, self._ndims, steps, facts, codes, resumes)
        return self._snapshot

    def histograms(self, parameter: int) -> list[tuple[int, Bins]]:
        """Step and histogram of one parameter, [1, 3 + num_bins], wherever it had a gradient."""
        kept = [(step, bins) for session, step, bins in self._bins if self._keeps(session, step)]
        rows = [(step, bins._replace(shares=bins.shares[parameter : parameter + 1])) for step, bins in kept]
        return [(step, bins) for step, bins in rows if not np.isnan(bins.shares).all()]

    def _number(self, session: str, step: int) -> int:
        if session not in self._sessions:
            self._sessions.append(session)
            self._first_steps.append(step)
        return self._sessions.index(session)

    def _keeps(self, session: int, step: int) -> bool:
        return all(step < first for first in self._first_steps[session + 1 :])


def is_current(sessions: Ints, steps: Ints, first_steps: Sequence[int]) -> Bools:
    """Which steps are still true: those of a session that no later one has begun at or before.

    Args:
        sessions: of each step, its number in the order of time.
        steps: their x values.
        first_steps: of each session.
    """
    ends = [min(first_steps[index + 1 :], default=np.iinfo(np.int64).max) for index in range(len(first_steps))]
    current: Bools = steps < np.array(ends, dtype=np.int64)[sessions] if ends else np.ones(0, dtype=np.bool_)
    return current


def padded_facts(given: NDArray[Any]) -> Floats | None:
    """The facts of one event, NaN where an earlier version had none; None if they are none."""
    if given.dtype != np.float64 or given.ndim != 1 or not NUM_FIRST_FACTS <= len(given) <= len(FACTS):
        return None
    facts = np.full(len(FACTS), np.nan)
    facts[: len(given)] = given
    return facts
