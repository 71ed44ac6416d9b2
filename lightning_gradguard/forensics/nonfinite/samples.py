"""Which rows of a batch are bad."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_gradguard.forensics.tensors import plain


def leaves_of(batch: Any, name: str = "batch") -> Iterator[tuple[str, Tensor]]:  # noqa: C901 - one case a kind
    """The tensors of a batch with their names, as `batch['x']`."""
    if isinstance(batch, Tensor):
        yield name, batch
    elif isinstance(batch, Mapping):
        for key, value in batch.items():
            yield from leaves_of(value, f"{name}[{key!r}]")
    elif isinstance(batch, tuple) and hasattr(batch, "_fields"):
        for key, value in zip(batch._fields, batch, strict=True):
            yield from leaves_of(value, f"{name}.{key}")
    elif isinstance(batch, (list, tuple)):
        for index, value in enumerate(batch):
            yield from leaves_of(value, f"{name}[{index}]")
    elif is_dataclass(batch) and not isinstance(batch, type):
        for entry in fields(batch):
            yield from leaves_of(getattr(batch, entry.name), f"{name}.{entry.name}")
    elif hasattr(batch, "__dict__") and not isinstance(batch, type):
        for key, value in vars(batch).items():
            yield from leaves_of(value, f"{name}.{key}")


@dataclass(frozen=True)
class Batch:
    """How a batch is laid out.

    Attributes:
        size: samples in it; 0 if that can't be told.
        lengths: what a sample is long in some leaf: dimensions that a model may flatten with that of the samples.
    """

    size: int = 0
    lengths: frozenset[int] = frozenset()

    @classmethod
    def of(cls, batch: Any) -> Batch:
        """Read it off the leaves: the first dimension that most of them have."""
        shapes = [tuple(leaf.shape) for _, leaf in leaves_of(batch) if leaf.dim()]
        if not shapes:
            return cls()
        size = Counter(shape[0] for shape in shapes).most_common(1)[0][0]
        lengths = {shape[1] for shape in shapes if len(shape) > 1 and shape[0] == size}
        return cls(size, frozenset(lengths | {length - 1 for length in lengths if length > 2}))

    def rows_of(self, tensor: Tensor) -> tuple[int, ...] | None:
        """The samples whose values in a tensor are not finite, or True; None if it has no row for each. One sync."""
        values = tensor if tensor.dtype is torch.bool else plain(tensor)
        if values is None or not self.size or not tensor.dim():
            return None
        is_bad = values if tensor.dtype is torch.bool else ~values.isfinite()
        if is_bad.shape[0] == self.size:
            return self._rows(is_bad)
        if is_bad.dim() > 2 and is_bad.shape[1] == self.size:
            return self._rows(is_bad.movedim(1, 0))
        flattened = {self.size * length for length in self.lengths}
        is_heads = is_bad.dim() == 3 and is_bad.shape[0] % self.size == 0  # attention: samples times heads
        if is_bad.shape[0] in flattened or is_heads:
            # Either dimension may be the outer one; the right one gathers the damage in fewer rows.
            outer = self._rows(is_bad.reshape(self.size, -1, *is_bad.shape[1:]))
            return min(outer, self._rows(is_bad.reshape(-1, self.size, *is_bad.shape[1:]).movedim(1, 0)), key=len)
        return None

    def _rows(self, is_bad: Tensor) -> tuple[int, ...]:
        return tuple(is_bad.reshape(self.size, -1).any(1).nonzero().flatten().tolist())

    def is_some(self, rows: Sequence[int] | None) -> bool:
        """Whether rows say something: neither none nor all."""
        return rows is not None and 0 < len(rows) < max(self.size, 2)


def refill(batch: Any, keep: Sequence[int], size: int) -> Any:
    """The same batch with only some samples, repeated until it is full again.

    Leaving samples out would change what batch statistics and fixed sizes see.
    """
    rows = torch.tensor([keep[index % len(keep)] for index in range(size)])

    def one(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value[rows.to(value.device)] if value.dim() and value.shape[0] == size else value
        if isinstance(value, Mapping):
            changed = {key: one(entry) for key, entry in value.items()}
            return changed if type(value) is dict else _rebuilt(value, changed)
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return type(value)(*(one(entry) for entry in value))
        if isinstance(value, (list, tuple)):
            return type(value)(one(entry) for entry in value)
        return value

    return one(batch)


def _rebuilt(value: Any, changed: dict[Any, Any]) -> Any:
    made = copy.copy(value)
    for key, entry in changed.items():
        made[key] = entry
    return made


def bisect(is_bad: Callable[[Sequence[int]], bool], size: int, max_runs: int) -> tuple[int, ...] | None:
    """The samples without which the batch is in order; None if it is not some of them.

    Args:
        is_bad: whether a batch of nothing but these samples fails.
        size: how many there are.
        max_runs: how often it may be asked.
    """
    search = _Bisection(is_bad, size, max_runs)
    try:
        found = search.run()
    except _TooLong:
        return None
    return tuple(sorted(found)) if 0 < 2 * len(found) <= size else None


class _TooLong(Exception):  # noqa: N818 - it is none
    """The number of runs is used up."""


class _Bisection:
    """Takes samples out, rather than looking at single ones alone: a batch of one repeated has no variance."""

    def __init__(self, is_bad: Callable[[Sequence[int]], bool], size: int, max_runs: int) -> None:
        self._is_bad = is_bad
        self._all = range(size)
        self._runs_left = max_runs

    def run(self) -> list[int]:
        """Find a part of the batch that is in order, then whom else it tolerates."""
        for number in (2, 4):
            width = -(-len(self._all) // number)
            for begin in range(0, len(self._all), width):
                healthy = set(self._all[begin : begin + width])
                suspects = [row for row in self._all if row not in healthy]
                if suspects and self._is_healthy(suspects):
                    return self._narrow(suspects, set())
        return []

    def _narrow(self, suspects: list[int], out: set[int]) -> list[int]:
        """Those of the suspects that are to blame; without all of them, and those that are out, the batch is in order."""
        if len(suspects) == 1:
            return suspects
        first, second = suspects[: len(suspects) // 2], suspects[len(suspects) // 2 :]
        if self._is_healthy([*out, *first]):
            return self._narrow(first, out)
        if self._is_healthy([*out, *second]):
            return self._narrow(second, out)
        return self._narrow(first, out | {*second}) + self._narrow(second, out | {*first})

    def _is_healthy(self, without: Sequence[int]) -> bool:
        self._runs_left -= 1
        if self._runs_left < 0:
            raise _TooLong
        left_out = set(without)
        return not self._is_bad([row for row in self._all if row not in left_out])
