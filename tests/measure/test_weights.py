"""What is measured of the weights for the logs."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_gradguard.measure.weights import WeightMeter, can_measure, learning_rate


def test_update_ratio_of_large_tensors_is_estimated_from_a_sample():
    """Within the sample's error, whatever the layout in memory, and without a copy of the tensors."""
    torch.manual_seed(0)
    parameters = [torch.randn(512, 384), torch.randn(64, 32, 3, 3).to(memory_format=torch.channels_last), torch.randn(7)]
    before = [parameter.clone() for parameter in parameters]
    meter = WeightMeter()
    meter.start_(parameters)
    for parameter in parameters:
        parameter.add_(1e-3 * torch.randn_like(parameter))
    figures = meter.read_(parameters)
    norm = math.sqrt(sum(float(parameter.square().sum()) for parameter in parameters))
    moved = math.sqrt(sum(float((new - old).square().sum()) for new, old in zip(parameters, before, strict=True)))
    assert float(figures[0]) == pytest.approx(norm, rel=1e-5)
    assert float(figures[1]) == pytest.approx(moved / norm, rel=0.1)


def test_update_ratio_of_other_parameters_is_not_known():
    """A sample of those before the change says nothing of these; nor does one of an earlier step."""
    first, second = [torch.ones(3)], [torch.ones(3)]
    meter = WeightMeter()
    meter.start_(first)
    assert math.isnan(float(meter.read_(second)[1]))
    meter.start_(first)
    meter.forget()
    assert math.isnan(float(meter.read_(first)[1]))


@pytest.mark.parametrize(
    "parameter",
    [torch.zeros(2, dtype=torch.float8_e4m3fn), torch.zeros(2, 2).to_sparse(), torch.zeros(2, dtype=torch.complex64)],
)
def test_weights_that_are_no_plain_numbers_are_not_measured(parameter):
    """And cost nothing."""
    meter = WeightMeter()
    meter.start_([parameter])
    assert not can_measure([parameter])
    assert meter.read_([parameter]) is None


def test_weights_are_measured_without_a_sync():
    """It runs on the meta device, which has no values to wait for."""
    parameters = [torch.empty(4096, 8, device="meta")]
    meter = WeightMeter()
    meter.start_(parameters)
    assert meter.read_(parameters).shape == (2,)


def test_learning_rate_is_the_largest_of_the_groups():
    """A tensor on the CPU counts; without an optimizer there is none."""
    weight = torch.nn.Parameter(torch.ones(1))
    other = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.Adam([{"params": [weight], "lr": 0.1}, {"params": [other], "lr": torch.tensor(0.3)}])
    assert learning_rate(optimizer) == pytest.approx(0.3)
    assert learning_rate(None) is None
