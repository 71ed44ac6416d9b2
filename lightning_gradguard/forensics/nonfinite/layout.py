"""How a batch is laid out: which of its elements belong to which sample."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightning_gradguard.forensics.nonfinite.row_labels import along

SampleDim = int | Mapping[str, int | None] | None
"""The dimension that samples lie along: of all leaves, or by a leaf's name (None: it holds none); None: it is inferred."""


def check_sample_dim(sample_dim: SampleDim) -> None:
    """Refuse what is no dimension.

    Raises:
        ValueError: with what it must be.
    """
    dims = sample_dim.values() if isinstance(sample_dim, Mapping) else [sample_dim]
    if any(dim is not None and (not isinstance(dim, int) or isinstance(dim, bool) or dim < 0) for dim in dims):
        raise ValueError(
            f"`sample_dim` must be an integer >= 0, or a mapping of names of leaves to such, got {sample_dim!r}. "
            "To have it inferred pass None."
        )


def leaves_of(batch: Any, name: str = "batch", depth: int = 0) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a batch with their names, as `batch['x']`."""
    if isinstance(batch, Tensor):
        yield name, batch
    if depth < _MAX_DEPTH:
        for inner, value in _entries(batch, name):
            yield from leaves_of(value, inner, depth + 1)


def iterators_in(batch: Any, name: str = "batch", depth: int = 0) -> Iterator[str]:
    """Names of what can be read only once."""
    if isinstance(batch, Iterator):
        yield name
    elif depth < _MAX_DEPTH:
        for inner, value in _entries(batch, name):
            yield from iterators_in(value, inner, depth + 1)


_MAX_DEPTH = 8
"""An object may hold itself."""


class Variables(dict[str, Any]):
    """The variables that a function uses, as its batch."""


def _entries(batch: Any, name: str) -> Iterator[tuple[str, Any]]:
    if isinstance(batch, (Tensor, str, bytes, type)):
        return
    if isinstance(batch, Variables):
        yield from batch.items()
        return
    if isinstance(batch, Mapping):
        yield from ((f"{name}[{key!r}]", value) for key, value in batch.items())
    elif isinstance(batch, tuple) and hasattr(batch, "_fields"):
        yield from ((f"{name}.{key}", value) for key, value in zip(batch._fields, batch, strict=True))
    elif isinstance(batch, (list, tuple)):
        yield from ((f"{name}[{index}]", value) for index, value in enumerate(batch))
    elif is_dataclass(batch):
        yield from ((f"{name}.{entry.name}", getattr(batch, entry.name)) for entry in fields(batch))
    elif callable(keys := getattr(batch, "keys", None)) and hasattr(batch, "__getitem__"):  # graphs, tokenized texts
        with suppress(Exception):  # what is loaded only when it is asked for may be gone
            yield from [(f"{name}.{key}", batch[key]) for key in keys()]
    elif hasattr(batch, "__dict__"):
        yield from ((f"{name}.{key}", value) for key, value in vars(batch).items())


@dataclass(frozen=True)
class Layout:
    """How a batch is laid out.

    Attributes:
        leaves: its tensors with their names.
        size: samples in it; 0 if that can't be told.
        labels: of the leaves that hold samples, which element belongs to which.
        dims: of the leaves whose samples lie along one dimension in order, that dimension.
        is_unique: whether no other layout fits.
        is_conventional: whether samples lie where they mostly do, along the first dimension of most leaves.
        alternative: how it may be laid out instead.
    """

    leaves: tuple[tuple[str, Tensor], ...] = ()
    size: int = 0
    labels: Mapping[str, Tensor] = field(default_factory=dict)
    dims: Mapping[str, int] = field(default_factory=dict)
    is_unique: bool = False
    is_conventional: bool = False
    alternative: Layout | None = None

    @property
    def may_begin_with_time(self) -> bool:
        """Whether another layout is worth a look. Numbers in two dimensions are samples and features, whatever meets."""
        looks_so = any(leaf.dim() > 2 or (leaf.dim() == 2 and not leaf.is_floating_point()) for _, leaf in self.leaves)
        return self.alternative is not None and looks_so

    @property
    def can_exchange(self) -> bool:
        """Whether samples can be put in the places of others: all that belongs to a sample lies along one dimension."""
        return self.size > 1 and bool(self.dims) and self.dims.keys() == self.labels.keys()


def layout_of(batch: Any, sample_dim: SampleDim = None) -> Layout:
    """Read it off the leaves.

    Args:
        batch: in any structure.
        sample_dim: what the user says about it.

    Raises:
        ValueError: if `sample_dim` names leaves that the batch has not.
    """
    leaves = tuple(leaves_of(batch))
    if sample_dim is not None:
        return _told(leaves, sample_dim)
    with_dims = [(name, leaf) for name, leaf in leaves if leaf.dim()]
    if not with_dims:
        return Layout(leaves)
    for find in (_of_packed, _of_graphs, _of_lists, _of_first, _of_second):
        found = find(with_dims, batch)
        if found is not None:
            other = found.alternative
            return replace(found, leaves=leaves, alternative=None if other is None else replace(other, leaves=leaves))
    return replace(_of_most(with_dims), leaves=leaves)


_Leaves = Sequence[tuple[str, Tensor]]


def _along_dims(leaves: _Leaves, size: int, dims: Mapping[str, int], **more: Any) -> Layout:
    samples = torch.arange(size)
    labels = {name: along(samples, leaf.dim(), dims[name]) for name, leaf in leaves if name in dims}
    return Layout(size=size, labels=labels, dims=dims, **more)


def _told(leaves: _Leaves, sample_dim: int | Mapping[str, int | None]) -> Layout:
    if isinstance(sample_dim, int):
        dims = {name: sample_dim for name, leaf in leaves if leaf.dim() > sample_dim}
    else:
        names = {name for name, _ in leaves}
        if missing := sorted(sample_dim.keys() - names):
            raise ValueError(f"`sample_dim` names {missing[0]}, which the batch has not. It has {', '.join(sorted(names))}.")
        dims = {name: dim for name, dim in sample_dim.items() if dim is not None and dict(leaves)[name].dim() > dim}
    lengths = Counter(dict(leaves)[name].shape[dim] for name, dim in dims.items())
    if not lengths:
        return Layout(tuple(leaves))
    size = lengths.most_common(1)[0][0]
    dims = {name: dim for name, dim in dims.items() if dict(leaves)[name].shape[dim] == size}
    return replace(_along_dims(leaves, size, dims, is_unique=True), leaves=tuple(leaves))


def _of_packed(leaves: _Leaves, batch: Any) -> Layout | None:  # noqa: ARG001 - one signature for all
    """`PackedSequence`: sorted by length, one time step behind the other."""
    found = dict(leaves)
    packed = [name.removesuffix(".batch_sizes") for name in found if name.endswith(".batch_sizes")]
    packed = [name for name in packed if f"{name}.data" in found]
    if not packed:
        return None
    labels: dict[str, Tensor] = {}
    dims: dict[str, int] = {}
    size = int(found[f"{packed[0]}.batch_sizes"][0])
    for name in packed:
        order = found.get(f"{name}.sorted_indices", torch.arange(size)).cpu()
        samples = torch.cat([order[:number] for number in found[f"{name}.batch_sizes"].tolist()])
        labels[f"{name}.data"] = along(samples, found[f"{name}.data"].dim(), 0)
    for name, leaf in leaves:
        if leaf.shape[0] == size and not any(name.startswith(f"{other}.") for other in packed):
            labels[name], dims[name] = along(torch.arange(size), leaf.dim(), 0), 0
    return Layout(size=size, labels=labels, dims=dims, is_unique=True)


def _of_graphs(leaves: _Leaves, batch: Any) -> Layout | None:  # noqa: ARG001
    """Graphs in one, as torch-geometric has them: a vector says which graph each node belongs to."""
    vectors = [(name, leaf) for name, leaf in leaves if _last_key(name) == "batch" and leaf.dim() == 1]
    if len(vectors) != 1 or vectors[0][1].dtype is not torch.long or len(vectors[0][1]) < _MIN_NODES:
        return None
    of_nodes = vectors[0][1].cpu()
    size = int(of_nodes[-1]) + 1
    counts = [leaf.shape[0] for name, leaf in leaves if _last_key(name) != "batch"]
    if int(of_nodes[0]) or bool((of_nodes.diff() < 0).any()) or not {size, size + 1} & {*counts}:
        return None
    edges = next((leaf for name, leaf in leaves if _last_key(name) == "edge_index" and leaf.dim() > 1), None)
    of_edges = None if edges is None or not edges.numel() else of_nodes[edges[0].cpu()]
    labels: dict[str, Tensor] = {}
    for name, leaf in leaves:
        key, length = _last_key(name), leaf.shape[0]
        if key.endswith("ptr"):  # where each graph begins
            continue
        if leaf is edges and of_edges is not None:
            labels[name] = along(of_edges, 2, 1)
        elif of_edges is not None and length == len(of_edges) and (key.startswith("edge") or length != len(of_nodes)):
            labels[name] = along(of_edges, leaf.dim(), 0)
        elif length == len(of_nodes) and not key.startswith("edge"):
            labels[name] = along(of_nodes, leaf.dim(), 0)
        elif length == size and not key.startswith("edge"):
            labels[name] = along(torch.arange(size), leaf.dim(), 0)
    return Layout(size=size, labels=labels, is_unique=True)


_MIN_NODES = 2


def _last_key(name: str) -> str:
    found = re.search(r"(\w+)(?:'\])?$", name)
    return found.group(1) if found else ""


def _of_lists(leaves: _Leaves, batch: Any) -> Layout | None:
    """Lists with an entry for each sample, as detectors take images of several sizes."""
    firsts = {leaf.shape[0] for _, leaf in leaves}
    if len(firsts) == 1 and not (firsts <= _CHANNELS and all(leaf.dim() == _IMAGE_DIMS for _, leaf in leaves)):
        return None
    lists = [*_sequences(batch, "batch")]
    for size in sorted({length for _, length in lists if length > 1}, reverse=True):
        heads = [name for name, length in lists if length == size and (name != "batch" or _is_homogeneous(batch))]
        of = {name: _index_in(name, heads) for name, _ in leaves}
        listed = {leaf.shape[0] for name, leaf in leaves if of[name] is not None}
        beside = {leaf.shape[0] for name, leaf in leaves if of[name] is None}
        # Beside lists of tensors that differ in length there may be one entry for each sample, as labels are.
        if listed and (not beside or (beside == {size} and len(listed) > 1)):
            labels = {name: _label_of(leaf, of[name]) for name, leaf in leaves}
            return Layout(size=size, labels=labels, is_conventional=True)
    return None


def _label_of(leaf: Tensor, index: int | None) -> Tensor:
    """Of a leaf that is all of one sample; or that has all of them along its first dimension."""
    if index is None:
        return along(torch.arange(leaf.shape[0]), leaf.dim(), 0)
    return torch.full([1] * leaf.dim(), index + 1, dtype=torch.int32)


_CHANNELS, _IMAGE_DIMS = {1, 3, 4}, 3


def _sequences(batch: Any, name: str, depth: int = 0) -> Iterator[tuple[str, int]]:
    if isinstance(batch, (list, tuple)) and not hasattr(batch, "_fields"):
        yield name, len(batch)
    if depth < _MAX_DEPTH:
        for inner, value in _entries(batch, name):
            yield from _sequences(value, inner, depth + 1)


def _is_homogeneous(batch: Any) -> bool:
    """Whether the entries of a batch look like samples, rather than like inputs and targets."""
    kinds = {frozenset(entry) if isinstance(entry, Mapping) else type(entry) for entry in batch}
    shapes = {(it.dtype, it.shape[1:]) for it in batch if isinstance(it, Tensor)}
    return len(batch) > 2 and len(kinds) == 1 and len(shapes) < 2 and not any(len(shape) < 1 for _, shape in shapes)


def _index_in(name: str, heads: Sequence[str]) -> int | None:
    for head in heads:
        if found := re.match(re.escape(head) + r"\[(\d+)\]", name):
            return int(found.group(1))
    return None


def _of_first(leaves: _Leaves, batch: Any) -> Layout | None:  # noqa: ARG001
    """Along the first dimension of all leaves; if time may be first, the second is the alternative."""
    size = leaves[0][1].shape[0]
    if any(leaf.shape[0] != size for _, leaf in leaves):
        return None
    other = _time_first(leaves, size)
    found = _along_dims(leaves, size, {name: 0 for name, _ in leaves}, is_conventional=True)
    return replace(found, is_unique=other is None, alternative=other)


def _time_first(leaves: _Leaves, size: int) -> Layout | None:
    """How the leaves would be read with time as their first dimension; None if they can't be."""
    seconds = {leaf.shape[1] if leaf.dim() > 1 else size for _, leaf in leaves}
    is_single = any(leaf.dim() == 1 for _, leaf in leaves)  # which has no time
    if len(seconds) != 1 or seconds == {1} or not any(leaf.dim() > 1 for _, leaf in leaves):
        if not is_single or not any(leaf.dim() > 2 and leaf.shape[1] == size for _, leaf in leaves):
            return None
        seconds = {size}
    dims = {name: 1 for name, leaf in leaves if leaf.dim() > 1 and leaf.shape[1] in seconds}
    dims |= {name: 0 for name, leaf in leaves if leaf.dim() == 1}
    return _along_dims(leaves, seconds.pop(), dims, is_conventional=True)


