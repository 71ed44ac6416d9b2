"""From gradients to a `Measurement`: one pass of norms, one host read.

The only reader of `.grad`. It works in two halves. The device half (`Gradients`, `measure`) queues kernels and never
waits; it also runs on `device="meta"`, which proves that. The host half (`Facts.read`) makes the one copy, and looks
closer at single elements only when that copy shows an incident.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lightning_gradguard.layout import Bools, Floats, Layout
from lightning_gradguard.record import Measurement, MicroBatch, ParameterReport

_WIDE = (torch.float64, torch.complex128)


class Gradients:
    """The gradients of some parameters, as dense tensors that can be measured and changed in place.

    A sparse gradient is coalesced (and stored back), then stands for its values. Nothing is cloned.

    Args:
        parameters: tensors with a `.grad` or None there.

    Attributes:
        present: which parameters have a gradient, bool [num_parameters].
        tensors: their gradients' values.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        grads = [parameter.grad for parameter in parameters]
        if any(grad is not None and grad.is_sparse for grad in grads):
            grads = [_coalesce_(parameter) for parameter in parameters]
        self.tensors = [grad for grad in grads if grad is not None]
        self.present: Bools = np.fromiter((grad is not None for grad in grads), dtype=np.bool_, count=len(grads))

    def norms(self, norm_type: float = 2.0) -> Tensor:
        """Norm of each gradient, in float32 or wider, on the first gradient's device, [num_tensors]. No sync."""
        if not self.tensors:
            return torch.zeros(0)
        groups = self._by_kind()
        if len(groups) == 1:
            (members,) = groups.values()
            return torch.stack(_norms(members, norm_type))
        device = self.tensors[0].device
        dtype = torch.float64 if any(dtype in _WIDE for _, dtype in groups) else torch.float32
        found = {
            id(tensor): norm
            for members in groups.values()
            for tensor, norm in zip(members, _norms(members, norm_type), strict=True)
        }
        return torch.stack([found[id(tensor)].to(device, dtype, non_blocking=True) for tensor in self.tensors])

    def total_norm(self, norm_type: float = 2.0) -> Tensor:
        """Norm over all gradients, scalar. Computed as `torch.nn.utils.get_total_norm` does. No sync."""
        return _total(self.norms(norm_type), norm_type)

    def scale_(self, coef: Tensor | float) -> None:
        """Multiply every gradient by one factor, in place. No sync where `coef` is on the gradients' device."""
        for (device, _), members in self._by_kind().items():
            factor = coef.to(device, non_blocking=True) if isinstance(coef, Tensor) else coef
            torch._foreach_mul_(members, factor)

    def clamp_(self, limit: float) -> None:
        """Clamp every element to [-limit, limit], in place; real and imaginary part apart. NaN stays. No sync."""
        for members in self._by_kind().values():
            reals = [torch.view_as_real(member) if member.is_complex() else member for member in members]
            torch._foreach_clamp_min_(reals, -limit)
            torch._foreach_clamp_max_(reals, limit)

    def _by_kind(self) -> dict[tuple[torch.device, torch.dtype], list[Tensor]]:
        groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        for tensor in self.tensors:
            groups.setdefault((tensor.device, tensor.dtype), []).append(tensor)
        return groups


def _coalesce_(parameter: Tensor) -> Tensor | None:
    grad = parameter.grad
    if grad is None or not grad.is_sparse:
        return grad
    parameter.grad = grad.coalesce()
    return parameter.grad._values()


def _norms(tensors: list[Tensor], norm_type: float) -> list[Tensor]:
    dtype = tensors[0].dtype
    if dtype.itemsize == 1:  # float8 has no arithmetic of its own
        tensors, dtype = [tensor.float() for tensor in tensors], torch.float32
    if norm_type == math.inf:  # an empty tensor has no largest element
        tensors = [tensor if tensor.numel() else tensor.new_zeros(1) for tensor in tensors]
    if dtype in (torch.float16, torch.bfloat16):
        return list(torch._foreach_norm(tensors, norm_type, dtype=torch.float32))
    return list(torch._foreach_norm(tensors, norm_type))


def _total(norms: Tensor, norm_type: float) -> Tensor:
    return torch.linalg.vector_norm(norms, norm_type) if norms.numel() else norms.new_zeros(())


