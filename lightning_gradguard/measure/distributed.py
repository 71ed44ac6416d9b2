"""Agreement between ranks: what each holds of a sharded gradient, and one sum over all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch import distributed as dist

from lightning_gradguard.measure.shards import FlatShard, Parameter

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
        if not (_IS_AVAILABLE and dist.is_initialized()):
            return _ALONE
        return cls(dist.get_rank(), dist.get_world_size())

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum over all ranks, in place. A collective; a no-op for one rank."""
        return self._reduce_(tensor, dist.ReduceOp.SUM) if self.size > 1 else tensor

    def max_(self, tensor: Tensor) -> Tensor:
        """Largest over all ranks, in place. A collective; a no-op for one rank."""
        return self._reduce_(tensor, dist.ReduceOp.MAX) if self.size > 1 else tensor

    def _reduce_(self, tensor: Tensor, op: Any) -> Tensor:
        # Gradients that are offloaded to the CPU are measured there, where NCCL can't reach.
        if tensor.device.type == "cpu" and dist.get_backend() == "nccl":
            on_gpu = tensor.cuda()
            dist.all_reduce(on_gpu, op)
            return tensor.copy_(on_gpu)
        dist.all_reduce(tensor, op)
        return tensor


_IS_AVAILABLE = dist.is_available()
_ALONE = Ranks()


def is_sharded(tensors: Sequence[Parameter]) -> bool:
    """Whether a rank may hold a part only of any of them: DTensors (FSDP2, tensor parallelism) and shards."""
    if any(isinstance(tensor, FlatShard) for tensor in tensors):
        return True
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


def local_shard_(parameter: Parameter, ranks: Ranks) -> tuple[Tensor | None, float]:
    """What this rank holds of a parameter's gradient, and which share of it counts here.

    A shard that several ranks hold alike (replicas) must count once in a sum over all ranks. So each counts with the
    number of distinct shards over the number of ranks: 1 if sharded over all ranks, 1/4 for a plain tensor on four.
    A gradient that is still a partial sum is first summed and stored back (a collective of its own).

    Returns:
        The local tensor, sharing memory with `.grad`, and the share.
    """
    if isinstance(parameter, FlatShard):
        return parameter.grad, parameter.share
    from torch.distributed.tensor import DTensor, Replicate  # noqa: PLC0415

    grad = parameter.grad
    if not isinstance(grad, DTensor):
        return grad, 1.0 / ranks.size
    if any(placement.is_partial() for placement in grad.placements):
        whole = [Replicate() if placement.is_partial() else placement for placement in grad.placements]
        grad = grad.redistribute(placements=whole)
        parameter.grad = grad
    return grad.to_local(), _num_shards(grad) / ranks.size


def local_weight(parameter: Parameter) -> Tensor:
    """What this rank holds of a parameter, in the shape of what it holds of its gradient. No sync.

    Of a parameter with a sparse gradient only the rows that the gradient has, copied; a collective only where a DTensor is
    laid out otherwise than its gradient.
    """
    if isinstance(parameter, FlatShard):
        return parameter.weight()
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


def local_share(parameter: Parameter, ranks: Ranks) -> tuple[Tensor, float]:
    """What this rank holds of a parameter, and which share of it counts in a sum over ranks; see `local_shard_`. No sync."""
    if isinstance(parameter, FlatShard):
        return parameter.weight(), parameter.share
    whole = parameter.detach()
    num_shards = _num_shards(whole) if is_sharded([whole]) else 1  # type: ignore[arg-type]
    return local_part(whole), num_shards / ranks.size


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