def _of_second(leaves: _Leaves, batch: Any) -> Layout | None:  # noqa: ARG001
    """Time first: along the second dimension of inputs and the first of what there is one of for each sample."""
    common = set.intersection(*({*leaf.shape} for _, leaf in leaves))
    sizes = [size for size in common if size > 1 and all([*leaf.shape].count(size) == 1 for _, leaf in leaves)]
    if len(sizes) != 1:
        return None
    dims = {name: [*leaf.shape].index(sizes[0]) for name, leaf in leaves}
    is_time_first = any(dims[name] == 1 and leaf.dim() > 2 for name, leaf in leaves)
    if max(dims.values()) > 1 or min(dims.values()) or not is_time_first:
        return None
    return _along_dims(leaves, sizes[0], dims, is_unique=True)


def _of_most(leaves: _Leaves) -> Layout:
    """Along the first dimension of most leaves; in others samples may have been flattened with what they are long."""
    counts = Counter(leaf.shape[0] for _, leaf in leaves)
    size, number = counts.most_common(1)[0]
    dims = {name: 0 for name, leaf in leaves if leaf.shape[0] == size}
    lengths = {length for name, leaf in leaves if name in dims for length in leaf.shape[1:]}
    found = _along_dims(leaves, size, dims)
    labels = {**found.labels}
    for name, leaf in leaves:
        if name not in dims and size and leaf.shape[0] % size == 0 and leaf.shape[0] // size in lengths:
            labels[name] = along(torch.arange(size).repeat_interleave(leaf.shape[0] // size), leaf.dim(), 0)
    is_conventional = number > 1 and list(counts.values()).count(number) == 1
    return replace(found, labels=labels, is_conventional=is_conventional or len(labels) == len(leaves))
