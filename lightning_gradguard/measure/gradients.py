"""The gradients of one optimizer's parameters: read, measured and changed in place.

Nothing here waits for the device; it all runs on `device="meta"` too, which proves that.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from lightning_gradguard.layout import Bools, Layout
from lightning_gradguard.measure.distributed import Ranks, local_shard_
from lightning_gradguard.measure.shards import Parameter

_WIDE = (torch.float64, torch.complex128)


class Gradients:
    """The gradients of some parameters, as dense tensors that can be measured and changed in place.

    A sparse gradient stands for its values in a coalesced copy, which takes its place only when it is changed: another order
    of summing would change a healthy training in the last bit. A DTensor stands for its local shard. Nothing else is copied.

    Args:
        parameters: tensors or shards with a `.grad` or None there.
        sharded: whether there are DTensors or shards among them.
        is_uniform: whether all are known to share device and dtype, which saves a look at each.
        names: one per parameter; empty: they go by their position.
        others: gradients of the same optimizer that are not measured, but must be finite, too.

    Attributes:
        present: which parameters have a gradient, bool [num_parameters].
        tensors: their gradients' values on this rank.
        shares: which share of each counts here in a sum over ranks, [num_tensors]; None where nothing is sharded.
        measured: 2-norm of each over all ranks, [num_tensors]; None where they were not measured, or changed since.
    """

    def __init__(
        self,
        parameters: Sequence[Parameter],
        *,
        sharded: bool = False,
        is_uniform: bool = False,
        names: Sequence[str] = (),
        others: Gradients | None = None,
    ) -> None:
        self.ranks = Ranks.current()
        self.others = others
        self.measured: Tensor | None = None
        self._parameters = parameters
        self._names = names
        self._is_uniform = is_uniform
        shares = None
        if sharded:
            shards = [local_shard_(parameter, self.ranks) for parameter in parameters]
            grads = [shard for shard, _ in shards]
            shares = [share for shard, share in shards if shard is not None]
        else:
            grads = [parameter.grad for parameter in parameters]
        self.present: Bools
        self.tensors = [grad for grad in grads if grad is not None]
        self._coalesced: dict[int, tuple[Parameter, Tensor]] = {}
        if True in [grad.is_sparse for grad in self.tensors]:
            grads = [grad if grad is None or not grad.is_sparse else grad.coalesce() for grad in grads]
            pairs = zip(parameters, grads, strict=True)
            sparse = [(parameter, grad, grad._values()) for parameter, grad in pairs if grad is not None and grad.is_sparse]
            self._coalesced = {id(values): (parameter, grad) for parameter, grad, values in sparse}
            values_of = {id(grad): values for _, grad, values in sparse}
            self.tensors = [values_of.get(id(grad), grad) for grad in grads if grad is not None]
        if len(self.tensors) == len(grads):
            self.present = all_of(len(grads))
        else:
            self.present = np.array([grad is not None for grad in grads], dtype=np.bool_)
        # Also where there is no gradient at all, the ranks have to sum on a device that their backend knows.
        some = self.tensors or parameters
        elsewhere = torch.device("cpu") if others is None else others.device
        self.device: torch.device = some[0].device if some else elsewhere
        self.shares = None if shares is None else torch.tensor(shares).to(self.device, non_blocking=True)

    @property
    def names(self) -> list[str]:
        """Of the parameters that have a gradient, [num_tensors]."""
        names = self._names or [str(index) for index in range(len(self.present))]
        return [name for name, is_here in zip(names, self.present.tolist(), strict=True) if is_here]

    @property
    def layout(self) -> Layout:
        """Names and sizes of all parameters."""
        names = self._names or [str(index) for index in range(len(self.present))]
        return Layout.of(names, (tuple(parameter.shape) for parameter in self._parameters))

    @property
    def parameters(self) -> list[Parameter]:
        """Those that have a gradient, as the user passed them, [num_tensors]."""
        return [it for it, is_here in zip(self._parameters, self.present.tolist(), strict=True) if is_here]

    def select(self, indices: Sequence[int]) -> Gradients:
        """Some of them, by their index in `tensors`, ascending; they share memory with these. No sync."""
        part = copy.copy(self)
        part.tensors = [self.tensors[index] for index in indices]
        part.present = np.zeros_like(self.present)
        part.present[np.flatnonzero(self.present)[list(indices)]] = True
        rows = torch.tensor(indices, dtype=torch.long)
        part.shares = None if self.shares is None else self.shares[to_device(rows, self.shares.device)]
        part.measured = None if self.measured is None else self.measured[to_device(rows, self.measured.device)]
        return part

    def tensor_norms(self, norm_type: float = 2.0) -> Tensor:
        """Norm of each gradient over all ranks, float32 or wider, [num_tensors].

        No sync; a pass over the gradients, and a collective where they are sharded, unless it has just been measured.
        """
        if norm_type == 2.0 and self.measured is not None:
            return self.measured
        norms = self.norms(norm_type)
        if self.shares is None:
            return norms
        present, rows = self.rows_of_all(norms)
        if norm_type == math.inf:
            return self.ranks.max_(rows.index_copy_(0, present, norms)).index_select(0, present)
        rows.index_copy_(0, present, norms**norm_type * self.shares)
        return self.ranks.sum_(rows).index_select(0, present) ** (1.0 / norm_type)

    def sum_shards(self, table: Tensor) -> Tensor:
        """Sum of what each rank counted of its part of each gradient, [num_tensors, n]. No sync; a collective if sharded."""
        if self.shares is None:
            return table
        present, rows = self.rows_of_all(table)
        rows.index_copy_(0, present, table * self.shares[:, None])
        return self.ranks.sum_(rows).index_select(0, present)

    def norms(self, norm_type: float = 2.0, *, wide: bool = False) -> Tensor:
        """Norm of what this rank holds of each gradient, on one device, [num_tensors]. No sync.

        In float32 or wider; with `wide` in float64, which also holds norms whose squares float32 can't hold.
        """
        if not self.tensors:
            return torch.zeros(0, device=self.device)
        groups = self._by_kind()
        if len(groups) == 1:
            (members,) = groups.values()
            return torch.stack(_norms(members, norm_type, wide=wide))
        dtype = torch.float64 if wide or any(dtype in _WIDE for _, dtype in groups) else torch.float32
        found = {
            id(tensor): norm
            for members in groups.values()
            for tensor, norm in zip(members, _norms(members, norm_type, wide=wide), strict=True)
        }
        return torch.stack([to_device(found[id(tensor)], self.device, dtype) for tensor in self.tensors])

    def total_norm(self, norm_type: float = 2.0, *, wide: bool = False) -> Tensor:
        """Norm over all gradients and ranks, scalar. No sync; a collective where gradients are sharded."""
        norms = self.norms(norm_type, wide=wide)
        if self.shares is None:
            return total(norms, norm_type)
        if norm_type == math.inf:
            return self.ranks.max_(total(norms, norm_type))
        return self.ranks.sum_((norms**norm_type * self.shares).sum()) ** (1.0 / norm_type)

    def local_total_norm(self) -> Tensor:
        """2-norm over what this rank holds, scalar; not finite exactly if something here isn't. No sync."""
        norm = total(self.norms(), 2.0)
        if self.others is None:
            return norm
        return norm + to_device(self.others.local_damage(), norm.device, norm.dtype)

    def local_damage(self) -> Tensor:
        """0 if everything that this rank holds is finite, else NaN, scalar. No sync."""
        return 0.0 * total(self.norms(math.inf), math.inf)

    def damage(self) -> Tensor:
        """The same over all ranks; a collective where gradients are sharded. No sync."""
        # A sum, since the largest of a NaN and a number is either, depending on the backend.
        return self.local_damage() if self.shares is None else self.ranks.sum_(self.local_damage())

    def scale_(self, coef: Tensor | float) -> None:
        """Multiply every gradient by one factor, in place. No sync where `coef` is on the gradients' device."""
        self.begin_change_()
        for (device, _), members in self._by_kind().items():
            factor = to_device(coef, device) if isinstance(coef, Tensor) else coef
            torch._foreach_mul_(to_scale(members), factor)

    def scale_each_(self, coefs: Sequence[float]) -> None:
        """Multiply each gradient by a factor of its own, in place; those with a factor of 1 are not touched. No sync."""
        self.begin_change_()
        scaled = [(tensor, coef) for tensor, coef in zip(self.tensors, coefs, strict=True) if coef != 1.0]
        if scaled:
            torch._foreach_mul_(to_scale([tensor for tensor, _ in scaled]), [coef for _, coef in scaled])

    def clamp_(self, limit: float) -> None:
        """Clamp every element to [-limit, limit], in place; real and imaginary part apart. NaN stays. No sync."""
        self.begin_change_()
        for members in self._by_kind().values():
            reals = [torch.view_as_real(member) if member.is_complex() else member for member in to_scale(members)]
            torch._foreach_clamp_min_(reals, -limit)
            torch._foreach_clamp_max_(reals, limit)

    def begin_change_(self) -> None:
        """Before `tensors` are written to: what was measured no longer holds, and coalesced copies replace their gradients.

        The methods here that change gradients call it; whoever writes to `tensors` has to.
        """
        self.measured = None
        for tensor in self.tensors if self._coalesced else ():
            if id(tensor) in self._coalesced:
                parameter, grad = self._coalesced[id(tensor)]
                parameter.grad = grad

    def rows_of_all(self, table: Tensor) -> tuple[Tensor, Tensor]:
        """Where the gradients' rows are among those of all parameters, and such rows, empty.

        Also of those without a gradient here, so that all ranks reduce tensors of one length.
        """
        present = torch.from_numpy(np.flatnonzero(self.present)).to(table.device, non_blocking=True)
        return present, table.new_zeros(len(self.present), *table.shape[1:])

    def _by_kind(self) -> dict[tuple[torch.device, torch.dtype], list[Tensor]]:
        if self._is_uniform and self.tensors:
            return {(self.device, self.tensors[0].dtype): self.tensors}
        groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        for tensor in self.tensors:
            groups.setdefault((tensor.device, tensor.dtype), []).append(tensor)
        return groups


