"""Complex gradients that autograd has only marked as conjugate."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_gradguard import AGC, ClipNorm, ClipValue, Guard


@pytest.mark.parametrize("clipper", [ClipNorm(1e-2), ClipValue(1e-2), AGC(1e-3)], ids=["norm", "value", "agc"])
def test_conjugate_gradient_is_clipped_as_one_that_is_written_out(clipper):
    """What `clip_grad_norm_` refuses."""
    start = torch.randn(4, 3, dtype=torch.complex64)
    clipped = []
    for is_written_out in (False, True):
        weight = nn.Parameter(start.clone())
        weight.grad = torch.randn(4, 3, dtype=torch.complex64, generator=torch.Generator().manual_seed(0)).conj()
        assert weight.grad.is_conj()
        if is_written_out:
            weight.grad = weight.grad.resolve_conj()
        Guard([("weight", weight)], optimizer=torch.optim.SGD([weight], 0.1), clip=clipper).step()
        clipped.append(weight.grad.resolve_conj())
    assert torch.equal(*clipped)
