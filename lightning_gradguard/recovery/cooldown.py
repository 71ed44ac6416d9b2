"""Lower learning rates for a while, without anybody else noticing."""

from __future__ import annotations

from typing import Any

import torch


class LoweredRates:
    """Learning rates that are lower while an optimizer steps, and only then.

    Whoever looks between steps sees the true rate: a scheduler may compute the next one from it.

    Args:
        optimizer: its `step` gets a hook before and one after, until `close`.
        factor: by which its learning rates are multiplied.

    >>> weight = torch.nn.Parameter(torch.ones(1))
    >>> optimizer = torch.optim.SGD([weight], lr=1.0)
    >>> lowered = LoweredRates(optimizer, 0.5)
    >>> weight.grad = torch.ones(1)
    >>> optimizer.step()
    >>> weight.tolist(), optimizer.param_groups[0]["lr"]
    ([0.5], 1.0)
    """

    def __init__(self, optimizer: torch.optim.Optimizer, factor: float) -> None:
        self._optimizer = optimizer
        self._factor = factor
        self._rates: list[Any] = []
        # A class derived from an optimizer that calls `super().step()` runs its hooks twice, one pair inside the other.
        self._depth = 0
        self._handles = [
            optimizer.register_step_pre_hook(lambda *_: self._lower()),
            optimizer.register_step_post_hook(lambda *_: self._put_back()),
        ]

    def close(self) -> None:
        """Take the hooks away, also from a step that has ended in an error."""
        for handle in self._handles:
            handle.remove()
        self._depth = min(self._depth, 1)
        self._put_back()

    def _lower(self) -> None:
        self._depth += 1
        if self._depth == 1:
            self._rates = [group["lr"] for group in self._optimizer.param_groups]
            for group in self._optimizer.param_groups:
                group["lr"] = group["lr"] * self._factor

    def _put_back(self) -> None:
        if self._depth == 1:
            for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
                group["lr"] = rate
        self._depth = max(self._depth - 1, 0)
