"""Norms of single output units, where a rank may hold a piece of a unit only.

An output unit is an index of the first dimension; a vector or scalar is one unit. Sharding a matrix by rows leaves its units
whole; by columns, of vectors in any way, and by length, it leaves each rank a piece.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from lightning_gradguard.measure.distributed import Ranks, is_sharded
from lightning_gradguard.measure.shards import FlatShard, Parameter


def unit_norms(tensors: Sequence[Tensor], parameters: Sequence[Parameter], dtype: torch.dtype) -> list[Tensor]:
    """2-norm of what this rank holds of each output unit, in `dtype` or wider. No sync.

    Args:
        tensors: what it holds, of gradients or weights.
        parameters: what they belong to.
        dtype: the narrowest that the norms may have.

    Returns:
        For a tensor norms in such a shape that they multiply it; for a shard one for each unit of the whole, [num_units].
    """
    return [
        _of_shard(tensor, parameter, torch.promote_types(tensor.dtype, dtype))
        if isinstance(parameter, FlatShard)
        else torch.linalg.vector_norm(
            tensor,
            dim=tuple(range(1, tensor.ndim)) or None,
            keepdim=True,
            dtype=torch.promote_types(tensor.dtype, dtype),
        )
        for tensor, parameter in zip(tensors, parameters, strict=True)
    ]


def spread(values: Sequence[Tensor], tensors: Sequence[Tensor], parameters: Sequence[Parameter]) -> list[Tensor]:
    """Bring values of units, as `unit_norms` shapes them, into such a shape that they multiply what is here. No sync."""
    return [
        _to_elements(value, tensor.numel(), parameter) if isinstance(parameter, FlatShard) else value
        for value, tensor, parameter in zip(values, tensors, parameters, strict=True)
    ]


def sum_pieces_(norms: Sequence[Tensor], parameters: Sequence[Parameter]) -> None:
    """From 2-norms of pieces of output units to those of whole units, in place.

    No sync. One collective for all shards; and one for each mesh and set of its dimensions by which units of DTensors are
    split, among those ranks.

    Args:
        norms: of what this rank holds, one tensor for each parameter.
        parameters: whose placements, or whose gradients', count.
    """
    if not is_sharded(parameters):
        return
    groups: dict[Any, list[Tensor]] = {}
    for norm, parameter in zip(norms, parameters, strict=True):
        if isinstance(parameter, FlatShard):
            norm.mul_(parameter.share**0.5)
            groups.setdefault((None, (), norm.dtype), []).append(norm)
        elif (split := _split_dims(parameter)) is not None:
            groups.setdefault((*split, norm.dtype), []).append(norm)
    for (mesh, dims, _), members in groups.items():
        squares = torch.cat([member.reshape(-1) for member in members]).square()
        if mesh is None:
            Ranks.current().sum_(squares)
        for dim in dims:
            dist.all_reduce(squares, group=mesh.get_group(dim))
        pieces = torch.split_with_sizes(squares.sqrt(), [member.numel() for member in members])
        for member, whole in zip(members, pieces, strict=True):
            member.copy_(whole.view_as(member))


def _split_dims(parameter: Tensor) -> tuple[Any, tuple[int, ...]] | None:
    """The mesh of a gradient, and its dimensions by which units are split; None where they are whole."""
    from torch.distributed.tensor import DTensor, Shard  # noqa: PLC0415

    grad = parameter.grad
    if not isinstance(grad, DTensor):
        return None
    dims = tuple(
        dim
        for dim, placement in enumerate(grad.placements)
        if not placement.is_replicate() and (grad.ndim <= 1 or not isinstance(placement, Shard) or placement.dim > 0)
    )
    return (grad.device_mesh, dims) if dims else None


def _of_shard(tensor: Tensor, shard: FlatShard, dtype: torch.dtype) -> Tensor:
    num_units, size = _units_of(shard)
    norms = torch.zeros(num_units, dtype=dtype.to_real(), device=tensor.device)
    if tensor.numel():
        first, front, back = _range_of(shard, tensor.numel())
        rows = torch.nn.functional.pad(tensor, (front, back)).view(-1, size)
        norms[first : first + len(rows)] = torch.linalg.vector_norm(rows, dim=1, dtype=dtype)
    return norms


def _to_elements(values: Tensor, numel: int, shard: FlatShard) -> Tensor:
    if not numel:
        return values[:0]
    size = _units_of(shard)[1]
    first, front, back = _range_of(shard, numel)
    num_rows = (front + numel + back) // size
    return values[first : first + num_rows].repeat_interleave(size)[front : front + numel]


def _units_of(shard: FlatShard) -> tuple[int, int]:
    """Number of units, and elements of each."""
    numel = shard.shape.numel()
    num_units = shard.shape[0] if shard.ndim > 1 else 1
    return num_units, numel // max(num_units, 1)


def _range_of(shard: FlatShard, numel: int) -> tuple[int, int, int]:
    """The first unit of which something is here, and how many elements are missing of the first and of the last one."""
    size = _units_of(shard)[1]
    first, front = divmod(shard.start, size)
    return first, front, -(front + numel) % size
