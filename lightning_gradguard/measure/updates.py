"""How far a step moves the weights, relative to their size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_gradguard.measure.distributed import Ranks, local_share
from lightning_gradguard.measure.shards import Parameter


class UpdateMeter:
    """Measures the update of single steps, from a copy of the matrices and kernels that lives from one step to the next.

    Vectors are left out: biases and gains begin at zero or one, and are moved far by any healthy step. The ratio of a matrix
    is the 2-norm of its change over its 2-norm before, or over the norm that torch's default initialisation gives to a
    matrix of its shape if that is larger: what begins at zero, as the last layer of a residual branch, has no size yet.

    Memory: a copy of the matrices while a step is measured, none in between.

    References:
        A. Karpathy, "A Recipe for Training Neural Networks", 2019; K. He et al., "Delving deep into rectifiers",
        arXiv:1502.01852, 2015 (the default initialisation: uniform, with a variance of 1 / (3 fan-in)).
    """

    def __init__(self) -> None:
        self._copies: list[Tensor] = []
        self._measured: Tensor | None = None

    @torch.no_grad()
    def start_(self, parameters: Sequence[Parameter]) -> None:
        """Before a step: keep its weights. No sync; one copy of them."""
        ranks = Ranks.current()
        self._measured = None
        self._copies = [local_share(parameter, ranks)[0].detach().clone() for parameter in _matrices(parameters)]

    @torch.no_grad()
    def read_(self, parameters: Sequence[Parameter]) -> Tensor | None:
        """After the step: the ratio of each parameter, NaN for vectors, float32 [num_parameters]; the copy is dropped.

        No sync; three passes over the matrices, and a collective where parameters are sharded.

        Args:
            parameters: those that `start_` was called with. If there are others by now, nothing is known.

        Returns:
            None if no step has been measured.
        """
        measured, self._measured = self._measured, None
        copies, self._copies = self._copies, []
        if measured is not None:
            return measured.to(parameters[0].device) if len(measured) == len(parameters) else None
        matrices = _matrices(parameters)
        if not copies or len(copies) != len(matrices):
            return None
        ranks = Ranks.current()
        parts = [local_share(parameter, ranks) for parameter in matrices]
        device = parts[0][0].device
        sizes = torch.stack([_norm(copy).to(device) for copy in copies])
        moved = torch.stack([_norm(part - copy).to(device) for (part, _), copy in zip(parts, copies, strict=True)])
        norms = torch.stack([sizes, moved])
        shares = [share for _, share in parts]
        if any(share != 1.0 / ranks.size for share in shares):
            norms = ranks.sum_(norms.square() * torch.tensor(shares, device=device)).sqrt()
        natural = torch.tensor([math.sqrt(parameter.shape[0] / 3.0) for parameter in matrices], device=device)
        ratios = torch.full((len(parameters),), math.nan, device=device)
        rows = torch.tensor([index for index, parameter in enumerate(parameters) if parameter.ndim >= 2], device=device)
        return ratios.index_copy_(0, rows, norms[1] / torch.maximum(norms[0], natural))

    def state_dict(self, parameters: Sequence[Parameter]) -> dict[str, Any]:
        """The update that has been measured since the last step, as plain floats. A sync if there is one."""
        self._measured = self.read_(parameters)
        return {"ratios": None if self._measured is None else self._measured.tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state."""
        self._copies = []
        self._measured = None if state["ratios"] is None else torch.tensor(state["ratios"], dtype=torch.float32)


def _matrices(parameters: Sequence[Parameter]) -> list[Parameter]:
    return [parameter for parameter in parameters if parameter.ndim >= 2]


def _norm(tensor: Tensor) -> Tensor:
    real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    norm: Tensor = torch.linalg.vector_norm(real.float())
    return norm
