"""Which sample each element of a tensor belongs to.

A label is an int32 tensor with as many dimensions as the tensor that it is of, and one entry along each dimension in which
it does not vary. Its values: sample + 1, or `NONE`, `MANY`, `UNKNOWN`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

NONE = 0
"""Depends on no sample, as a weight does."""
MANY = -1
"""Depends on several samples, as a mean over them does."""
UNKNOWN = -2
"""It can't be told on which samples it depends, or on which of two that have met."""
_MAX_ELEMENTS = 2**22
"""Labels of more elements are not worked out one by one."""

Geometry = tuple[int, tuple[int, ...], tuple[int, ...]]


class RowLabels:
    """The labels of all tensors of a step; of storages there are weak references only."""

    def __init__(self) -> None:
        self._views: dict[int, dict[Geometry, Tensor]] = {}
        self._storages: dict[int, StorageWeakRef] = {}

    def get(self, tensor: Tensor) -> Tensor | None:
        """A tensor's label; None if it depends on no sample."""
        if not self._views or not _is_plain(tensor):
            return None
        views = self._views.get(tensor.untyped_storage()._cdata)
        if not views:
            return None
        found = views.get(_geometry(tensor))
        if found is not None:
            return found
        base = _widest(views)
        return _part((base, views[base]), tensor)

    def put(self, tensor: Tensor, label: Tensor | None) -> None:
        """Say what a tensor's label is, of one that was just made."""
        if not _is_plain(tensor):
            return
        storage = tensor.untyped_storage()
        if label is None:
            self._views.pop(storage._cdata, None)
            return
        # The weak reference keeps the storage's address from being used again.
        if storage._cdata not in self._storages:
            self._storages[storage._cdata] = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
        self._views.setdefault(storage._cdata, {})[_geometry(tensor)] = label

    def overwrite(self, tensor: Tensor, label: Tensor | None) -> None:
        """Say what a tensor's label is that was written in place: other views of its storage see it too."""
        if not _is_plain(tensor):
            return
        before = self.get(tensor)
        if label is not None and before is not None and before.shape == label.shape and torch.equal(before, label):
            return
        storage = tensor.untyped_storage()
        views = self._views.get(storage._cdata, {})
        if tensor.numel() * tensor.element_size() >= storage.nbytes():
            self._views.pop(storage._cdata, None)
            if label is not None:
                self.put(tensor, label)
            return
        if not any(_is_dense(shape, stride) for _, shape, stride in views):
            if label is None and not views:
                return
            length = storage.nbytes() // tensor.element_size()
            views = {(0, (length,), (1,)): _uniform(UNKNOWN if views else NONE, 1)}
            self._storages[storage._cdata] = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
        base = _widest(views)
        changed = _with_part((base, views[base]), tensor, label)
        self._views[storage._cdata] = {base: changed}


def _is_plain(tensor: Tensor) -> bool:
    # A subclass may carry attributes; one with a dispatch of its own may hold its values elsewhere.
    is_known = type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__ and tensor.layout is torch.strided
    return is_known and tensor.device.type != "meta"


def _geometry(tensor: Tensor) -> Geometry:
    return int(tensor.storage_offset()), tuple(tensor.shape), tuple(tensor.stride())


def _widest(views: dict[Geometry, Tensor]) -> Geometry:
    """The view that covers most of a storage."""
    return max(views, key=lambda it: (_is_dense(it[1], it[2]), torch.Size(it[1]).numel()))


def _part(whole: tuple[Geometry, Tensor], tensor: Tensor) -> Tensor | None:
    """The label of a part of a storage, from that of the whole."""
    (offset, shape, stride), label = whole
    if label.numel() == 1:
        return label.reshape([1] * tensor.dim())
    if not _is_dense(shape, stride) or torch.Size(shape).numel() > _MAX_ELEMENTS or tensor.storage_offset() < offset:
        return unknown(tensor)
    flat = label.expand(shape).contiguous()
    try:
        return compressed(flat.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset() - offset))
    except RuntimeError:  # it reaches beyond
        return unknown(tensor)


