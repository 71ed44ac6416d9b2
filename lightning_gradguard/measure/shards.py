"""Parameters that an engine has flattened and cut up: what a rank holds of one, in the place of a tensor.

FSDP1 and DeepSpeed lay parameters one behind the other and deal the row out by length, so that a rank may hold the end of
one parameter and the beginning of the next. A `FlatShard` is a parameter as the user knows it, with its whole shape and the
range of elements that is here. An engine says how to read and change them; everything else in the package takes a shard for
a tensor that has a `.grad`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TypeAlias

import torch
from torch import Tensor


class FlatShard(ABC):
    """What this rank holds of a parameter: a range of its elements, maybe none, in the order in which they lie in memory.

    Attributes:
        shape: of the whole parameter.
        start: the first element that is here; 0 where there is none.
        share: what a sum over all ranks has to take of what is here: 1 if no other rank holds it, 1/2 if one other does.
        owner: the tensor through which an optimizer of torch trains it; None if the engine has an optimizer of its own.
    """

    shape: torch.Size
    start: int
    share: float
    owner: Tensor | None

    @property
    @abstractmethod
    def grad(self) -> Tensor | None:
        """The gradient of the elements that are here, flat, to be changed in place; empty where there are none.

        None where the whole parameter has no gradient; all ranks say so alike.
        """

    @grad.setter
    @abstractmethod
    def grad(self, value: None) -> None:
        """Keep the next step from being applied. In place, rank-local."""

    @abstractmethod
    def weight(self) -> Tensor:
        """The elements that are here, flat, detached; they may share memory with the parameter."""

    @property
    def ndim(self) -> int:
        """Dimensions of the whole parameter."""
        return len(self.shape)

    @property
    def device(self) -> torch.device:
        """Where the elements are."""
        return self.weight().device

    @property
    def dtype(self) -> torch.dtype:
        """That of the elements."""
        return self.weight().dtype


Parameter: TypeAlias = Tensor | FlatShard
"""What is watched: a tensor, whole or a DTensor, or a shard of a flattened one."""
