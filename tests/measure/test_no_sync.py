"""The device half never waits for the device: on `meta` there are no values, so that any read of one raises."""

from __future__ import annotations

import math

import pytest
import torch
from builders import mlp
from torch import nn

from lightning_gradguard import ClipNorm, Guard
from lightning_gradguard.act.gate import skip_
from lightning_gradguard.layout import Layout
from lightning_gradguard.measure.gradients import Gradients
from lightning_gradguard.measure.histogram import HistogramMeter
from lightning_gradguard.measure.measurement import measure
from lightning_gradguard.measure.signs import MicroBatch

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.complex64]
every_mix = pytest.mark.parametrize(
    "dtypes", [[torch.float32], [torch.float16], DTYPES], ids=["float32", "float16", "mixed"]
)


def meta_parameters(dtypes):
    """Two parameters of each dtype, one of them large and one empty, with gradients on `meta`."""
    parameters = [
        nn.Parameter(torch.zeros(shape, dtype=dtype, device="meta"))
        for dtype in dtypes
        for shape in ((100, 100), (3,), (0,))
    ]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    return parameters


@pytest.mark.smoke
@every_mix
def test_measure_on_meta_reads_nothing(dtypes):
    """Norms, losses and loss scale of three micro-batches."""
    gradients = Gradients(meta_parameters(dtypes))
    scalar = torch.zeros((), device="meta")
    passes = [MicroBatch(scalar, scalar), MicroBatch(None, scalar), MicroBatch(scalar)]
    facts = measure(gradients, passes, loss_scale=scalar)
    assert facts.norms.device.type == facts.total_norm.device.type == "meta"
    assert facts.norms.shape == (3 * len(dtypes),)


@every_mix
@pytest.mark.parametrize("norm_type", [1.0, 2.0, math.inf])
def test_clip_norm_coefficient_on_meta_reads_nothing(dtypes, norm_type):
    """The factor is clamped without asking whether it has to be."""
    gradients = Gradients(meta_parameters(dtypes))
    assert ClipNorm(1.0, norm_type).coefficient(gradients, gradients.total_norm()).shape == ()


@every_mix
def test_scale_and_clamp_on_meta_read_nothing(dtypes):
    """Both work in place, whatever the values are."""
    gradients = Gradients(meta_parameters(dtypes))
    gradients.scale_(torch.zeros((), device="meta"))
    gradients.clamp_(1.0)


@every_mix
def test_histogram_count_on_meta_reads_nothing(dtypes):
    """Exact and sampled rows."""
    gradients = Gradients(meta_parameters(dtypes))
    assert HistogramMeter(sample_size=1000).count(gradients).device.type == "meta"


def test_before_backward_on_meta_reads_nothing():
    """Also from the second micro-batch on, which measures what the first has left."""
    model = mlp(3, 4, 1).to("meta")
    guard = Guard(model.named_parameters())
    for _ in range(3):
        loss = model(torch.zeros(2, 3, device="meta")).sum()
        guard.before_backward(loss)
        loss.backward()


def test_skip_on_meta_reads_nothing():
    """The gradients are taken away unseen."""
    parameters = meta_parameters([torch.float32])
    skip_(parameters)
    assert all(parameter.grad is None for parameter in parameters)


@pytest.mark.parametrize(
    "host_read",
    [
        lambda norm: norm.item(),
        lambda norm: norm.tolist(),
        lambda norm: norm.cpu().numpy(),
        lambda norm: 1 if norm > 0 else 0,
        float,
    ],
    ids=["item", "tolist", "cpu", "if", "float"],
)
def test_meta_device_host_read_raises(host_read):
    """The tests above can fail: each way of reading a value is caught."""
    norm = Gradients(meta_parameters([torch.float32])).total_norm()
    with pytest.raises((RuntimeError, NotImplementedError), match=r"(?i)meta"):
        host_read(norm)


def test_meta_device_host_half_raises():
    """And so is the package's own host half, which does read."""
    parameters = meta_parameters([torch.float32])
    gradients = Gradients(parameters)
    with pytest.raises((RuntimeError, NotImplementedError), match=r"(?i)meta"):
        measure(gradients).read(gradients, Layout.of("abc", [(1,)] * 3))
