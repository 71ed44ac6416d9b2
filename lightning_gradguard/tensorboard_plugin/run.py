"""A run as the tab knows it, read bit by bit through TensorBoard's data provider."""

from __future__ import annotations

import json
import threading
import time
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

import numpy as np
from tensorboard.data.provider import TensorDatum

from lightning_gradguard.tensorboard_plugin.alerts import Alert, read_alert
from lightning_gradguard.tensorboard_plugin.data import Series, Source
from lightning_gradguard.tensorboard_plugin.wire import EVENTS_PER_TAG, Tag

_TAGS_PER_READ = 64
_SECONDS_PER_LISTING = 1.0
"""For so long what was found is read before anything newer is looked for."""


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
        self.alerts: dict[str, Alert] = {}
        self._layouts: dict[tuple[str, int, int], dict[str, Any]] = {}
        self._num_read: dict[Tag, int] = defaultdict(int)
        self._written: dict[Tag, float] = {}
        self._tags: Mapping[Tag, float] = {}
        self._pending: deque[list[Tag]] = deque()
        self._listed_at = 0.0
        self._num_events = self._num_expected = 0

    @property
    def progress(self) -> float:
        """About how much of the run is in here, 0 to 1."""
        return 1.0 if self.is_complete else min(self._num_events / max(self._num_expected, 1), 0.99)

    def sync(self, source: Source, seconds: float) -> None:
        """Read what is new, for about that long; the rest comes next time."""
        deadline = time.monotonic() + seconds
        # To list thousands of tags takes as long as to read hundreds of them.
        if not self._pending or time.monotonic() > self._listed_at + _SECONDS_PER_LISTING:
            self._list(source)
        while self._pending:
            batch = self._pending.popleft()
            self._take(source, batch)
            self._written.update({tag: self._tags[tag] for tag in batch})
            self.version += 1
            if time.monotonic() > deadline:
                break
        self.is_complete = not self._pending

    def _list(self, source: Source) -> None:
        """Find what is to be read, and read the layouts."""
        self._tags = tags = source.tags()
        if not self._written.keys() <= tags.keys():
            self._forget()  # another run has taken this one's place
            self._tags = tags
        self._read_layouts(source, tags)
        changed = {tag for tag, written in tags.items() if self._written.get(tag) != written and tag.series != "layout"}
        self._pending = deque(_batches([tag for tag in tags if not changed.isdisjoint(_together(tag))]))
        self._num_expected = sum(tag.series == "norms" for tag in tags) * EVENTS_PER_TAG
        self._listed_at = time.monotonic()

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
            elif tag.series == "bins":
                series.add_bins(tag, new)
                self._num_read[tag] += len(new)

    def _add_alerts(self, tag: Tag, events: Sequence[TensorDatum]) -> None:
        first = tag.chunk * EVENTS_PER_TAG + self._num_read[tag]
        for index, event in enumerate(events, first):
            for number, text in enumerate(np.ravel(event.numpy)):
                key = f"{tag.session}-{tag.optimizer}-{tag.layout}-{index}-{number}"
                if (alert := read_alert(text)) is not None:
                    self.alerts[key] = {**alert, "id": key, "x": event.step}


def _together(tag: Tag) -> tuple[Tag, ...]:
    """The tags that are of use only with each other."""
    if tag.series in ("facts", "norms"):
        return tag._replace(series="facts"), tag._replace(series="norms")
    return (tag,)


_FIRST = {"alerts": 0, "facts": 1, "norms": 1, "bins": 2}


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
