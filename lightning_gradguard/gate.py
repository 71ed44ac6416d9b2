"""What keeps a step from being applied."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor


def skip_(parameters: Iterable[Tensor]) -> None:
    """Take the gradients away, so that the optimizer passes the parameters over.

    Every torch optimizer leaves a parameter without a gradient alone: its value, its state, its step counter and its
    weight decay. Gradients of zero would still move momentum and decay the weights. In place, no sync, rank-local.
    """
    for parameter in parameters:
        parameter.grad = None
