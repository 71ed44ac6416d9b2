"""The values that went into an operator whose result is damaged: which argument, which element."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_gradguard.forensics.tensors import Range, plain

_SAVED = "_saved_"
_INSIDE = {
    (f"{node}Backward0", "div", "other"): kept
    for node, kept in (("Sqrt", "result"), ("Log", "self"), ("Log2", "self"), ("Log10", "self"), ("Div", "other"))
}
"""Arguments inside a node that are 0 where what it has saved is, for when it does not give that out."""
_STEEP = {"SqrtBackward0": "sqrt", "PowBackward0": "pow", "AcosBackward0": "acos", "AcoshBackward0": "acosh"}
_NUM_EXACT = 1000
"""Below this, a number that is no integer is not written as one."""
_SPECTRA = ("S", "eigenvalues")


@dataclass(frozen=True)
class Place:
    """A value and where in its tensor it stands; of a number, the index is empty."""

    value: float
    index: tuple[int, ...] = ()

    def __str__(self) -> str:
        return number(self.value) + (f" at {list(self.index)}" if self.index else "")

    def __format__(self, spec: str) -> str:
        """With "value", without its index."""
        return number(self.value) if spec == "value" else str(self)


@dataclass(frozen=True)
class Operand:
    """An argument of an operator; in a backward pass, what its forward operator has saved.

    Attributes:
        name: as the operator's schema calls it.
        at: its value at the first NaN of the result, or else the first infinity; None where their elements don't
            correspond. Means something for operators that work element by element only.
        peak: its largest value in magnitude; None if it is empty.
        span: smallest and largest value; NaN if it holds NaN.
        size: number of elements.
        line: range along the dimension that the operator reduces, through the first damaged element; None without one.
        is_number: whether it is a number and no tensor.
        has_ties: whether it is a spectrum with equal values.
        source: the operator that it comes from, if that has an infinite slope where it gives 0; else "".
    """

    name: str
    at: Place | None = None
    peak: Place | None = None
    span: Range | None = None
    size: int = 1
    line: Range | None = None
    is_number: bool = False
    has_ties: bool = False
    source: str = ""


def number(value: float) -> str:
    """As a message writes it.

    >>> number(-0.0), number(65504.0), number(3.4e38), number(1.0000012)
    ('0', '65504', '3.4e+38', '1.0000012')
    """
    is_short = value == value // 1 and abs(value) < 1e6
    if is_short:
        return f"{value + 0.0:.0f}"
    text = f"{value:.4g}"
    # What is said to be outside of a domain must not look like its border.
    return f"{value:.8g}" if float(text) == float(text) // 1 and abs(value) < _NUM_EXACT else text


def operands_of(named: Iterable[tuple[str, Any]], result: Tensor) -> tuple[Operand, ...]:
    """What is known of the arguments of an operator. Some syncs for each.

    Args:
        named: the arguments with their names; what is no number and no real tensor is left out.
        result: the damaged tensor.
    """
    arguments = dict(named)
    damaged = _first_damaged(result)
    dims = _dims(arguments.get("dim"))
    found = [_operand(name, value, damaged, tuple(result.shape), dims) for name, value in arguments.items()]
    return tuple(operand for operand in found if operand is not None)


def saved_by(node: Any, op: str, given: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    """What an autograd node keeps of its forward operator; nothing that it doesn't give out a second time.

    Args:
        node: it is running.
        op: the operator that it runs.
        given: that operator's arguments with their names.
    """
    for name, value in given:
        if (kept := _INSIDE.get((node.name(), op, name))) is not None:
            yield kept, value
    for attribute in dir(node):
        if attribute.startswith(_SAVED):
            try:
                value = getattr(node, attribute)
            except Exception:  # noqa: BLE001, S112 - users' hooks unpack it; a checkpoint's refuse to do so twice
                continue
            if value is not None:
                yield attribute.removeprefix(_SAVED), value


def _operand(
    name: str, value: Any, damaged: tuple[int, ...] | None, shape: tuple[int, ...], dims: tuple[int, ...]
) -> Operand | None:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        place = Place(float(value))
        return Operand(name, at=place, peak=place, span=Range(place.value, place.value), is_number=True)
    if not isinstance(value, Tensor) or value.is_complex() or value.dtype is torch.bool or value.is_meta:
        return None
    if value.numel() == 0:
        return Operand(name, size=0)
    values = plain(value) if value.is_floating_point() else value
    if values is None or values.layout is not torch.strided:
        return None
    at = None if damaged is None else _broadcast_index(damaged, shape, tuple(values.shape))
    low, high = torch.aminmax(values)
    span = Range(float(low), float(high))
    return Operand(
        name,
        at=None if at is None else Place(float(values[at]), at),
        peak=_peak(values, span),
        span=span,
        size=values.numel(),
        line=_line(values, damaged, dims),
        has_ties=name in _SPECTRA and _has_ties(values),
        source=_steep_source(value),
    )


def _first_damaged(result: Tensor) -> tuple[int, ...] | None:
    values = plain(result)
    if values is None or result.is_complex() or values.shape != result.shape:
        return None
    if 0 in values.stride():  # repeats itself
        values = values[tuple(slice(None if stride else 1) for stride in values.stride())]
    is_nan = values.isnan()  # of Inf beside NaN there may be more than was made here: a mask has some
    is_damaged = is_nan if bool(is_nan.any()) else values.isinf()
    return _first(is_damaged)


def _first(holds: Tensor) -> tuple[int, ...]:
    """Where the first True stands."""
    flat = int(holds.flatten().byte().argmax())
    return tuple(int(place) for place in np.unravel_index(flat, tuple(holds.shape)))


def _broadcast_index(index: tuple[int, ...], shape: tuple[int, ...], own: tuple[int, ...]) -> tuple[int, ...] | None:
    """Where an element of a result stands in an argument that was broadcast to its shape; None if it was not.

    >>> _broadcast_index((3, 1), (4, 2), (4, 1)), _broadcast_index((3, 1), (4, 2), (2,)), _broadcast_index((3,), (4,), (5,))
    ((3, 0), (1,), None)
    """
    trailing = len(shape) - len(own)
    if trailing < 0 or any(length not in (1, full) for length, full in zip(own, shape[trailing:], strict=True)):
        return None
    return tuple(0 if length == 1 else place for place, length in zip(index[trailing:], own, strict=True))


def _peak(values: Tensor, span: Range) -> Place:
    peak = max((span.low, span.high), key=abs)
    if math.isnan(peak):
        return Place(peak)
    return Place(peak, _first(values == peak))


def _dims(dim: Any) -> tuple[int, ...]:
    if isinstance(dim, int):
        return (dim,)
    return tuple(dim) if isinstance(dim, (list, tuple)) and all(isinstance(entry, int) for entry in dim) else ()


def _line(values: Tensor, damaged: tuple[int, ...] | None, dims: tuple[int, ...]) -> Range | None:
    if damaged is None or len(dims) != 1 or not values.dim():
        return None
    dim = dims[0] % values.dim()
    rest = list(damaged)
    if len(rest) == values.dim():
        del rest[dim]
    if len(rest) != values.dim() - 1 or any(
        place >= length for place, length in zip(rest, values.movedim(dim, -1).shape[:-1], strict=True)
    ):
        return None
    low, high = torch.aminmax(values.movedim(dim, -1)[tuple(rest)])
    return Range(float(low), float(high))


def _has_ties(values: Tensor) -> bool:
    ordered = values.sort(-1).values
    gaps = ordered.diff(dim=-1)
    # Apart by no more than rounding: torch divides by the difference.
    return bool((gaps <= torch.finfo(values.dtype).eps * ordered[..., 1:].abs()).any())


def _steep_source(value: Tensor) -> str:
    node: Any = value.grad_fn
    if node is None or (node.name() == "PowBackward0" and not 0 < node._saved_exponent < 1):
        return ""
    return _STEEP.get(node.name(), "")