def _with_part(whole: tuple[Geometry, Tensor], tensor: Tensor, label: Tensor | None) -> Tensor:
    (offset, shape, stride), before = whole
    if not _is_dense(shape, stride) or torch.Size(shape).numel() > _MAX_ELEMENTS or tensor.storage_offset() < offset:
        return _uniform(UNKNOWN, len(shape))
    flat = before.expand(shape).clone(memory_format=torch.contiguous_format)
    part = flat.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset() - offset)
    part.copy_(_uniform(NONE, tensor.dim()) if label is None else label)
    return compressed(flat)


def _is_dense(shape: Sequence[int], stride: Sequence[int]) -> bool:
    expected = 1
    for length, step in zip(reversed(shape), reversed(stride), strict=True):
        if length != 1 and step != expected:
            return False
        expected *= length
    return True


def _uniform(value: int, num_dims: int) -> Tensor:
    return torch.full([1] * num_dims, value, dtype=torch.int32)


def unknown(tensor: Tensor) -> Tensor:
    """The label of a tensor of which nothing can be told."""
    return _uniform(UNKNOWN, tensor.dim())


def along(samples: Tensor, num_dims: int, dim: int) -> Tensor:
    """A label that varies in one dimension only.

    Args:
        samples: for each place in it the sample, from 0; -1: of none.
        num_dims: dimensions of the tensor.
        dim: which.
    """
    return (samples.to("cpu", torch.int32) + 1).reshape([-1 if index == dim else 1 for index in range(num_dims)])


def compressed(label: Tensor) -> Tensor:
    """The same with one entry along each dimension in which it does not vary."""
    for dim in range(label.dim() - 1, -1, -1):
        if label.shape[dim] > 1:
            first = label.narrow(dim, 0, 1)
            if label.stride(dim) == 0 or bool((label == first).all()):
                label = first
    return label


def combined(labels: Iterable[Tensor | None]) -> tuple[Tensor | None, bool]:
    """The label of what is made of several tensors element by element, and whether different samples meet in it.

    Beside one sample's value, what depends on many is a statistic: it counts as that sample's. Where two samples meet it is
    not known which of them is to blame for what comes out.
    """
    result: Tensor | None = None
    has_met = False
    for label in labels:
        if label is None or label is result:
            continue
        if result is None:
            result = label
        elif result.shape != label.shape or not torch.equal(result, label):
            both = (result > 0) & (label > 0) & (result != label)
            lost = both | (result == UNKNOWN) | (label == UNKNOWN)
            has_met |= bool((lost & ((result > 0) | (label > 0))).any())
            either = torch.where((result <= 0) & (label <= 0), torch.minimum(result, label), torch.maximum(result, label))
            result = torch.where(lost, UNKNOWN, either).to(torch.int32)
    return result, has_met


def reduced(label: Tensor | None, dims: Iterable[int]) -> Tensor | None:
    """The label of what gathers the elements along some dimensions, which keep one entry."""
    if label is None:
        return None
    for dim in dims:
        if label.shape[dim] > 1:
            high = label.amax(dim, keepdim=True)
            low = torch.where(label == NONE, torch.iinfo(torch.int32).max, label).amin(dim, keepdim=True)
            label = merged(low, high)
    return label


def merged(low: Tensor, high: Tensor) -> Tensor:
    """The label of what gathers elements, from the lowest of their labels but for `NONE`, and the highest."""
    same = (low == high) | (high == NONE) & (low > 0)
    return torch.where(same, high, torch.where(low == UNKNOWN, UNKNOWN, MANY)).to(torch.int32)


def samples_at(label: Tensor | None, is_bad: Tensor) -> tuple[int, ...] | None:
    """The samples that marked elements belong to, none for those of a weight; None if it is not known of all. One sync."""
    if label is None:
        return ()
    constant = [dim for dim, length in enumerate(label.shape) if length == 1]
    gathered = is_bad.to("cpu").amax(constant, keepdim=True) if constant else is_bad.to("cpu")
    found = torch.unique(label.expand(gathered.shape)[gathered]).tolist()
    if found == [NONE]:
        return ()
    return tuple(value - 1 for value in found) if found and found[0] > 0 else None
