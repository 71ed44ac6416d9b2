"""How far a step moves the weights, relative to their size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_gradguard.measure.distributed import Ranks, local_part, local_share
from lightning_gradguard.measure.gradients import to_device
from lightning_gradguard.measure.sample import sample, sample_stride
from lightning_gradguard.measure.shards import FlatShard, Parameter

_SAMPLE_SIZE = 512


class UpdateMeter:
    """Measures the update of single steps, from a sample of the weights that is kept from one step to the next.

    Vectors are left out: biases and gains begin at zero or one, and are moved far by any healthy step. The ratio of a matrix
    is the 2-norm of its change over its 2-norm before, or over the norm that torch's default initialisation gives to a
    matrix of its shape if that is larger: what begins at zero, as the last layer of a residual branch, has no size yet.

    Both norms are estimated from 512 evenly spaced elements, or a few more: all of a small matrix. What moves many elements
    alike, as a rate that is too high, is told from them to a few percent; a change of a few elements may be missed.

    References:
        A. Karpathy, "A Recipe for Training Neural Networks", 2019; K. He et al., "Delving deep into rectifiers",
        arXiv:1502.01852, 2015 (the default initialisation: uniform, with a variance of 1 / (3 fan-in)).
    """

    def __init__(self) -> None:
        self._plan: _Plan | None = None
        self._before: Tensor | None = None
        self._measured: Tensor | None = None

    @torch.no_grad()
    def start_(self, parameters: Sequence[Parameter]) -> None:
        """Before a step: keep the sample. No sync, but for the first one of these parameters."""
        self._measured = None
        if self._plan is None or self._plan.parameters is not parameters:
            self._plan = _Plan.of(parameters)
        self._before = self._plan.sample()

    def read_(self, parameters: Sequence[Parameter]) -> Tensor | None:
        """After the step: the ratio of each parameter, NaN for vectors, float32 [num_parameters]; the sample is dropped.

        No sync; a collective where parameters are sharded.

        Args:
            parameters: those that `start_` was called with. If there are others by now, nothing is known.

        Returns:
            None if no step has been measured.
        """
        measured, self._measured = self._measured, None
        before, self._before = self._before, None
        if measured is not None:
            return measured.to(parameters[0].device) if len(measured) == len(parameters) else None
        plan = self._plan
        if before is None or plan is None or not plan.is_of(parameters):
            return None
        with torch.no_grad():
            after = plan.sample()
            if after is None or after.numel() != before.numel():
                return None
            return plan.ratios(before, after)

    def state_dict(self, parameters: Sequence[Parameter]) -> dict[str, Any]:
        """The update that has been measured since the last step, as plain floats. A sync if there is one."""
        self._measured = self.read_(parameters)
        return {"ratios": None if self._measured is None else self._measured.tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state."""
        self._before = None
        self._measured = None if state["ratios"] is None else torch.tensor(state["ratios"], dtype=torch.float32)


@dataclass(frozen=True, eq=False)
class _Plan:
    """What is sampled of some parameters.

    Attributes:
        parameters: all of them.
        matrices: those with two dimensions and more that hold plain numbers.
        rows: which they are, [num_matrices].
        strides: distance in memory of the sampled elements of each.
        lengths: sampled elements of each; a complex one counts twice.
        factors: of a norm of the sample, to have that of all elements that are here, [num_matrices].
        natural: norms that the default initialisation gives, [num_matrices].
        shares: what a sum over ranks takes of what is here, [num_matrices]; None where each rank holds everything.
    """

    parameters: Sequence[Parameter]
    matrices: Sequence[Parameter]
    rows: Tensor
    strides: Sequence[int]
    lengths: Sequence[int]
    factors: Tensor
    natural: Tensor
    shares: Tensor | None

    @classmethod
    def of(cls, parameters: Sequence[Parameter]) -> _Plan:
        """For these. A sync on a GPU."""
        ranks = Ranks.current()
        rows = [index for index, parameter in enumerate(parameters) if _is_matrix(parameter)]
        matrices = [parameters[row] for row in rows]
        parts, shares = [], []
        for matrix in matrices:
            part, share = local_share(matrix, ranks)
            parts.append(part)
            shares.append(share)
        strides = [sample_stride(part.numel(), it.shape, _SAMPLE_SIZE) for part, it in zip(parts, matrices, strict=True)]
        numbers = [-(-part.numel() // stride) for part, stride in zip(parts, strides, strict=True)]
        factors = [math.sqrt(part.numel() / max(number, 1)) for part, number in zip(parts, numbers, strict=True)]
        device = parts[0].device if parts else None
        return cls(
            parameters,
            matrices,
            torch.tensor(rows, dtype=torch.int64, device=device),
            strides,
            [number * (2 if part.is_complex() else 1) for part, number in zip(parts, numbers, strict=True)],
            torch.tensor(factors, device=device),
            torch.tensor([math.sqrt(matrix.shape[0] / 3.0) for matrix in matrices], device=device),
            torch.tensor(shares, device=device) if any(share != 1.0 / ranks.size for share in shares) else None,
        )

    def is_of(self, parameters: Sequence[Parameter]) -> bool:
        """Whether these are the same."""
        if self.parameters is parameters:
            return True
        same = len(self.parameters) == len(parameters)
        return same and all(one is other for one, other in zip(self.parameters, parameters, strict=True))

    def sample(self) -> Tensor | None:
        """The sampled elements as they are, one matrix after the other, float32; None where there are none. No sync."""
        parts = [sample(_here(matrix), stride) for matrix, stride in zip(self.matrices, self.strides, strict=True)]
        parts = [torch.view_as_real(part.resolve_conj()).reshape(-1) if part.is_complex() else part for part in parts]
        if len({(part.device, part.dtype) for part in parts}) > 1:
            parts = [to_device(part, self.rows.device, torch.float32) for part in parts]
        return torch.cat(parts).float() if parts else None

    def ratios(self, before: Tensor, after: Tensor) -> Tensor:
        """Of each parameter, from its samples. A collective where parameters are sharded."""
        lengths = list(self.lengths)
        each = torch._foreach_norm([*torch.split(before, lengths), *torch.split(after - before, lengths)])
        norms = torch.stack(each).view(2, len(lengths)) * self.factors
        if self.shares is not None:
            norms = Ranks.current().sum_(norms.square() * self.shares).sqrt()
        ratios = torch.full((len(self.parameters),), math.nan, device=norms.device)
        return ratios.index_copy_(0, self.rows, norms[1] / torch.maximum(norms[0], self.natural))


def _here(matrix: Parameter) -> Tensor:
    return matrix.weight() if isinstance(matrix, FlatShard) else local_part(matrix)


def _is_matrix(parameter: Parameter) -> bool:
    if parameter.ndim < 2 or not (parameter.dtype.is_floating_point or parameter.dtype.is_complex):
        return False
    return parameter.dtype.itemsize > 1 and (isinstance(parameter, FlatShard) or parameter.layout is torch.strided)