@dataclass(frozen=True, eq=False)
class PendingMicroBatch:
    """A backward pass whose figures are still on the device.

    Attributes:
        loss: the loss it started from, scalar; None if unknown.
        total_norm: norm of the gradients accumulated so far, scalar; None for the last of a step.
    """

    loss: Tensor | None = None
    total_norm: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Facts:
    """What the device half found, still on the device.

    Attributes:
        norms: 2-norm of each gradient, float32 or wider [num_tensors].
        total_norm: 2-norm over all, scalar, same dtype and device.
        micro_batches: the backward passes of this step, in order.
    """

    norms: Tensor
    total_norm: Tensor
    micro_batches: tuple[PendingMicroBatch, ...] = ()

    def read(self, gradients: Gradients, layout: Layout) -> Measurement:
        """Bring the facts to the host in one copy (one sync) and judge what they can't say from the gradients."""
        values = self._packed().to("cpu", torch.float64).numpy()
        count = self.norms.numel()
        micro_batches = self._unpack_micro_batches(values[count + 1 :])
        norms: Floats = np.zeros(len(layout.names))
        norms[gradients.present] = values[:count]
        total = float(values[count])
        if math.isfinite(total):
            return Measurement(layout, norms, gradients.present, total, micro_batches)
        return _inspect(gradients, layout, norms, micro_batches)

    def _packed(self) -> Tensor:
        extras = [
            value.detach().reshape(1).to(self.norms.device, self.norms.dtype, non_blocking=True)
            for micro in self.micro_batches
            for value in (micro.loss, micro.total_norm)
            if value is not None
        ]
        return torch.cat([self.norms, self.total_norm.reshape(1), *extras])

    def _unpack_micro_batches(self, values: Floats) -> tuple[MicroBatch, ...]:
        remaining = iter(values.tolist())
        return tuple(
            MicroBatch(
                loss=None if micro.loss is None else next(remaining),
                global_norm=None if micro.total_norm is None else next(remaining),
            )
            for micro in self.micro_batches
        )


def measure(gradients: Gradients, micro_batches: Sequence[PendingMicroBatch] = ()) -> Facts:
    """The device half: one pass over the gradients. Rank-local, changes nothing, never waits for the device."""
    norms = gradients.norms()
    return Facts(norms, _total(norms, 2.0), tuple(micro_batches))


def _inspect(gradients: Gradients, layout: Layout, norms: Floats, micro_batches: tuple[MicroBatch, ...]) -> Measurement:
    """Look at single elements, since the norm is not finite: damage, or only too large for float32?

    Reads the host a few times and allocates; it runs on an incident only.
    """
    indices = np.flatnonzero(gradients.present)
    counts = torch.stack([_count(tensor).cpu() for tensor in gradients.tensors]).numpy()
    num_nan, num_inf, max_abs = counts.T
    damaged = num_nan + num_inf > 0
    for position in np.flatnonzero(~np.isfinite(norms[indices]) & ~damaged):
        norms[indices[position]] = _scaled_norm(gradients.tensors[position])
    reports = [
        ParameterReport(layout.names[indices[position]], float(norms[indices[position]]), int(nans), int(infs))
        for position, (nans, infs) in enumerate(zip(num_nan, num_inf, strict=True))
        if damaged[position]
    ]
    if num_nan.any():
        global_norm = math.nan
    elif num_inf.any():
        global_norm = math.inf
    else:
        largest = norms.max()
        global_norm = float(largest * np.linalg.norm(norms / largest))
    return Measurement(
        layout,
        norms,
        gradients.present,
        global_norm,
        micro_batches,
        nonfinite=tuple(sorted(reports, key=lambda report: -(report.num_nan + report.num_inf))),
        overflowed=not reports,
        max_abs=float(max_abs.max()),
    )


def _count(tensor: Tensor) -> Tensor:
    """[number of NaN, number of infinities, largest finite magnitude] of a tensor, float64 [3]."""
    magnitude = tensor.abs() if tensor.dtype.itemsize > 1 else tensor.float().abs()
    num_nan, num_inf = magnitude.isnan().sum(), magnitude.isinf().sum()
    finite = torch.where(magnitude.isfinite(), magnitude, 0)
    largest = finite.max() if finite.numel() else finite.new_zeros(())
    return torch.stack([num_nan.double(), num_inf.double(), largest.double()])


def _scaled_norm(tensor: Tensor) -> float:
    """2-norm of a finite tensor whose squares overflow."""
    magnitude = tensor.abs().double()
    largest = magnitude.max()
    return float(largest * torch.linalg.vector_norm(magnitude / largest))
