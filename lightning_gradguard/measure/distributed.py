"""Agreement between ranks: what each holds of a sharded gradient, and one sum over all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch import distributed as dist

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


@dataclass(frozen=True)
class Ranks:
    """The processes that train together.

    Attributes:
        rank: this one.
        size: how many there are.
    """

    rank: int = 0
    size: int = 1

    @classmethod
    def current(cls) -> Ranks:
        """Those of torch's default process group; this one alone without a group."""
        if not (dist.is_available() and dist.is_initialized()):
            return cls()
        return cls(dist.get_rank(), dist.get_world_size())

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum over all ranks, in place. A collective; a no-op for one rank."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def max_(self, tensor: Tensor) -> Tensor:
        """Largest over all ranks, in place. A collective; a no-op for one rank."""
        if self.size > 1:
            dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return tensor


def is_sharded(tensors: Sequence[Tensor]) -> bool:
    """Whether any of them is a DTensor (FSDP2, tensor parallelism)."""
    if Ranks.current().size == 1:
        return False
    # Importing DTensor takes most of a second; whoever has one has imported it.
    from torch.distributed.tensor import DTensor  # noqa: PLC0415

    return any(isinstance(tensor, DTensor) for tensor in tensors)


def local_part(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor, sharing its memory. No sync, no collective."""
    if type(tensor) in (Tensor, torch.nn.Parameter) or not dist.is_available():
        return tensor
    from torch.distributed.tensor import DTensor  # noqa: PLC0415

    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_shard_(parameter: Tensor, ranks: Ranks) -> tuple[Tensor | None, float]:
    """What this rank holds of a parameter's gradient, and which share of it counts here.

    A shard that several ranks hold alike (replicas) must count once in a sum over all ranks. So each counts with the
    number of distinct shards over the number of ranks: 1 if sharded over all ranks, 1/4 for a plain tensor on four.
    A gradient that is still a partial sum is first summed and stored back (a collective of its own).

    Returns:
        The local tensor, sharing memory with `.grad`, and the share.
    """
    from torch.distributed.tensor import DTensor, Replicate  # noqa: PLC0415

    grad = parameter.grad
    if not isinstance(grad, DTensor):
        return grad, 1.0 / ranks.size
    if any(placement.is_partial() for placement in grad.placements):
        whole = [Replicate() if placement.is_partial() else placement for placement in grad.placements]
        grad = grad.redistribute(placements=whole)
        parameter.grad = grad
    return grad.to_local(), _num_shards(grad) / ranks.size


def local_weight(parameter: Tensor) -> Tensor:
    """What this rank holds of a parameter, in the shape of what it holds of its gradient. No sync.

    Of a parameter with a sparse gradient only the rows that the gradient has, copied; a collective only where a DTensor is
    laid out otherwise than its gradient.
    """
    weight, grad = parameter.detach(), parameter.grad
    assert grad is not None
    if grad.is_sparse:
        return weight[tuple(grad.coalesce()._indices())]
    if not is_sharded([parameter]):
        return weight
    from torch.distributed.tensor import DTensor  # noqa: PLC0415

    assert isinstance(weight, DTensor)
    assert isinstance(grad, DTensor)
    if weight.placements != grad.placements:
        weight = weight.redistribute(placements=grad.placements)
    return weight.to_local()


def local_share(parameter: Tensor, ranks: Ranks) -> tuple[Tensor, float]:
    """What this rank holds of a parameter, and which share of it counts in a sum over ranks; see `local_shard_`. No sync."""
    whole = parameter.detach()
    num_shards = _num_shards(whole) if is_sharded([whole]) else 1  # type: ignore[arg-type]
    return local_part(whole), num_shards / ranks.size


def sum_pieces_(norms: Sequence[Tensor], parameters: Sequence[Tensor]) -> None:
    """From 2-norms of pieces of output units to those of whole units, in place.

    An output unit is an index of the first dimension; a vector is one unit. Sharding a matrix by rows leaves its units
    whole; by columns, and of vectors in any way, it leaves each rank a piece. No sync; a collective for each mesh and set of
    its dimensions by which units are split, among those ranks.

    Args:
        norms: of what this rank holds, one tensor for each parameter.
        parameters: whose gradients' placements count.
    """
    if not is_sharded(parameters):
        return
    from torch.distributed.tensor import DTensor, Shard  # noqa: PLC0415

    groups: dict[Any, list[Tensor]] = {}
    for norm, parameter in zip(norms, parameters, strict=True):
        grad = parameter.grad
        if not isinstance(grad, DTensor):
            continue
        dims = tuple(
            dim
            for dim, placement in enumerate(grad.placements)
            if not placement.is_replicate() and (grad.ndim <= 1 or not isinstance(placement, Shard) or placement.dim > 0)
        )
        if dims:
            groups.setdefault((grad.device_mesh, dims, norm.dtype), []).append(norm)
    for (mesh, dims, _), members in groups.items():
        squares = torch.cat([member.reshape(-1) for member in members]).square()
        for dim in dims:
            dist.all_reduce(squares, group=mesh.get_group(dim))
        pieces = torch.split_with_sizes(squares.sqrt(), [member.numel() for member in members])
        for member, whole in zip(members, pieces, strict=True):
            member.copy_(whole.view_as(member))


def _num_shards(tensor: DTensor) -> int:
    distinct = 1
    for dimension, placement in enumerate(tensor.placements):
        if not placement.is_replicate():
            distinct *= tensor.device_mesh.size(dimension)
    return distinct


def gather(row: Tensor, ranks: Ranks) -> Tensor:
    """A matrix [num_ranks, len(row)] that holds this rank's row; its sum over ranks holds all of them."""
    if ranks.size == 1:
        return row.unsqueeze(0)
    rows = torch.zeros(ranks.size, row.numel(), dtype=row.dtype, device=row.device)
    rows[ranks.rank] = row
    return rows
