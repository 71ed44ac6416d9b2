"""Clipping of each output unit by the norm of its weights."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from lightning_gradguard.clippers.base import Clipped, Clipper, clipped_to
from lightning_gradguard.measure.distributed import local_weight
from lightning_gradguard.measure.gradients import Gradients, to_scale
from lightning_gradguard.measure.units import spread, sum_pieces_, unit_norms
from lightning_gradguard.policy import require_float


class AGC(Clipper):
    """Scale the gradient of each output unit, so that its norm is at most `clip_factor` times the norm of its weights.

    An output unit is an index of the first dimension of a matrix or kernel; a vector or scalar is one unit. Of a sparse
    gradient (embedding) the rows that it has are the units. A unit whose gradient or weights hold a NaN or an infinity is
    left as it is. With sharded parameters the norms are those of whole units.

    Args:
        clip_factor: largest ratio that passes unchanged, > 0. The paper uses 0.01 to 0.16, the smaller the larger the batch.
        eps: floor of a unit's weight norm, > 0, so that units which start at zero can leave it.
        exclude: fnmatch patterns of names of parameters that are not clipped. The paper excludes the last linear layer:
            `exclude=["head.*"]`.

    Raises:
        ValueError: for values outside these ranges.

    References:
        A. Brock, S. De, S. L. Smith, K. Simonyan, "High-Performance Large-Scale Image Recognition Without Normalization",
        arXiv:2102.06171, 2021.

    >>> AGC(exclude=["head.*"])
    AGC(clip_factor=0.01, eps=0.001, exclude=('head.*',))
    """

    def __init__(self, clip_factor: float = 0.01, eps: float = 1e-3, exclude: Sequence[str] = ()) -> None:
        require_float("clip_factor", clip_factor, above=0.0, remedy="The paper's choice is 0.01.")
        require_float("eps", eps, above=0.0, remedy="Without a floor, units that start at zero would stay there.")
        if isinstance(exclude, str) or not all(isinstance(pattern, str) for pattern in exclude):
            raise ValueError(f'`exclude` must be a list of patterns, got {exclude!r}. For example `exclude=["head.*"]`.')
        self.clip_factor = float(clip_factor)
        self.eps = float(eps)
        self.exclude = tuple(exclude)

    def clip_(self, gradients: Gradients, global_norm: Tensor) -> Clipped:
        """Scale in place, then measure again; two syncs.

        Two collectives where gradients are sharded, or three: FSDP's and tensor parallelism's are apart.
        """
        part = gradients.select([index for index, name in enumerate(gradients.names) if not self._excludes(name)])
        parameters = part.parameters
        # The guard passes float64 where float32 can't hold the norms; then it can't hold those of units either.
        of_weights = unit_norms([local_weight(parameter) for parameter in parameters], parameters, global_norm.dtype)
        of_gradients = unit_norms(part.tensors, parameters, global_norm.dtype)
        sum_pieces_(of_weights + of_gradients, parameters + parameters)
        part.begin_change_()
        for device in dict.fromkeys(tensor.device for tensor in part.tensors):
            rows = [index for index, tensor in enumerate(part.tensors) if tensor.device == device]
            coefs = self._coefs([of_weights[row] for row in rows], [of_gradients[row] for row in rows])
            tensors = [part.tensors[row] for row in rows]
            torch._foreach_mul_(to_scale(tensors), spread(coefs, tensors, [parameters[row] for row in rows]))
        gradients.measured = None
        after = gradients.total_norm(wide=global_norm.dtype is torch.float64)
        return clipped_to(float(global_norm), [float(after)])

    def __repr__(self) -> str:
        return f"AGC(clip_factor={self.clip_factor}, eps={self.eps}, exclude={self.exclude})"

    def _coefs(self, of_weights: list[Tensor], of_gradients: list[Tensor]) -> list[Tensor]:
        """Factors in (0, 1], shaped as the norms are. All at once, since most tensors are small."""
        limits = self.clip_factor * torch.cat([norms.reshape(-1) for norms in of_weights]).clamp(min=self.eps)
        norms = torch.cat([norms.reshape(-1) for norms in of_gradients])
        is_sound = norms.isfinite() & limits.isfinite() & (norms > limits)
        coefs = torch.split_with_sizes(torch.where(is_sound, limits / norms, 1.0), [each.numel() for each in of_gradients])
        return [coef.view_as(each) for coef, each in zip(coefs, of_gradients, strict=True)]

    def _excludes(self, name: str) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in self.exclude)
