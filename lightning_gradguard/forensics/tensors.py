"""What single tensors hold: NaN, infinities, ranges."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Flaw:
    """What is wrong with a tensor.

    Attributes:
        has_nan: whether it holds NaN; infinities beside NaN are looked for only where that is asked for.
        has_inf: whether it holds infinity.
        is_negative: whether minus infinity is all that is wrong, as in a mask.
    """

    has_nan: bool
    has_inf: bool
    is_negative: bool


_NAN = Flaw(has_nan=True, has_inf=False, is_negative=False)


@dataclass(frozen=True)
class Range:
    """Smallest and largest value of a tensor; NaN where one is in it, and where it is empty."""

    low: float
    high: float

    @property
    def flaw(self) -> Flaw | None:
        """None for finite values."""
        if math.isfinite(self.low) and math.isfinite(self.high):
            return None
        if math.isnan(self.low) or math.isnan(self.high):
            return _NAN
        return Flaw(has_nan=False, has_inf=True, is_negative=math.isfinite(self.high) or self.high == -math.inf)

    def __str__(self) -> str:
        return f"{self.low:.4g}" if self.low == self.high else f"{self.low:.4g} to {self.high:.4g}"


def tensors_in(values: Any) -> Iterator[Tensor]:
    """The tensors in the arguments or results of an operator, in order."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from tensors_in(value)


def plain(tensor: Tensor) -> Tensor | None:
    """The same values on this rank as a real, dense tensor without history; None where there are no such values.

    A DTensor stands for its local shard, a sparse tensor for its values. No copy but of float8.
    """
    if not (tensor.is_floating_point() or tensor.is_complex()) or tensor.device.type == "meta":
        return None
    tensor = getattr(tensor, "_local_tensor", tensor).detach()
    if tensor.layout is not torch.strided or tensor.is_nested:
        if tensor.layout is not torch.sparse_coo:
            return None
        tensor = tensor._values()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    return (tensor if tensor.dtype.itemsize > 1 else tensor.float()) if tensor.numel() else None


_SIMPLE = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def range_of(tensor: Tensor) -> Range | None:
    """Smallest and largest value; None for what has no floating-point values, or does not show them. One sync."""
    try:
        return _range_of(tensor)
    except (NotImplementedError, TypeError):  # of packed numbers, of subclasses that have few operators
        return None


def _range_of(tensor: Tensor) -> Range | None:
    is_simple = (
        type(tensor) is Tensor and tensor.dtype in _SIMPLE and not tensor.requires_grad and tensor.device.type == "cpu"
    )
    is_dense = tensor.layout is torch.strided and not tensor.is_nested
    values = tensor if is_simple and is_dense and tensor.numel() else plain(tensor)
    if values is None:
        return None
    if 0 in values.stride():  # an expanded tensor repeats itself, which may be for longer than anybody can wait
        values = values[tuple(slice(None if stride else 1) for stride in values.stride())]
    low, high = torch.aminmax(values)  # NaN propagates; ten times as fast as `isfinite().all()`
    return Range(float(low), float(high))


def flaw_of(tensor: Tensor, *, is_whole: bool = False) -> Flaw | None:
    """What is wrong with a tensor; None for nothing. One sync.

    Args:
        tensor: that is looked at.
        is_whole: whether to look for infinities beside NaN, too, which takes one more.
    """
    span = range_of(tensor)
    flaw = None if span is None else span.flaw
    values = plain(tensor) if is_whole and flaw is not None and flaw.has_nan else None
    return flaw if flaw is None or values is None else replace(flaw, has_inf=bool(values.isinf().any()))


def kind_of(tensor: Tensor) -> str:
    """Its type, as `float32`."""
    return str(tensor.dtype).removeprefix("torch.")


def describe(tensor: Tensor) -> str:
    """Type, shape and range, as `float32 [8, 16] -1.2 to 3.4`."""
    kind = kind_of(tensor)
    values = plain(tensor)
    if values is None:
        return f"{kind} {list(tensor.shape)}"
    finite = values.isfinite()
    span = range_of(values[finite]) if bool(finite.any()) else None
    num_nan, num_inf = int(values.isnan().sum()), int(values.isinf().sum())
    parts = [f"{kind} {list(tensor.shape)}", *([str(span)] if span is not None else [])]
    parts += [f"{count:,} {what}" for count, what in ((num_nan, "NaN"), (num_inf, "Inf")) if count]
    return parts[0] + " " + ", ".join(parts[1:])
