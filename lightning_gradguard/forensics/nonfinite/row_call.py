"""An operator that was run, for the rules of how it passes labels on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_gradguard.forensics.nonfinite.row_labels import (
    MANY,
    UNKNOWN,
    RowLabels,
    combined,
    reduced,
)
from lightning_gradguard.forensics.tensors import tensors_in

Label = Tensor | None
MAX_ELEMENTS = 2**24
"""Labels are not worked out one by one for tensors of more elements."""


@dataclass
class Call:
    """An operator that was run, and the labels of what went in.

    Attributes:
        func: one of `torch.ops`, with its overload.
        name: of it, without namespace, overload, and the underscore of those that work in place.
        args: by the names in its schema.
        outputs: the tensors that came out.
        labels: of all tensors so far.
        mixes: whether values of different samples have met in it.
        is_elementwise: whether elements at the same place meet, and no others.
    """

    func: Any
    name: str
    args: dict[str, Any]
    outputs: list[Tensor]
    labels: RowLabels
    mixes: bool = False
    is_elementwise: bool = False

    @property
    def inputs(self) -> list[Tensor]:
        """All tensors that went in."""
        return [*tensors_in([*self.args.values()])]

    def label(self, tensor: Tensor) -> Label:
        """Of one of them."""
        return self.labels.get(tensor)

    def combine(self, labels: Iterable[Label]) -> Label:
        """Element by element."""
        found, has_met = combined(labels)
        self.mixes |= has_met
        return found

    def gather(self, label: Label, dims: Iterable[int]) -> Label:
        """Over some dimensions, by an operator that lets all elements along them meet."""
        result = reduced(label, dims)
        if label is not None and result is not None:
            self.mixes |= bool((result == MANY).any()) and not bool((label == MANY).any())
            # Which of those that have met is not known.
            result = torch.where(result == MANY, torch.where((label == MANY).all(), MANY, UNKNOWN), result).to(torch.int32)
        return result

    def full(self, tensor: Tensor) -> Tensor:
        """The label of a tensor in its own shape."""
        label = self.label(tensor)
        if label is None:
            return torch.zeros((), dtype=torch.int32).expand(tensor.shape)
        return label.expand(tensor.shape)


def unknown_of(call: Call) -> Label:
    """Of a result that no rule tells of: none if all inputs have none."""
    return torch.full((1,), UNKNOWN, dtype=torch.int32) if any(call.label(it) is not None for it in call.inputs) else None


def aligned(labels: Iterable[Label], num_dims: int) -> list[Label]:
    """The same with as many dimensions, as broadcasting adds them."""
    return [None if label is None else label.reshape([1] * (num_dims - label.dim()) + [*label.shape]) for label in labels]


def dims_of(call: Call, num_dims: int, name: str = "dim") -> list[int]:
    """The dimensions that an argument names, from 0; all where it names none."""
    dims = call.args.get(name)
    if dims is None or (isinstance(dims, (list, tuple)) and not dims):
        return [*range(num_dims)]
    return [dim % max(num_dims, 1) for dim in (dims if isinstance(dims, (list, tuple)) else [dims])]
