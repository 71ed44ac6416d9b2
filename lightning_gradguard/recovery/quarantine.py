"""Samples that have done damage: the list of them, on disk, and a sampler that leaves them out."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lightning_gradguard.files.json_lines import LeftOut, Reader, Writer

VERSION = 1
"""Of the lines; a field may be added without a new one."""

_MAX_SAMPLES = 100_000
"""Samples in a line."""


@dataclass(frozen=True)
class Incident:
    """A batch that caused a skip or a rollback.

    Attributes:
        epoch: from 0.
        batch_idx: in the epoch, from 0.
        step: number of the decision, from 0.
        rank: whose batch it was.
        reason: kind of the finding.
        samples: indices into the data set; None where the sampler did not show them.
    """

    epoch: int
    batch_idx: int
    step: int
    rank: int
    reason: str
    samples: tuple[int, ...] | None


class QuarantineFile:
    """The list on disk, one line of JSON an incident; `files/schemas/quarantine.schema.json` says what it holds.

    Incidents that can't be written wait for the next ones.

    Args:
        path: the file; it and its folder appear with the first incident.
    """

    def __init__(self, path: str | Path) -> None:
        self._writer = Writer(Path(path))

    def append(self, incidents: Iterable[Incident] = ()) -> None:
        """Add some, after those that are still waiting; none: only these.

        Raises:
            OSError: if they can't be written now.
        """
        self._writer.write({"version": VERSION, **asdict(part)} for incident in incidents for part in _short(incident))

    def read(self) -> tuple[set[int], LeftOut]:
        """All samples that are listed, and what of the file could not be used.

        Raises:
            OSError: if the file can't be read; none is an empty list.
        """
        if not self._writer.path.exists():
            return set(), LeftOut()
        reader = Reader(self._writer.path, _samples_in)
        return {sample for samples in reader.read() for sample in samples}, reader.left_out

    def __repr__(self) -> str:
        return f"QuarantineFile({str(self._writer.path)!r})"


def _short(incident: Incident) -> Iterator[Incident]:
    """The same as incidents that fit into a line each."""
    samples = incident.samples
    if samples is None or len(samples) <= _MAX_SAMPLES:
        yield incident
        return
    for start in range(0, len(samples), _MAX_SAMPLES):
        yield replace(incident, samples=samples[start : start + _MAX_SAMPLES])


def _samples_in(entry: dict[str, Any]) -> list[int]:
    if "samples" not in entry:
        raise ValueError("`samples` is missing")
    samples = entry["samples"] if entry["samples"] is not None else []
    if not isinstance(samples, list) or not all(type(sample) is int for sample in samples):
        raise ValueError("`samples` is not valid")
    return samples


class WatchedSampler:
    """Gives out what a sampler does, remembers it until it is asked for, and puts others in the place of some samples.

    As many batches of the same sizes are given out as without it, so that epochs, schedules and the other ranks' batches
    keep step: another sample of the same batch takes a place, and the batch before (or the first healthy one) that of a
    batch in which none is left.

    Args:
        inner: of single indices, or of batches of them.
        left_out: samples that are not given out; may grow.

    >>> sampler = WatchedSampler([[0, 1], [2, 3], [4, 5]], left_out={3, 4, 5})
    >>> list(sampler)
    [[0, 1], [2, 2], [2, 2]]
    >>> sampler.take(), sampler.take()
    ((0, 1), (2, 2))
    """

    def __init__(self, inner: Iterable[Any], left_out: Collection[int]) -> None:
        self.inner = inner
        self._left_out = left_out
        self._given: deque[Any] = deque()

    def __iter__(self) -> Iterator[Any]:
        self._given.clear()
        spare: Any = None
        waiting: list[Any] = []
        for entry in self.inner:
            healthy = [sample for sample in as_samples(entry) or () if sample not in self._left_out]
            if not healthy and as_samples(entry):
                if spare is None:
                    waiting.append(entry)
                else:
                    yield self._give(spare)
                continue
            spare = self._fill(entry, healthy)
            for _ in waiting:
                yield self._give(spare)
            waiting = []
            yield self._give(spare)
        for entry in waiting:  # there is no healthy one at all
            yield self._give(entry)

    def __len__(self) -> int:
        return len(self.inner)  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:
        # Lightning and data sets look at `sampler`, `batch_size`, `set_epoch` and the like.
        if name == "inner":  # while it is being unpickled
            raise AttributeError(name)
        return getattr(self.inner, name)

    def take(self) -> tuple[int, ...] | None:
        """The samples of the next batch that training sees; None if they are not known."""
        return as_samples(self._given.popleft()) if self._given else None

    def _give(self, entry: Any) -> Any:
        self._given.append(entry)
        return entry

    def _fill(self, entry: Any, healthy: Sequence[int]) -> Any:
        samples = as_samples(entry)
        if samples is None or len(healthy) == len(samples):
            return entry
        others = itertools.cycle(healthy)
        return [next(others) if sample in self._left_out else sample for sample in samples]


def as_samples(entry: Any) -> tuple[int, ...] | None:
    """What a sampler gives out as indices; None if it is anything else."""
    entries = entry if isinstance(entry, (list, tuple)) else [entry]
    try:
        return tuple(int(sample) for sample in entries)
    except (TypeError, ValueError):
        return None
