"""Histograms of log10|g|."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from builders import examples, with_grads
from hypothesis import given
from hypothesis import strategies as st

from lightning_gradguard.layout import Layout
from lightning_gradguard.measure.gradients import Gradients
from lightning_gradguard.measure.histogram import EDGES, NUM_BINS, HistogramMeter

# Powers of ten that lie inside a bin, so that rounding can't move them over an edge.
INSIDE = st.integers(-40, 15).map(lambda half: 10.0 ** (half / 2 + 0.25))


def histograms(*grads, sample_size=None):
    """Histograms of these gradients."""
    gradients = Gradients(with_grads(*grads))
    meter = HistogramMeter(sample_size)
    shapes = [() if grad is None else tuple(grad.shape) for grad in grads]
    layout = Layout.of([f"p{index}" for index in range(len(grads))], shapes)
    return meter.read(meter.count(gradients), gradients.present, layout)


@pytest.mark.smoke
@examples
@given(st.lists(st.lists(st.tuples(INSIDE, st.sampled_from([-1, 1])), min_size=1, max_size=20), min_size=1, max_size=4))
def test_histogram_counts_equal_numpy(rows):
    """Exactly, in float64, for every parameter."""
    values = [np.array([sign * value for value, sign in row]) for row in rows]
    found = histograms(*[torch.tensor(row) for row in values])
    for row, counts in zip(values, found.counts, strict=True):
        assert counts.tolist() == np.histogram(np.log10(np.abs(row)), EDGES)[0].tolist()
    assert not found.sampled.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.complex64], ids=str)
def test_histogram_each_dtype_equals_numpy(dtype):
    """Magnitudes as the dtype holds them."""
    grad = (torch.randn(2000, dtype=torch.complex64 if dtype.is_complex else None) * 0.01).to(dtype)
    (counts,) = histograms(grad).counts
    wide = torch.complex128 if dtype.is_complex else torch.float64
    expected = np.histogram(np.log10(np.abs(grad.to(wide).numpy())), EDGES)[0]
    # An element on an edge may fall to either side: log10 is taken in float32.
    assert np.abs(np.cumsum(counts) - np.cumsum(expected)).max() <= 4
    assert counts.sum() == 2000


def test_histogram_without_logarithm_is_counted_apart():
    """Zeros, NaN and infinities are in no bin, and none is lost."""
    found = histograms(torch.tensor([0.0, -0.0, math.nan, math.inf, -math.inf, -math.inf, 1.5]), torch.zeros(3))
    assert found.num_zero.tolist() == [2, 3]
    assert found.num_nan.tolist() == [1, 0]
    assert found.num_inf.tolist() == [3, 0]
    assert found.counts.sum(axis=1).tolist() == [1, 0]


def test_histogram_beyond_the_outermost_bins_stays_in_them():
    """Nothing falls off the ends."""
    (counts,) = histograms(torch.tensor([1e-300, 1e-25, 1e20, 1e300], dtype=torch.float64)).counts
    assert (counts[0], counts[-1]) == (2, 2)


def test_histogram_mixed_dtypes_are_counted_together():
    """A float64 gradient beside others keeps its range."""
    grads = [torch.full((3,), 1.5, dtype=dtype) for dtype in (torch.float16, torch.float64, torch.float32)]
    found = histograms(*grads)
    assert (found.counts == found.counts[0]).all()


def test_histogram_without_gradient_has_no_row():
    """Rows are named, so that none is taken for another's."""
    found = histograms(torch.ones(1), None, torch.ones(1))
    assert found.names == ("p0", "p2")
    assert found.counts.shape == (2, NUM_BINS)


def test_histogram_empty_gradient_is_a_row_of_zeros():
    """No element, no count."""
    found = histograms(torch.ones(0), torch.ones(2))
    assert found.counts.sum(axis=1).tolist() == [0, 2]


def test_histogram_sampled_tensor_is_scaled_up_to_its_size():
    """Only what is larger than the sample is estimated; zeros, too."""
    large = torch.cat([torch.zeros(3000), torch.ones(7000)])
    found = histograms(large, torch.ones(100), sample_size=2000)
    assert found.sampled.tolist() == [True, False]
    assert found.counts[0].sum() + found.num_zero[0] == pytest.approx(10_000)
    assert found.num_zero[0] == pytest.approx(3000, abs=3 * math.sqrt(0.3 * 0.7 / 2000) * 10_000)


def test_histogram_sampled_distribution_stays_in_its_stated_bound():
    """Dvoretzky, Kiefer and Wolfowitz: off by 0.043 at most, at 1,024 elements, in 95 of 100 cases."""
    grad = torch.randn(200_000)
    (exact,) = histograms(grad).counts
    bound = math.sqrt(math.log(2 / 0.05) / (2 * 1024))
    assert bound == pytest.approx(0.043, abs=1e-3)
    meter, gradients, layout = HistogramMeter(), Gradients(with_grads(grad)), Layout.of(["p"], [(200_000,)])
    errors = [
        np.abs(np.cumsum(meter.read(meter.count(gradients), gradients.present, layout).counts[0] - exact)).max() / 200_000
        for _ in range(40)
    ]
    assert sum(error > bound for error in errors) <= 4
    assert len(set(errors)) > 20, "each step draws another sample"


def test_histogram_sampling_leaves_the_trainings_random_numbers():
    """A run draws the same numbers with histograms as without."""
    before = torch.get_rng_state()
    histograms(torch.randn(5000, generator=torch.Generator().manual_seed(1)), sample_size=100)
    assert torch.equal(torch.get_rng_state(), before)


@examples
@given(st.lists(INSIDE, min_size=1, max_size=20), st.integers(-4, 4))
def test_histogram_scaled_by_decades_moves_by_bins(row, decades):
    """A factor of ten is two bins, wherever it stays inside."""
    row = [value for value in row if 1e-12 < value < 1e2] or [1.5]
    (plain,) = histograms(torch.tensor(row, dtype=torch.float64)).counts
    (scaled,) = histograms(torch.tensor(row, dtype=torch.float64) * 10.0**decades).counts
    assert np.array_equal(np.roll(plain, 2 * decades), scaled)
