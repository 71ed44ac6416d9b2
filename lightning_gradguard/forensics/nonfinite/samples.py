"""Which rows of a tensor are bad, as far as its shape tells; and batches in which samples take the places of others."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_gradguard.forensics.nonfinite.layout import Layout, SampleDim, layout_of
from lightning_gradguard.forensics.tensors import plain


@dataclass(frozen=True)
class Batch:
    """What a batch's samples look like in tensors that are made of it; only a guess, since other things may be as many.

    Attributes:
        size: samples in it; 0 if that can't be told.
        lengths: what a sample is long in some leaf: dimensions that a model may flatten with that of the samples.
    """

    size: int = 0
    lengths: frozenset[int] = frozenset()

    @classmethod
    def of(cls, batch: Any, sample_dim: SampleDim = None) -> Batch:
        """Read it off the leaves; `sample_dim` is what the user says about them."""
        return cls.from_layout(layout_of(batch, sample_dim))

    @classmethod
    def from_layout(cls, layout: Layout) -> Batch:
        """From what is known of the leaves."""
        shapes = [leaf.shape for name, leaf in layout.leaves if layout.dims.get(name) == 0 and leaf.dim() > 1]
        lengths = {shape[1] for shape in shapes}
        return cls(layout.size, frozenset(lengths | {length - 1 for length in lengths if length > 2}))

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


def exchanged(batch: Any, layout: Layout, rows: Sequence[int]) -> Any:
    """The same batch with other samples in the places of some.

    Leaving samples out would change what batch statistics and fixed sizes see.

    Args:
        batch: left as it is.
        layout: of it.
        rows: for each place, whose sample is put there.
    """
    places = torch.tensor(rows)

    def one(value: Any) -> Any:  # noqa: PLR0911 - one a kind
        if isinstance(value, Tensor):
            dim = dims.get(id(value))
            return value if dim is None else _with_attributes(value.index_select(dim, places.to(value.device)), value)
        if isinstance(value, Mapping):
            changed = {key: one(entry) for key, entry in value.items()}
            return changed if type(value) is dict else _rebuilt(value, changed)
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return type(value)(*(one(entry) for entry in value))
        if isinstance(value, (list, tuple)):
            return type(value)(one(entry) for entry in value)
        if is_dataclass(value) and not isinstance(value, type):
            return _with_values(value, {entry.name: one(getattr(value, entry.name)) for entry in fields(value)})
        if hasattr(value, "__dict__") and not isinstance(value, type):
            return _with_values(value, {name: one(entry) for name, entry in vars(value).items()})
        return value

    dims = {id(leaf): layout.dims[name] for name, leaf in layout.leaves if name in layout.dims}
    return one(batch)


def _with_attributes(tensor: Tensor, source: Tensor) -> Tensor:
    """A subclass of tensors may carry attributes that an operator does not hand on."""
    if type(source) is not Tensor:
        vars(tensor).update(vars(source))
    return tensor


def _with_values(value: Any, changed: dict[str, Any]) -> Any:
    made = copy.copy(value)
    for name, entry in changed.items():
        object.__setattr__(made, name, entry)
    return made


def _rebuilt(value: Any, changed: dict[Any, Any]) -> Any:
    made = copy.copy(value)
    for key, entry in changed.items():
        made[key] = entry
    return made
