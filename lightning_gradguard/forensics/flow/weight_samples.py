"""A few elements of each weight, to see by how much a step moves it."""

from __future__ import annotations

import ctypes
import operator
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_gradguard.measure.weights import has_norm

_SAMPLE = 128
"""Elements of each matrix that are compared from step to step."""


class WeightSamples:
    """Copies of a few elements of each matrix of an optimizer, from before its last step that was applied."""

    def __init__(self, named: Sequence[tuple[str, Tensor]], optimizer: Optimizer) -> None:
        self._all = _parameters_of(optimizer)
        mine = set(map(id, self._all))
        self._parameters = [it for _, it in named if id(it) in mine and it.dim() >= 2 and _is_plain(it)]
        self._views = [self.pick(parameter) for parameter in self._parameters]
        self._addresses = [parameter.data_ptr() for parameter in self._parameters]
        self._copies = [torch.empty_like(view, memory_format=torch.contiguous_format) for view in self._views]
        # Where numpy knows device and dtype, plain memory is copied, in a fraction of the time that a kernel takes.
        # It is torch's, which may free it: `is_in_place` has to be asked each time before it is read.
        self._memory: list[tuple[memoryview, memoryview]] = []
        if _can_share(self._views):
            pairs = zip(self._copies, self._views, strict=True)
            self._memory = [(_memory_of(copy), _memory_of(view)) for copy, view in pairs]

    @property
    def is_in_place(self) -> bool:
        """Whether the memory of the samples is still there: a storage that is shared or resized gets other memory."""
        return [view.data_ptr() for view in self._views] == self._addresses

    def is_of(self, optimizer: Optimizer) -> bool:
        """Whether the optimizer has the same parameters in the same place in memory as then."""
        now = _parameters_of(optimizer)
        is_same = len(now) == len(self._all) and all(map(operator.is_, now, self._all))
        return is_same and [parameter.data_ptr() for parameter in self._parameters] == self._addresses

    @staticmethod
    def pick(tensor: Tensor) -> Tensor:
        """Elements spread evenly over the storage of a dense tensor, as a view."""
        count = min(_SAMPLE, tensor.numel())
        return tensor.detach().as_strided((count,), (tensor.numel() // count,), tensor.storage_offset())

    def take(self) -> None:
        """Copy the elements as they are now; only where `is_in_place`."""
        for copy, view in self._memory:
            copy[:] = view
        if self._views and not self._memory:
            torch._foreach_copy_(self._copies, self._views)

    def compare(self, parameter: Tensor) -> tuple[Tensor, Tensor] | None:
        """The elements then and now, float32; None where the parameter has other storage by now."""
        for it, view, address, copy in zip(self._parameters, self._views, self._addresses, self._copies, strict=True):
            if it is parameter:
                return (copy.float(), view.float()) if it.data_ptr() == address else None
        return None


def _parameters_of(optimizer: Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _can_share(views: Sequence[Tensor]) -> bool:
    """Whether all are of one of numpy's dtypes, on the CPU."""
    dtypes = {(view.device.type, view.dtype) for view in views}
    return dtypes in ({("cpu", torch.float32)}, {("cpu", torch.float64)})


def _memory_of(tensor: Tensor) -> memoryview:
    """The elements as they are whenever they are looked at; it does not keep them alive."""
    # `Tensor.numpy` would, but no storage that numpy has seen can ever be resized again.
    size = tensor.element_size()
    (count,), (stride,) = tensor.shape, tensor.stride()
    memory = memoryview((ctypes.c_char * (((count - 1) * stride + 1) * size)).from_address(tensor.data_ptr()))
    dtype = np.float32 if tensor.dtype is torch.float32 else np.float64
    return memoryview(np.ndarray((count,), dtype, memory, strides=(stride * size,)))


def _is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is an ordinary one whose storage has no gaps."""
    if not has_norm(tensor) or type(tensor) not in (Tensor, torch.nn.Parameter):
        return False
    if not tensor.untyped_storage().nbytes():  # freed for the time being
        return False
    span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return 0 < tensor.numel() == span
