"""A run as the tab knows it, read bit by bit through TensorBoard's data provider."""

from __future__ import annotations

import json
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray
from tensorboard.data.provider import DataProvider, RunTagFilter, TensorDatum

from lightning_gradguard.layout import Bools, Floats, Ints
from lightning_gradguard.tensorboard_plugin.tree import Tree
from lightning_gradguard.tensorboard_plugin.wire import EVENTS_PER_TAG, FACTS, NO_GRADIENT, PLUGIN_NAME, Codes, Tag

_TAGS_PER_READ = 64
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
    """

    tree: Tree
    numels: Ints
    ndims: Ints
    steps: Ints
    facts: Floats
    codes: Codes

    def fact(self, name: str) -> Floats:
        """One column of the facts."""
        column: Floats = self.facts[:, FACTS.index(name)]
        return column

    def between(self, first: float | None, last: float | None) -> Snapshot:
        """The steps of a range, ends included."""
        begin = 0 if first is None else int(np.searchsorted(self.steps, first, side="left"))
        end = len(self.steps) if last is None else int(np.searchsorted(self.steps, last, side="right"))
        part = slice(begin, end)
        return Snapshot(self.tree, self.numels, self.ndims, self.steps[part], self.facts[part], self.codes[part])


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
        self._shares: list[tuple[int, int, Floats]] = []
        self._snapshot: Snapshot | None = None

    def add(self, tag: Tag, facts: Sequence[TensorDatum], norms: Sequence[TensorDatum]) -> None:
        """Take events that the two tags of a chunk have in common. What doesn't fit the layout is left out."""
        columns = self._columns[tag.session, tag.layout]
        pairs = [
            (fact.step, fact.numpy, norm.numpy)
            for fact, norm in zip(facts, norms, strict=False)
            if fact.numpy.shape == (len(FACTS),) and norm.numpy.shape == columns.shape
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

    def add_shares(self, tag: Tag, events: Sequence[TensorDatum]) -> None:
        """Take the shares of elements that have no logarithm."""
        columns = self._columns[tag.session, tag.layout]
        for event in events:
            if event.numpy.shape == (len(columns), 3):
                shares = np.full((len(self.names), 3), np.nan)
                shares[columns] = event.numpy
                self._shares.append((self._number(tag.session, event.step), event.step, shares))

    def snapshot(self) -> Snapshot:
        """The steps so far, without those that a resumed run has taken again."""
        if self._snapshot is None:
            keep = self._is_current(self._session.all, self._steps.all)
            part = slice(None) if keep.all() else np.flatnonzero(keep)  # a view, where nothing is left out
            steps, facts, codes = self._steps.all[part], self._facts.all[part], self._codes.all[part]
            self._snapshot = Snapshot(self.tree, self._numels, self._ndims, steps, facts, codes)
        return self._snapshot

    def shares(self, parameter: int) -> tuple[Ints, Floats]:
        """Steps, and the parts that are zero, NaN and infinite in one parameter, [num_steps, 3]."""
        rows = [(step, shares[parameter]) for session, step, shares in self._shares if self._keeps(session, step)]
        steps = np.array([step for step, _ in rows], dtype=np.int64)
        return steps, np.array([shares for _, shares in rows]).reshape(-1, 3)

    def _number(self, session: str, step: int) -> int:
        if session not in self._sessions:
            self._sessions.append(session)
            self._first_steps.append(step)
        return self._sessions.index(session)

    def _keeps(self, session: int, step: int) -> bool:
        return all(step < first for first in self._first_steps[session + 1 :])

    def _is_current(self, sessions: Ints, steps: Ints) -> Bools:
        ends = [min(self._first_steps[index + 1 :], default=np.iinfo(np.int64).max) for index in range(len(self._sessions))]
        current: Bools = steps < np.array(ends, dtype=np.int64)[sessions] if ends else np.ones(0, dtype=np.bool_)
        return current


class Run:
    """What has been read of one run so far. Take `lock` for whatever is done with it."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.is_complete = False
        """Whether everything that TensorBoard had loaded at the last look is in here."""
        self.version = 0
        """Grows with each piece of news."""
        self._forget()

    def _forget(self) -> None:
        self.series: dict[int, Series] = {}
        self.alerts: dict[str, dict[str, Any]] = {}
        self._layouts: dict[tuple[str, int, int], dict[str, Any]] = {}
        self._num_read: dict[Tag, int] = defaultdict(int)
        self._written: dict[Tag, float] = {}
        self._num_events = self._num_expected = 0

    @property
    def progress(self) -> float:
        """About how much of the run is in here, 0 to 1."""
        return 1.0 if self.is_complete else min(self._num_events / max(self._num_expected, 1), 0.99)

    def sync(self, source: Source, seconds: float) -> None:
        """Read what is new, for about that long; the rest comes next time."""
        deadline = time.monotonic() + seconds
        tags = source.tags()
        if not self._written.keys() <= tags.keys():
            self._forget()  # another run has taken this one's place
        self._read_layouts(source, tags)
        changed = {tag for tag, written in tags.items() if self._written.get(tag) != written and tag.series != "layout"}
        pending = [tag for tag in tags if not changed.isdisjoint(_together(tag))]
        self._num_expected = sum(tag.series == "norms" for tag in tags) * EVENTS_PER_TAG
        self.is_complete = not pending
        for batch in _batches(pending):
            self._take(source, batch)
            self._written.update({tag: tags[tag] for tag in batch})
            self.version += 1
            self.is_complete = batch[-1] is pending[-1]
            if time.monotonic() > deadline:
                break

    def _read_layouts(self, source: Source, tags: Mapping[Tag, float]) -> None:
        new = sorted(tag for tag in tags if tag.series == "layout" and tag not in self._written)
        found = source.read([str(tag) for tag in new]) if new else {}
        for tag in new:
            for event in found.get(str(tag), ()):
                self._layouts[tag.session, tag.optimizer, tag.layout] = json.loads(event.numpy.item())
                self._written[tag] = tags[tag]
        for optimizer in {tag.optimizer for tag in new}:
            layouts = {(key[0], key[2]): self._layouts[key] for key in sorted(self._layouts) if key[1] == optimizer}
            # Norms that were read under the old layout are read again: the order of the parameters may be another.
            self.series[optimizer] = Series(layouts)
            for tag in [tag for tag in self._num_read if tag.optimizer == optimizer and tag.series != "alerts"]:
                del self._num_read[tag]
                self._written.pop(tag, None)

    def _take(self, source: Source, tags: Sequence[Tag]) -> None:
        found = source.read([str(tag) for tag in tags])
        events = {tag: found.get(str(tag), ())[self._num_read[tag] :] for tag in tags}
        for tag, new in events.items():
            if tag.series == "alerts":
                self._add_alerts(tag, new)
                self._num_read[tag] += len(new)
            if (tag.session, tag.optimizer, tag.layout) not in self._layouts:
                continue  # the file was cut off before its first event was whole
            series = self.series[tag.optimizer]
            if tag.series == "facts":
                norms = tag._replace(series="norms")
                # One event holds both, but TensorBoard may be between the two just now.
                count = min(len(new), len(events.get(norms, ())))
                if count:
                    series.add(tag, new[:count], events[norms][:count])
                self._num_read[tag] += count
                self._num_read[norms] += count
                self._num_events += count
            elif tag.series == "shares":
                series.add_shares(tag, new)
                self._num_read[tag] += len(new)

    def _add_alerts(self, tag: Tag, events: Sequence[TensorDatum]) -> None:
        first = tag.chunk * EVENTS_PER_TAG + self._num_read[tag]
        for index, event in enumerate(events, first):
            for number, text in enumerate(np.ravel(event.numpy)):
                key = f"{tag.session}-{tag.optimizer}-{tag.layout}-{index}-{number}"
                self.alerts[key] = {**json.loads(text), "id": key, "x": event.step}


def _together(tag: Tag) -> tuple[Tag, ...]:
    """The tags that are of use only with each other."""
    if tag.series in ("facts", "norms"):
        return tag._replace(series="facts"), tag._replace(series="norms")
    return (tag,)


_FIRST = {"alerts": 0, "facts": 1, "norms": 1, "shares": 2}


def _batches(pending: list[Tag]) -> Iterator[list[Tag]]:
    """The tags to be read together: all alerts first, then steps; facts and norms of a chunk never apart."""

    def place(tag: Tag) -> tuple[int, str, int, int, int]:
        return _FIRST[tag.series], tag.session, tag.layout, tag.chunk, tag.optimizer

    pending.sort(key=lambda tag: (place(tag), tag.series))
    batch: list[Tag] = []
    for _, together in groupby(pending, key=place):
        batch.extend(together)
        if len(batch) >= _TAGS_PER_READ:
            yield batch
            batch = []
    if batch:
        yield batch
