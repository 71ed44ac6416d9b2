"""What state the units behind an activation function are in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from lightning_gradguard.forensics.tensors import plain

_FLAT = 0.1
"""A unit is saturated where its slope is below this share of the function's largest."""


@dataclass(frozen=True)
class Units:
    """State of the units behind an activation function.

    Attributes:
        slope: rms of the derivative; what the chain rule multiplies by.
        best: the largest derivative that the function has: 0.25 for a sigmoid.
        saturated: share of outputs where the derivative is below a tenth of that; 0 for ReLU.
        dead: share of units that gave zero for every sample; 0 for a sigmoid or tanh.
    """

    slope: float
    best: float
    saturated: float
    dead: float


_SLOPES: dict[str, tuple[float, Callable[[Tensor], Tensor]]] = {
    "sigmoid": (0.25, lambda y: y * (1 - y)),
    "tanh": (1.0, lambda y: 1 - y.square()),
    "hardtanh": (1.0, lambda y: ((y > y.min()) & (y < y.max())).double()),
    "softsign": (1.0, lambda y: (1 - y.abs()).square()),
    "relu": (1.0, lambda y: (y > 0).double()),
    "relu6": (1.0, lambda y: ((y > 0) & (y < 6)).double()),
}


def units_of(op: str, output: Tensor) -> Units | None:
    """Read the state off an activation's output; None for other functions. A few syncs.

    >>> import torch
    >>> units_of("sigmoid", torch.tensor([[0.5, 0.999]])).saturated
    0.5
    >>> units_of("relu", torch.tensor([[1.0, 0.0], [0.0, 0.0]])).dead
    0.5
    """
    values = plain(output)
    if op not in _SLOPES or values is None:
        return None
    best, slope_of = _SLOPES[op]
    values = values.double()
    slopes = slope_of(values)
    is_relu = op.startswith("relu")
    dead = 0.0
    if is_relu and values.dim() > 1:
        # Features come second in images, last in everything else.
        features = (values if values.dim() < 4 else values.movedim(1, -1)).flatten(0, -2)
        dead = float((features == 0).all(dim=0).double().mean())
    saturated = 0.0 if is_relu else float((slopes < _FLAT * best).double().mean())
    return Units(float(slopes.square().mean().sqrt()), best, saturated, dead)
