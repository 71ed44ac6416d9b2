"""Agreement between ranks: what each holds of a sharded gradient, and one sum over all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

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
