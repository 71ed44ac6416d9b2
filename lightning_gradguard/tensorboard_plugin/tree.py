"""Parameters as a tree of modules, and the norm of each module."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from lightning_gradguard.layout import Bools, Floats, Ints
from lightning_gradguard.tensorboard_plugin.wire import NO_GRADIENT, Codes, decode, encode


@dataclass
class _Branch:
    children: dict[str, _Branch] = field(default_factory=dict)
    parameter: int = -1


@dataclass(frozen=True, eq=False)
class Tree:
    """Modules and parameters, each before what it holds, in model order.

    A module that holds only one thing is drawn together with it, as one node of a longer label.

    Attributes:
        labels: what a node adds to its parent's path.
        paths: full names.
        depths: 0 at the top.
        parents: index of the node above, -1 at the top.
        parameters: index of the parameter, -1 for a module.
        order: the parameters in the order of their nodes.
        starts, ends: the slice of `order` that each node covers.
    """

    labels: tuple[str, ...]
    paths: tuple[str, ...]
    depths: Ints
    parents: Ints
    parameters: Ints
    order: Ints
    starts: Ints
    ends: Ints

    @classmethod
    def of(cls, names: Sequence[str]) -> Tree:
        """Build the tree of some parameters.

        >>> tree = Tree.of(["lstm.weight", "lstm.bias", "head.weight"])
        >>> tree.labels, tree.depths.tolist()
        (('lstm', 'weight', 'bias', 'head.weight'), [0, 1, 1, 0])
        """
        rows = list(_walk(_grow(names)))
        labels, paths, depths, parents, parameters = zip(*rows, strict=True) if rows else ((), (), (), (), ())
        order = [parameter for parameter in parameters if parameter >= 0]
        is_leaf = np.array(parameters, dtype=np.int64) >= 0
        starts: Ints = np.cumsum(is_leaf) - is_leaf
        ends: Ints = starts + is_leaf
        for node in reversed(range(len(rows))):
            if parents[node] >= 0:
                ends[parents[node]] = max(ends[parents[node]], ends[node])
        integers = (np.array(values, dtype=np.int64) for values in (depths, parents, parameters, order, starts, ends))
        return cls(labels, paths, *integers)

    @property
    def is_leaf(self) -> Bools:
        """Which nodes are parameters."""
        return self.parameters >= 0

    def codes(self, codes: Codes) -> Codes:
        """The norm of each node from those of the parameters: the root of the sum of squares.

        Args:
            codes: [num_steps, num_parameters].

        Returns:
            [num_steps, num_nodes].
        """
        is_leaf = self.is_leaf
        members = codes[:, self.order]
        result = np.empty((len(codes), len(is_leaf)), dtype=np.int16)
        result[:, is_leaf] = members
        if not is_leaf.all() and len(codes):
            slices = np.stack([self.starts, self.ends], axis=1)[~is_leaf].ravel()
            # `reduceat` wants each index inside, and the last slice ends behind the last column.
            padded = np.concatenate([members, np.full_like(members[:, :1], NO_GRADIENT)], axis=1)
            worst = np.maximum.reduceat(padded, slices, axis=1)[:, ::2]
            sums = np.add.reduceat(_SQUARES[padded.view(np.uint16)], slices, axis=1)[:, ::2]
            result[:, ~is_leaf] = encode(np.sqrt(sums), worst != NO_GRADIENT)
        return result


def _squares() -> Floats:
    """The square of each code's norm, by the code's 16 bits."""
    norms = decode(np.arange(1 << 16, dtype=np.uint16).view(np.int16))
    norms[np.uint16(NO_GRADIENT & 0xFFFF)] = 0.0
    squares: Floats = norms**2
    return squares


_SQUARES = _squares()


def _grow(names: Sequence[str]) -> _Branch:
    root = _Branch()
    for index, name in enumerate(names):
        branch = root
        for part in name.split("."):
            branch = branch.children.setdefault(part, _Branch())
        if branch.children or branch.parameter >= 0:  # of a module's name, or there twice
            branch = branch.children.setdefault(f"({index})", _Branch())
        branch.parameter = index
    return root


def _walk(root: _Branch) -> Iterator[tuple[str, str, int, int, int]]:
    """Label, path, depth, parent and parameter of each node."""
    # A stack of our own, since a name may have more dots than Python has frames.
    stack = [(label, label, branch, 0, -1) for label, branch in reversed(root.children.items())]
    node = 0
    while stack:
        label, path, branch, depth, parent = stack.pop()
        while len(branch.children) == 1 and branch.parameter < 0:
            ((part, branch),) = branch.children.items()
            label, path = f"{label}.{part}", f"{path}.{part}"
        if branch.children and branch.parameter >= 0:  # a parameter by the name of a module
            branch.children = {"(itself)": _Branch(parameter=branch.parameter), **branch.children}
            branch.parameter = -1
        yield label, path, depth, parent, branch.parameter
        below = reversed(branch.children.items())
        stack.extend((part, f"{path}.{part}", child, depth + 1, node) for part, child in below)
        node += 1
