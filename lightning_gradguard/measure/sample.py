"""A few evenly spaced elements of a tensor, which stand for all of it."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor


def sample_stride(numel: int, shape: Sequence[int], size: int) -> int:
    """Distance in memory of the elements that are taken so that there are at least `size`, if there are so many.

    Args:
        numel: of the tensor, or of the part of it that is here.
        shape: of the whole tensor. A stride that shares a divisor with the length of its rows would look at few of its
            columns only.
        size: of the sample.
    """
    stride = max(numel // size, 1)
    while stride > 1 and any(math.gcd(stride, length) > 1 for length in shape):
        stride -= 1
    return stride


def sample(tensor: Tensor, stride: int) -> Tensor:
    """Every so many-th element in the order in which they lie in memory, flat; a view, unless the tensor has holes."""
    if tensor.is_contiguous():
        return tensor.view(-1)[::stride]
    strides: tuple[int, ...] = tensor.stride()
    order = sorted(range(tensor.ndim), key=lambda dim: -strides[dim])
    return tensor.permute(order).reshape(-1)[::stride]
