"""Whether tensors hold NaN or infinities, in one pass over each."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from lightning_gradguard.measure.distributed import local_part

_COMPRESSED = (torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)


@torch.no_grad()
def find_nonfinite(named: Iterable[tuple[str, Tensor]], *, may_be_infinite: bool = False) -> list[str]:
    """The names of those that hold NaN or infinities. Rank-local; one sync a device.

    The extremes of a tensor are NaN where an element is; unlike a sum they can't overflow.

    Args:
        named: tensors by name; those of whole numbers, empty ones, and those of lazy modules that have no values yet, are
            passed over.
        may_be_infinite: whether infinities are in order, as in the buffer of an attention mask.
    """
    pairs = [(name, _extremes(tensor)) for name, tensor in named if not is_lazy(tensor)]
    found = [(name, *extremes) for name, extremes in pairs if extremes is not None]
    by_device: dict[torch.device, list[Tensor]] = {}
    for _, low, high in found:
        by_device.setdefault(low.device, []).extend((low.double(), high.double()))
    values = {device: iter(torch.stack(extremes).tolist()) for device, extremes in by_device.items()}
    read = [(name, next(values[low.device]), next(values[low.device])) for name, low, _ in found]
    if may_be_infinite:
        return [name for name, low, _ in read if math.isnan(low)]
    return [name for name, low, high in read if not (math.isfinite(low) and math.isfinite(high))]


def _extremes(tensor: Tensor) -> tuple[Tensor, Tensor] | None:
    """Least and largest element; None where there is no NaN among them, or where torch can't tell."""
    try:
        readable = _readable(local_part(tensor.detach()))
        return None if readable is None or not readable.numel() else readable.aminmax()
    except (NotImplementedError, TypeError):  # of numbers that are packed, of subclasses without the operator
        return None


def _readable(tensor: Tensor) -> Tensor | None:
    """Its values as dense real numbers; None where there can be no NaN among them, or they can't be read."""
    if tensor.is_nested:
        tensor = tensor.values() if tensor.layout is torch.jagged else torch.cat([it.reshape(-1) for it in tensor.unbind()])
    if tensor.layout is torch.sparse_coo:
        tensor = tensor._values()
    elif tensor.layout in _COMPRESSED:
        tensor = tensor.values()
    elif tensor.is_mkldnn:
        tensor = tensor.to_dense()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    if not tensor.is_floating_point() or tensor.is_meta:  # quantised numbers are none of floating point
        return None
    return tensor.float() if tensor.element_size() == 1 else tensor  # float8 has no arithmetic
