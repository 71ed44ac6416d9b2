"""Clipping against torch's own."""

from __future__ import annotations

import math

import pytest
import torch
from builders import mlp, with_grads
from torch import nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

from lightning_gradguard import ClipNorm, ClipValue
from lightning_gradguard.measure.gradients import Gradients

NORM_TYPES = [1.0, 2.0, 3.0, math.inf]


def twins(*dtypes, scale=1.0, elements=200):
    """Twice the same parameters with the same random gradients, one of each dtype."""
    grads = [scale * torch.randn(elements, dtype=dtype if dtype.is_complex else torch.float32) for dtype in dtypes]
    return tuple(
        with_grads(*[grad.to(dtype, copy=True) for grad, dtype in zip(grads, dtypes, strict=True)]) for _ in range(2)
    )


def clip(clipper, parameters):
    """Clip what the parameters carry."""
    gradients = Gradients(parameters)
    return clipper.clip_(gradients, gradients.total_norm())


def assert_close(ours, theirs, rel):
    """Gradient by gradient; `rel` 0 is to the last bit. The absolute share is float16's smallest step, 6e-8."""
    for a, b in zip(ours, theirs, strict=True):
        assert a.grad.dtype == b.grad.dtype
        assert torch.equal(a.grad, b.grad) if rel == 0 else torch.allclose(a.grad, b.grad, rtol=rel, atol=1e-7)


@pytest.mark.parametrize("norm_type", NORM_TYPES)
@pytest.mark.parametrize("max_norm", [1e-3, 1.0, 5.0, 1e4])
def test_clip_norm_float32_equals_torch_to_the_last_bit(norm_type, max_norm):
    """On a real network's gradients, above and below the limit."""
    models = [mlp(6, 16, 16, 2) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    inputs = torch.randn(8, 6)
    for model in models:
        (10 * model(inputs).square().sum()).backward()
    ours, theirs = (list(model.parameters()) for model in models)
    clip(ClipNorm(max_norm, norm_type), ours)
    clip_grad_norm_(theirs, max_norm, norm_type)
    assert_close(ours, theirs, rel=0)


def test_factor_on_the_host_is_that_of_the_kernels_to_the_last_bit():
    """Over all sizes of norms, and limits around them."""
    norms = torch.exp(torch.empty(5000).uniform_(-30.0, 60.0))
    for norm, share in zip(norms, torch.empty(5000).uniform_(0.001, 1.1).tolist(), strict=True):
        clipper = ClipNorm(share * float(norm))
        assert clipper.coefficient_on_host(float(norm)) == float(clipper.coefficient(Gradients([]), norm))


def test_subclass_with_a_rule_of_its_own_keeps_it():
    """The host doesn't compute the one that it replaces."""

    class Half(ClipNorm):
        def coefficient(self, gradients, global_norm):
            return torch.full_like(global_norm, 0.5)

    (parameter,) = with_grads(torch.ones(4))
    assert clip(Half(1.0), [parameter]).coef == 0.5
    assert parameter.grad.tolist() == [0.5] * 4


# torch takes the norm of half-precision gradients in half precision and rounds it there: half of eps of that dtype, for
# each of up to three roundings. Ours stays in float32, and the products are rounded once more.
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2, torch.float64: 0.0, torch.complex64: 0.0}


@pytest.mark.parametrize("norm_type", NORM_TYPES)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_clip_norm_other_dtypes_equal_torch_within_rounding(dtype, norm_type):
    """Half precision within its own rounding, the others to the last bit."""
    ours, theirs = twins(dtype, dtype)
    clip(ClipNorm(0.5, norm_type), ours)
    clip_grad_norm_(theirs, 0.5, norm_type)
    assert_close(ours, theirs, TOLERANCE[dtype])


