"""How far weights have moved, and how much of it the optimizer's updates account for."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer

INTERVAL = 16
"""Steps between two looks at the weights."""


@dataclass(frozen=True)
class WeightGrowth:
    """How a weight has moved.

    Attributes:
        name: of the parameter.
        norm: now.
        before: some steps ago; None where nobody looked.
        num_steps: how many steps ago that was.
        update: norm of the last update that was applied, as far as the optimizer's state tells; 0 without one.
        is_matrix: whether it has at least two dimensions.
    """

    name: str
    norm: float
    before: float | None
    num_steps: int
    update: float
    is_matrix: bool = True

    @property
    def rate(self) -> float:
        """Update-to-weight ratio."""
        return self.update / self.norm if self.norm > 0.0 else 0.0

    @property
    def jump(self) -> float:
        """Factor by which the norm has grown beyond what updates of this size, each in a direction of its own, explain."""
        if self.before is None or not math.isfinite(self.norm):
            return 1.0
        explained = math.hypot(self.before, self.num_steps * self.update)
        return self.norm / explained if explained > 0.0 else 1.0


class WeightWatch:
    """Keeps the norms of the weights of the last two looks.

    Two, so that a look just before an alert does not hide what went wrong before it.

    Args:
        named: the parameters.
    """

    def __init__(self, named: Iterable[tuple[str, Tensor]]) -> None:
        self._named = [(name, parameter) for name, parameter in named if parameter.is_floating_point()]
        self._looks: deque[tuple[int, list[Tensor]]] = deque(maxlen=2)
        self._num_steps = 0

    @torch.no_grad()
    def note(self) -> None:
        """A step is done. Every 16 steps one pass of norms over the weights; no sync."""
        if self._num_steps % INTERVAL == 0:
            self._looks.append((self._num_steps, _norms([parameter for _, parameter in self._named])))
        self._num_steps += 1

    @torch.no_grad()
    def weight_growths(self, optimizer: Optimizer, last_norms: Mapping[str, float]) -> tuple[WeightGrowth, ...]:
        """How each weight has moved; a few syncs.

        Args:
            optimizer: which moves them.
            last_norms: the gradient norm of each at the last step that was applied, for optimizers without a state.
        """
        now = [float(norm) for norm in _norms([parameter for _, parameter in self._named])]
        when, before = self._looks[0] if self._looks else (self._num_steps, [])
        past: list[float | None] = [float(norm) for norm in before] or [None] * len(now)
        groups = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
        return tuple(
            WeightGrowth(
                name,
                norm,
                norm_before,
                self._num_steps - when,
                _update(optimizer, groups[id(parameter)], parameter, last_norms.get(name, 0.0)),
                parameter.dim() >= 2,
            )
            for (name, parameter), norm, norm_before in zip(self._named, now, past, strict=True)
            if id(parameter) in groups
        )


def _norms(tensors: Sequence[Tensor]) -> list[Tensor]:
    values = [getattr(tensor, "_local_tensor", tensor).detach() for tensor in tensors]
    return list(torch._foreach_norm(values)) if values else []


def _update(optimizer: Optimizer, group: Mapping[str, object], parameter: Tensor, last_norm: float) -> float:
    """Norm of the last update, without weight decay."""
    state = optimizer.state.get(parameter, {})
    rate = float(group["lr"])  # type: ignore[arg-type]
    if "exp_avg" in state and "exp_avg_sq" in state:
        beta1, beta2 = group["betas"]  # type: ignore[misc]
        step = float(state["step"])
        mean = state["exp_avg"] / (1 - beta1**step)  # type: ignore[has-type]
        square = state["exp_avg_sq"] / (1 - beta2**step)  # type: ignore[has-type]
        return rate * float((mean / (square.sqrt() + float(group["eps"]))).norm())  # type: ignore[arg-type]
    momentum = state.get("momentum_buffer")
    return rate * (last_norm if momentum is None else float(momentum.norm()))
