"""The fast path of a step: measured and clipped in one go, where it is as plain as most steps of most trainings are."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_gradguard.act.base import Executor
from lightning_gradguard.act.gate import Gate
from lightning_gradguard.act.on_host import OnHost
from lightning_gradguard.measure.distributed import Ranks
from lightning_gradguard.measure.gradients import all_of
from lightning_gradguard.measure.parameters import WatchedParameters
from lightning_gradguard.record import Measurement, OnePass

_LOSSES = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes of losses that float32 holds."""


class FastPath:
    """Measures and clips plain steps: the same kernels and figures as on the way through all stages, to the last bit.

    Plain is one backward pass on one process, with dense gradients in float32 on the CPU that have no graph, and are clipped
    by one factor, if at all. There the kernels take no longer than making what only other steps need: figures that wait on
    the device, shares of ranks, signs of several passes. None of it is made here.

    Args:
        parameters: of the optimizer.
        gate: of the optimizer.
    """

    def __init__(self, parameters: WatchedParameters, gate: Gate) -> None:
        self._parameters = parameters
        self._gate = gate
        self._gradients: list[Tensor] = []

    @classmethod
    def of(cls, parameters: WatchedParameters, gate: Gate, executor: Executor) -> FastPath | None:
        """Where steps can be plain; None elsewhere."""
        can_be_plain = type(executor) is OnHost and Ranks.current().size == 1 and gate.clips_on_host
        return cls(parameters, gate) if can_be_plain else None

    def measure(self, loss: Tensor | None) -> Measurement | None:
        """Measure the gradients; None if the step is not plain, or not finite.

        Args:
            loss: of the only backward pass.
        """
        watched = self._parameters
        if loss is None or not loss.is_cpu or loss.dtype not in _LOSSES or not watched.are_plain:
            return None
        gradients: list[Tensor] = []
        for parameter in watched.tensors:
            gradient = parameter.grad
            if gradient is None or gradient.is_sparse or gradient.requires_grad:
                return None
            gradients.append(gradient)
        norms = torch.stack(torch._foreach_norm(gradients))
        if norms.dtype is not torch.float32:  # the module has been cast since
            return None
        total_norm, last_loss = torch.linalg.vector_norm(norms).item(), loss.item()
        if not (math.isfinite(total_norm) and math.isfinite(last_loss)):
            return None
        self._gradients = gradients
        return OnePass.of(watched.layout, norms.tolist(), all_of(len(gradients)), total_norm, last_loss)

    def clip_(self, global_norm: float) -> float:
        """Clip what was measured last; the factor that it was clipped by."""
        gradients, self._gradients = self._gradients, []
        return self._gate.clip_on_host_(gradients, global_norm)
