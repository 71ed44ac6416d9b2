"""The static facts about the watched parameters: names, sizes, and how they group."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

# Norms between these have squares that float64 holds, sums of them included.
_MIN_SQUARED, _MAX_SQUARED = 1e-140, 1e140


_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}


def clean_name(name: str) -> str:
    """A parameter's name as the user wrote it, without what `torch.compile`, FSDP1 and checkpointing put in between.

    >>> clean_name("net._orig_mod.0.weight"), clean_name("_fsdp_wrapped_module.head.bias")
    ('net.0.weight', 'head.bias')
    """
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def module_of(name: str) -> str:
    """Path of the module that owns a parameter, `""` for the root.

    >>> module_of("encoder.0.weight"), module_of("scale")
    ('encoder.0', '')
    """
    return name.rpartition(".")[0]


@dataclass(frozen=True, eq=False)
class Partition:
    """Parameters sorted into named groups, so that a statistic of all groups is one numpy call.

    Attributes:
        names: one per group, in model order.
        indices: parameters, group after group, [num_members].
        starts: where in `indices` each group begins, [num_groups].
    """

    names: tuple[str, ...]
    indices: Ints
    starts: Ints

    @classmethod
    def by_key(cls, keys: Sequence[str], keep: Bools | None = None) -> Partition:
        """Group parameters by key; those where `keep` is False belong to no group."""
        members: dict[str, list[int]] = {}
        for index, key in enumerate(keys):
            if keep is None or keep[index]:
                members.setdefault(key, []).append(index)
        sizes = [len(group) for group in members.values()]
        return cls(
            names=tuple(members),
            indices=np.array([index for group in members.values() for index in group], dtype=np.int64),
            starts=np.cumsum([0, *sizes[:-1]], dtype=np.int64)[: len(sizes)],
        )

    def norms(self, norms: Floats, norm_type: float = 2.0) -> Floats:
        """Norm of each group from those of all parameters; of type 1, 2 or infinity."""
        if not self.names:
            return np.zeros(0)
        members = norms[self.indices]
        if norm_type != 2.0:
            return (np.maximum if norm_type == math.inf else np.add).reduceat(members, self.starts)
        largest = float(members.max())
        if _MIN_SQUARED < largest < _MAX_SQUARED and members.min() > _MIN_SQUARED:
            return np.sqrt(np.add.reduceat(members * members, self.starts))
        return self._scaled_norms(members)

    def _scaled_norms(self, members: Floats) -> Floats:
        """The same where squares could over- or underflow."""
        largest = np.maximum.reduceat(members, self.starts)
        scale = np.where((largest > 0) & np.isfinite(largest), largest, 1.0)
        sizes = np.diff(self.starts, append=len(members))
        with np.errstate(over="ignore"):  # beside an infinite norm there is nothing to scale by
            squares = (members / np.repeat(scale, sizes)) ** 2
        return scale * np.sqrt(np.add.reduceat(squares, self.starts))

    def totals(self, values: Ints) -> Ints:
        """Sum of each group."""
        return np.add.reduceat(values[self.indices], self.starts) if self.names else np.zeros(0, dtype=np.int64)

    def any(self, flags: Bools) -> Bools:
        """Whether any member of each group is flagged."""
        return np.logical_or.reduceat(flags[self.indices], self.starts) if self.names else np.zeros(0, dtype=np.bool_)


@dataclass(frozen=True, eq=False)
class Layout:
    """Names and sizes of the watched parameters, in model order, shared by all measurements.

    Attributes:
        names: one per parameter.
        numels: elements of each parameter, [num_parameters].
        ndims: dimensions of each parameter, [num_parameters].
    """

    names: tuple[str, ...]
    numels: Ints
    ndims: Ints

    @classmethod
    def of(cls, names: Iterable[str], shapes: Iterable[tuple[int, ...]]) -> Layout:
        """Build a layout from names and shapes.

        >>> Layout.of(["net.weight", "net.bias"], [(4, 3), (4,)]).numels.tolist()
        [12, 4]
        """
        sizes = [tuple(shape) for shape in shapes]
        return cls(
            names=tuple(names),
            numels=np.array([int(np.prod(size, dtype=np.int64)) for size in sizes], dtype=np.int64),
            ndims=np.array([len(size) for size in sizes], dtype=np.int64),
        )

    def is_like(self, other: Layout) -> bool:
        """Whether names and sizes are the same."""
        return (
            self.names == other.names
            and np.array_equal(self.numels, other.numels)
            and np.array_equal(self.ndims, other.ndims)
        )

    @cached_property
    def groups(self) -> Partition:
        """The parameters of each top-level module; parameters of the root go by their own name.

        >>> Layout.of(["encoder.0.weight", "encoder.1.weight", "head.weight"], [(2, 2)] * 3).groups.names
        ('encoder', 'head')
        """
        return Partition.by_key([name.partition(".")[0] for name in self.names])

    @cached_property
    def subgroups(self) -> Partition:
        """One level deeper, where everything hangs under a single attribute and `groups` would say nothing."""
        paths = [name.split(".") for name in self.names]
        deeper = np.array([len(path) > 2 for path in paths], dtype=np.bool_)
        if len(self.groups.names) > 1:
            deeper[:] = False
        return Partition.by_key([".".join(path[:2]) for path in paths], keep=deeper)

    @cached_property
    def weights(self) -> Partition:
        """The matrices and kernels of each module, by module path.

        Biases, gains and other vectors are left out: their gradients live on another scale, so that a
        comparison by depth would mix two things.
        """
        return Partition.by_key([module_of(name) for name in self.names], keep=self.ndims >= 2)

    @cached_property
    def weight_roots(self) -> Floats:
        """Square root of the number of elements of each group of `weights`: norm over it is the rms."""
        return np.sqrt(self.weights.totals(self.numels).astype(np.float64))

    @cached_property
    def member_roots(self) -> Floats:
        """The same for each parameter in `weights`, in the order of their indices."""
        return np.sqrt(self.numels[self.weights.indices].astype(np.float64))
