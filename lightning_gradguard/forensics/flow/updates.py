"""How far a single update of an optimizer moves a weight: exactly where its state tells, else at most."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

Group = Mapping[str, Any]


@dataclass(frozen=True)
class AppliedStep:
    """One update of a weight that was applied.

    Attributes:
        rate: learning rate.
        grad_norm: norm of its gradient before clipping, which only makes it smaller; None if not known.
    """

    rate: float
    grad_norm: float | None


def reach(
    optimizer: Optimizer,
    group: Group,
    steps: Iterable[AppliedStep],
    *,
    num_elements: int,
    norm: float,
    momentum: float,
) -> float | None:
    """The most by which updates can have made a weight's norm larger; None where no bound is known.

    Only torch's own optimizers are known, and not their subclasses, which may do anything.

    Args:
        optimizer: which made the updates.
        group: of the weight.
        steps: the updates, oldest first.
        num_elements: of the weight.
        norm: of the weight before the first of them.
        momentum: norm of its momentum buffer before the first of them; only SGD needs it.

    References:
        D. Kingma, J. Ba, "Adam: A Method for Stochastic Optimization", arXiv:1412.6980, 2014 (section 2.1)
    """
    steps = list(steps)
    decay = float(group.get("weight_decay", 0.0))
    if decay < 0.0 or any(not 0.0 <= step.rate * decay <= 1.0 for step in steps):
        return None  # such a decay makes weights grow
    if type(optimizer) is torch.optim.SGD:
        return _reach_of_sgd(group, steps, norm, momentum)
    element = _ELEMENTS.get(type(optimizer))
    most = None if element is None else element(group)
    return None if most is None else sum(step.rate for step in steps) * most * math.sqrt(num_elements)


def _reach_of_sgd(group: Group, steps: Iterable[AppliedStep], norm: float, momentum: float) -> float | None:
    factor, decay = float(group["momentum"]), float(group["weight_decay"])
    if float(group["dampening"]) < 0.0:
        return None
    total, buffer = 0.0, momentum
    for step in steps:
        if step.grad_norm is None or not math.isfinite(step.grad_norm):
            return None
        # Without momentum a decay only makes it smaller; with momentum it is in the buffer, and may overshoot.
        gradient = step.grad_norm + (decay * (norm + total) if factor else 0.0)
        buffer = factor * buffer + gradient
        total += step.rate * (gradient + factor * buffer if group["nesterov"] else buffer)
    return total


def _adam(group: Group) -> float | None:
    """The most that |m| / sqrt(v) comes to, by the Cauchy-Schwarz inequality; bias correction makes it smaller."""
    beta1, beta2 = (float(beta) for beta in group["betas"])
    ratio = beta1 * beta1 / beta2 if beta2 > 0.0 else math.inf
    if ratio >= 1.0 or beta2 >= 1.0:
        return None
    return max(1.0, (1.0 - beta1) / math.sqrt(1.0 - beta2) / math.sqrt(1.0 - ratio))


def _adamax(group: Group) -> float | None:
    beta1, beta2 = (float(beta) for beta in group["betas"])
    return max(1.0, (1.0 - beta1) / (1.0 - beta1 / beta2)) if beta1 < beta2 else None


def _rmsprop(group: Group) -> float | None:
    alpha, momentum = float(group["alpha"]), float(group["momentum"])
    if group["centered"] or alpha >= 1.0 or not 0.0 <= momentum < 1.0:
        return None  # a centred second moment can be almost nothing beside the gradient
    return 1.0 / math.sqrt(1.0 - alpha) / (1.0 - momentum)


def _adagrad(group: Group) -> float | None:  # noqa: ARG001
    return 1.0


_ELEMENTS: dict[type[Optimizer], Callable[[Group], float | None]] = {
    torch.optim.Adam: _adam,
    torch.optim.AdamW: _adam,
    torch.optim.Adamax: _adamax,
    torch.optim.RMSprop: _rmsprop,
    torch.optim.Adagrad: _adagrad,
}
"""How far one element moves at most, in learning rates, whatever its gradients were."""


def last_update(optimizer: Optimizer, parameter: Tensor, group: Group, rate: float, pick: Callable[[Tensor], Tensor]) -> Any:
    """The last update of some elements of a weight without decoupled decay, as the optimizer's state tells it.

    Args:
        optimizer: which made it.
        parameter: the weight.
        group: of the weight.
        rate: the learning rate then.
        pick: chooses the elements from a tensor with the layout of the weight.

    Returns:
        A tensor, float32; None where the state does not tell.
    """
    state = optimizer.state.get(parameter, {})
    if type(optimizer) is torch.optim.SGD and not group["nesterov"]:
        buffer = state.get("momentum_buffer")
        return None if buffer is None else rate * pick(buffer).float()
    if type(optimizer) not in (torch.optim.Adam, torch.optim.AdamW) or "exp_avg" not in state:
        return None
    beta1, beta2 = (float(beta) for beta in group["betas"])
    step = float(state["step"])
    mean = pick(state["exp_avg"]).float() / (1 - beta1**step)
    square = pick(state["max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"]).float() / (1 - beta2**step)
    return rate * mean / (square.sqrt() + float(group["eps"]))


def decay_factor(optimizer: Optimizer, group: Group, rate: float) -> float | None:
    """What weight decay alone multiplies a weight by in one step; None where an optimizer scales it like a gradient."""
    decay = float(group.get("weight_decay", 0.0))
    if not decay:
        return 1.0
    if type(optimizer) is torch.optim.SGD:
        momentum = float(group["momentum"])
        return max(1.0 - rate * decay / max(1.0 - momentum, rate * decay), 0.0)
    if type(optimizer) is torch.optim.AdamW or group.get("decoupled_weight_decay"):
        return max(1.0 - rate * decay, 0.0)
    return None
