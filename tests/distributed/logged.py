"""What a guard logs of sharded gradients, beside the same in one process."""

from __future__ import annotations

import math

import numpy as np
import torch

from lightning_gradguard.measure.histogram import EDGES

CLIP = 0.1
NORM_TYPES = (1.0, math.inf)


def other_norms(record):
    """Those of a record, as plain lists."""
    return [record.measurement.other_norms[norm_type].tolist() for norm_type in NORM_TYPES]


def assert_logged_as_in_one_process(ranks, module, batch):
    """Other norms of the first step, and its histograms after clipping, but for an element on the edge of two bins."""
    assert all(rank["last"] == ranks[0]["last"] for rank in ranks)
    found = ranks[0]
    ((norms, clipped),) = found["first"]
    module.training_step(batch, 0).backward()
    gradients = {name: it.grad.double() for name, it in module.named_parameters() if name in found["names"]}
    assert list(gradients) == found["names"]
    whole = torch.cat([it.flatten() for it in gradients.values()])
    for of_type, norm_type in zip(norms, NORM_TYPES, strict=True):
        expected = [float(torch.linalg.vector_norm(it, norm_type)) for it in gradients.values()]
        np.testing.assert_allclose(of_type, expected, rtol=1e-4)
    coef = min(CLIP / float(whole.norm()), 1.0)
    assert coef < 1.0
    for counts, gradient in zip(clipped, gradients.values(), strict=True):
        expected = np.histogram((gradient[gradient != 0].abs() * coef).log10().numpy(), EDGES)[0]
        assert np.abs(expected.cumsum() - np.cumsum(counts)).max() <= 1.0 + 1e-6
