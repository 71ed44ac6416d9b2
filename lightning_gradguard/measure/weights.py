"""How large the weights are, and how far a step moves them, at the steps that are logged."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_gradguard.measure.distributed import is_sharded
from lightning_gradguard.measure.gradients import to_device
from lightning_gradguard.measure.sample import sample, sample_stride
from lightning_gradguard.measure.shards import Parameter

_SAMPLE_SIZE = 1024


class WeightMeter:
    """Measures the 2-norm of all weights, and of the last update over it, for the logs only: nothing is judged by it.

    The update is estimated from up to 1,024 evenly spaced elements of each tensor, kept from one step to the next; a copy of
    all weights would take as much memory as they do. No sync.
    """

    def __init__(self) -> None:
        self._sampled: Sequence[Parameter] = ()
        self._before: list[Tensor] = []

    @torch.no_grad()
    def start_(self, parameters: Sequence[Parameter]) -> None:
        """Before a step: keep the sample."""
        self.forget()
        if not can_measure(parameters):
            return
        self._before = [_sample(parameter).clone() for parameter in parameters]
        self._sampled = parameters

    def forget(self) -> None:
        """Drop the sample: the next step is not logged."""
        self._sampled, self._before = (), []

    @torch.no_grad()
    def read_(self, parameters: Sequence[Parameter]) -> Tensor | None:
        """The norm of the weights, and the ratio of the step before, NaN where that was not measured, float32 [2].

        Returns:
            None where the weights are sharded or not plain numbers.
        """
        sampled, before = self._sampled, self._before
        self.forget()
        if not can_measure(parameters):
            return None
        device = parameters[0].device
        norm = torch.linalg.vector_norm(_norms(parameters, device))
        if sampled is not parameters:
            return torch.stack([norm, torch.full_like(norm, math.nan)])
        steps = torch._foreach_sub([_sample(parameter) for parameter in parameters], before)
        shares = [parameter.numel() / max(old.numel(), 1) for parameter, old in zip(parameters, before, strict=True)]
        moved = _norms(steps, device) * to_device(torch.tensor(shares), device).sqrt()
        return torch.stack([norm, torch.linalg.vector_norm(moved) / norm])


def can_measure(parameters: Sequence[Parameter]) -> TypeGuard[Sequence[Tensor]]:
    """Whether these are dense weights that this rank holds as a whole."""
    plain = all(isinstance(it, Tensor) and has_norm(it) for it in parameters)
    return bool(parameters) and plain and not is_sharded(list(parameters))


def has_norm(tensor: Tensor) -> bool:
    """Whether torch has a norm of it, in floating-point numbers."""
    # Subclasses that are not trained are mostly packed numbers, which have few operators.
    is_known = type(tensor) in (Tensor, nn.Parameter) or (tensor.requires_grad and not is_lazy(tensor))
    is_dense = is_known and tensor.layout is torch.strided and not tensor.is_nested
    return is_dense and tensor.is_floating_point() and tensor.dtype.itemsize > 1


def learning_rate(optimizer: torch.optim.Optimizer | None) -> float | None:
    """The largest learning rate of an optimizer's groups; None if it has none, or keeps it on a GPU. No sync."""
    rates = [group["lr"] for group in optimizer.param_groups if "lr" in group] if optimizer is not None else []
    here = [float(rate) for rate in rates if not isinstance(rate, Tensor) or rate.device.type == "cpu"]
    return max(here) if here and len(here) == len(rates) else None


def _norms(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """2-norm of each, float32 or wider [num_tensors]. No sync."""
    kinds = {(tensor.device, tensor.dtype) for tensor in tensors}
    if len(kinds) == 1:
        dtype = torch.promote_types(tensors[0].dtype, torch.float32)
        return torch.stack(torch._foreach_norm([tensor.detach() for tensor in tensors], 2.0, dtype=dtype))
    return torch.stack([to_device(_norms([tensor], tensor.device)[0], device, torch.float64) for tensor in tensors])


def _sample(parameter: Tensor) -> Tensor:
    return sample(parameter.detach(), sample_stride(parameter.numel(), parameter.shape, _SAMPLE_SIZE))