@lru_cache(maxsize=64)
def all_of(number: int) -> Bools:
    """All True, and the same array for the same number: so that it is quickly seen that nothing is new."""
    flags = np.ones(number, dtype=np.bool_)
    flags.flags.writeable = False
    return flags


def to_device(tensor: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Move a tensor; towards a GPU without waiting, towards the CPU only once it is there to be read."""
    return tensor.to(device, dtype or tensor.dtype, non_blocking=device.type != "cpu")


def to_scale(tensors: list[Tensor]) -> list[Tensor]:
    """The memory of gradients, for changes that are the same for a number and its conjugate.

    Where autograd has only marked a complex gradient as conjugate, torch's kernels over lists refuse to write to it.
    """
    return [tensor.conj() if tensor.is_conj() else tensor for tensor in tensors]


def _norms(tensors: list[Tensor], norm_type: float, *, wide: bool = False) -> list[Tensor]:
    dtype = tensors[0].dtype
    if dtype.itemsize == 1:  # float8 has no arithmetic of its own
        tensors, dtype = [tensor.float() for tensor in tensors], torch.float32
    if norm_type == math.inf:  # an empty tensor has no largest element
        tensors = [tensor if tensor.numel() else tensor.new_zeros(1) for tensor in tensors]
    if wide and dtype not in _WIDE:
        tensors = [tensor.to(torch.promote_types(dtype, torch.float64)) for tensor in tensors]
    elif dtype in (torch.float16, torch.bfloat16):
        return list(torch._foreach_norm(tensors, norm_type, dtype=torch.float32))
    return list(torch._foreach_norm(tensors, norm_type))


def total(norms: Tensor, norm_type: float) -> Tensor:
    """Norm over all from the norms of each, as `torch.nn.utils.get_total_norm` computes it. No sync."""
    return torch.linalg.vector_norm(norms, norm_type) if norms.numel() else norms.new_zeros(())
