"""Which rows of a batch are bad."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_gradguard.forensics.tensors import plain


def leaves_of(batch: Any, name: str = "batch") -> Iterator[tuple[str, Tensor]]:
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
        """The samples whose values in a tensor are not finite; None if it has no row for each. One sync."""
        values = plain(tensor)
        if values is None or not self.size:
            return None
        if tensor.is_complex():
            values = values.flatten(-2) if values.dim() > 1 else values
        shape = tuple(values.shape)
        if not shape:
            return None
        if shape[0] == self.size:
            rows = values
        elif shape[0] in {self.size * length for length in self.lengths}:
            rows = values.unflatten(0, (self.size, -1))
        elif len(shape) > 2 and shape[1] == self.size:
            rows = values.movedim(1, 0)
        else:
            return None
        is_bad = ~rows.isfinite()
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
    import copy  # noqa: PLC0415

    made = copy.copy(value)
    for key, entry in changed.items():
        made[key] = entry
    return made


def bisect(is_bad: Callable[[Sequence[int]], bool], size: int, max_runs: int) -> tuple[int, ...] | None:
    """The samples that are to blame; None if it is not single ones.

    Args:
        is_bad: whether a batch of nothing but these samples fails.
        size: how many there are.
        max_runs: how often it may be asked.
    """
    runs = 0

    def ask(keep: Sequence[int]) -> bool:
        nonlocal runs
        runs += 1
        return is_bad(keep)

    found: list[int] = []
    open_: list[Sequence[int]] = [range(size)]
    while open_:
        some = open_.pop()
        if len(some) == 1:
            found.append(some[0])
            if 2 * len(found) > size:
                return None
            continue
        if runs + 3 > max_runs:
            return None
        middle = len(some) // 2
        first, second = some[:middle], some[middle:]
        first_bad = ask(first)
        if not first_bad:
            open_.append(second)
            continue
        open_.append(first)
        if ask(second):
            open_.append(second)
    rest = [row for row in range(size) if row not in found]
    if not found or not rest or ask(rest) or not ask(found):
        return None
    return tuple(sorted(found))