@pytest.mark.parametrize("norm_type", NORM_TYPES)
def test_clip_norm_mixed_dtypes_equals_torch_within_rounding(norm_type):
    """The joint norm is taken in the widest dtype; torch rounds the half-precision share before."""
    ours, theirs = twins(torch.float32, torch.float64, torch.float16, torch.bfloat16)
    clip(ClipNorm(0.5, norm_type), ours)
    clip_grad_norm_(theirs, 0.5, norm_type)
    assert_close(ours, theirs, 1.6e-2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_clip_norm_half_precision_is_closer_to_the_truth_than_torch(dtype):
    """Against the factor in float64."""
    ours, theirs = twins(dtype, scale=3.0, elements=5000)
    exact = 1.0 / (torch.linalg.vector_norm(ours[0].grad.double()) + 1e-6)
    expected = ours[0].grad.double() * exact
    clip(ClipNorm(1.0), ours)
    clip_grad_norm_(theirs, 1.0)
    errors = [(side[0].grad.double() - expected).abs().max() for side in (ours, theirs)]
    assert errors[0] <= errors[1]
    assert torch.allclose(ours[0].grad.double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-7)


def test_clip_norm_gradients_absent_are_ignored():
    """None stays None, as with torch."""
    ours, theirs = with_grads(torch.ones(4), None), with_grads(torch.ones(4), None)
    clip(ClipNorm(0.5), ours)
    clip_grad_norm_(theirs, 0.5)
    assert torch.equal(ours[0].grad, theirs[0].grad)
    assert ours[1].grad is None


def test_clip_norm_sparse_gradient_equals_its_dense_form():
    """The clipping of torch raises here."""
    layers = [nn.Embedding(6, 3, sparse=sparse) for sparse in (True, False)]
    for layer in layers:
        (5 * layer(torch.tensor([1, 1, 4])).sum()).backward()
    done = [clip(ClipNorm(1.0), [layer.weight]) for layer in layers]
    assert done[0] == done[1]
    assert torch.equal(layers[0].weight.grad.to_dense(), layers[1].weight.grad)


def test_clip_norm_tied_parameter_watched_once_is_clipped_once():
    """One factor, applied once."""
    (shared,) = with_grads(torch.full((4,), 2.0))
    done = clip(ClipNorm(1.0), [shared])
    assert done.norm == pytest.approx(1.0, rel=1e-5)
    assert torch.linalg.vector_norm(shared.grad).item() == pytest.approx(1.0, rel=1e-5)


def test_clip_norm_of_high_type_with_overflowing_powers_keeps_the_gradients():
    """A finite gradient is made smaller, not nothing."""
    (parameter,) = with_grads(torch.full((4,), 1e14))
    done = clip(ClipNorm(1.0, norm_type=3.0), [parameter])
    assert done.coef > 0.0
    assert parameter.grad.abs().min() > 0.0


@pytest.mark.parametrize(
    "dtypes",
    [
        [torch.float32, torch.float32],
        [torch.float64],
        [torch.float16, torch.bfloat16],
        [torch.float32, torch.float64, torch.float16],
    ],
    ids=str,
)
@pytest.mark.parametrize("clip_value", [0.01, 0.5, 100.0])
def test_clip_value_each_dtype_equals_torch_to_the_last_bit(dtypes, clip_value):
    """Mixed dtypes included."""
    ours, theirs = twins(*dtypes)
    clip(ClipValue(clip_value), ours)
    clip_grad_value_(theirs, clip_value)
    assert_close(ours, theirs, rel=0)


def test_clip_value_nonfinite_elements_equal_torch():
    """NaN stays, infinities are clamped."""
    ours, theirs = (with_grads(torch.tensor([math.nan, math.inf, -math.inf, 0.1])) for _ in range(2))
    clip(ClipValue(0.5), ours)
    clip_grad_value_(theirs, 0.5)
    assert torch.equal(ours[0].grad.nan_to_num(9.0), theirs[0].grad.nan_to_num(9.0))


def test_clip_value_reports_the_norms_ratio():
    """Half of a vector clamped: the norm after over the norm before."""
    done = clip(ClipValue(1.0), with_grads(torch.tensor([3.0, 4.0, 0.0, 0.0])))
    assert done.norm == pytest.approx(math.sqrt(2))
    assert done.coef == pytest.approx(math.sqrt(2) / 5)
