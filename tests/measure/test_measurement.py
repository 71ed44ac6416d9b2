"""Gradients to a measurement: right in every dtype, exact on incidents, and nothing is changed."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from builders import examples, mlp, read, with_grads
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightning_gradguard.layout import Layout
from lightning_gradguard.measure.gradients import Gradients
from lightning_gradguard.measure.measurement import measure
from lightning_gradguard.measure.signs import MicroBatch

# What float32 accumulation may lose against float64: a few units in the last place.
FLOAT32 = 1e-6
ELEMENTS = st.floats(-(2.0**59), 2.0**59, width=32)


def dense(tensor):
    """All elements as float64 or complex128 numpy values."""
    tensor = tensor.to_dense() if tensor.is_sparse else tensor
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64).numpy().ravel()


def sparse_grad(dtype=torch.float32):
    """The gradient of a sparse embedding, one row hit twice: not coalesced."""
    embedding = nn.Embedding(6, 3, sparse=True, dtype=dtype)
    (embedding(torch.tensor([1, 1, 4])).sum() + 2 * embedding(torch.tensor([4])).sum()).backward()
    return embedding.weight


@examples
@given(st.lists(st.lists(ELEMENTS, min_size=1, max_size=5), min_size=1, max_size=5))
def test_norms_any_finite_elements_equal_numpy(rows):
    """Each norm and the global norm, against float64 numpy."""
    found = read(with_grads(*[torch.tensor(row) for row in rows]))
    expected = [np.linalg.norm(np.array(row, dtype=np.float64)) for row in rows]
    assert found.norms.tolist() == pytest.approx(expected, rel=FLOAT32, abs=1e-18)
    assert found.global_norm == pytest.approx(math.hypot(*expected), rel=FLOAT32, abs=1e-18)
    assert not found.overflowed
    assert found.max_abs is None


@pytest.mark.parametrize(
    "dtype",
    [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128, torch.float8_e4m3fn],
    ids=str,
)
def test_norms_each_dtype_equal_numpy(dtype):
    """Accumulated in float32 or wider, whatever the gradients are."""
    grads = [torch.randn(7, 5, dtype=torch.complex64 if dtype.is_complex else None).to(dtype) for _ in range(3)]
    found = read(with_grads(*grads))
    expected = [np.linalg.norm(dense(grad)) for grad in grads]
    rel = 1e-14 if dtype in (torch.float64, torch.complex128) else FLOAT32
    assert found.norms == pytest.approx(expected, rel=rel)
    assert found.global_norm == pytest.approx(np.linalg.norm(expected), rel=rel)


def test_norms_mixed_dtypes_keep_order_and_widest_precision():
    """One float64 gradient makes the whole sum float64; norms stay beside their parameters."""
    dtypes = [torch.float32, torch.float64, torch.float16, torch.complex64, torch.bfloat16, torch.float32]
    grads = [torch.full((4,), index + 1.0).to(dtype) for index, dtype in enumerate(dtypes)]
    gradients = Gradients(with_grads(*grads))
    assert gradients.norms().dtype == torch.float64
    assert read(with_grads(*grads)).norms.tolist() == [2.0, 4.0, 6.0, 8.0, 10.0, 12.0]


def test_norms_mixed_narrow_dtypes_are_float32():
    """Half precision beside float32 needs no float64."""
    gradients = Gradients(with_grads(torch.ones(4), torch.ones(4, dtype=torch.float16)))
    assert gradients.norms().dtype == torch.float32
    assert gradients.norms().tolist() == [2.0, 2.0]


@pytest.mark.parametrize("norm_type", [0.5, 1.0, 2.0, 3.0, math.inf])
def test_total_norm_each_type_equals_torch(norm_type):
    """To the last bit in float32."""
    model = mlp(5, 7, 3)
    model(torch.randn(4, 5)).square().sum().backward()
    expected = nn.utils.get_total_norm([p.grad for p in model.parameters()], norm_type)
    assert torch.equal(Gradients(list(model.parameters())).total_norm(norm_type), expected)


@pytest.mark.parametrize("norm_type", [1.0, 2.0, math.inf])
def test_norms_empty_gradient_is_zero(norm_type):
    """Torch raises for the largest of no elements."""
    gradients = Gradients(with_grads(torch.ones(0), torch.ones(1)))
    assert gradients.norms(norm_type).tolist() == [0.0, 1.0]


def test_read_only_empty_gradients_is_zero():
    """A model of zero-size parameters has a norm too."""
    assert read(with_grads(torch.ones(0), torch.ones(3, 0))).global_norm == 0.0


def test_read_some_without_gradient_leaves_their_place():
    """None is no gradient: norm 0 and not present."""
    found = read(with_grads(None, torch.tensor([3.0, 4.0]), None))
    assert found.norms.tolist() == [0.0, 5.0, 0.0]
    assert found.has_grad.tolist() == [False, True, False]
    assert found.by_name == {"p1": 5.0}


def test_read_all_without_gradient_is_finite_zero():
    """`training_step` may return None."""
    found = read(with_grads(None, None))
    assert found.global_norm == 0.0
    assert found.is_finite
    assert not found.has_grad.any()
    assert found.largest() == ()


def test_read_sparse_gradient_counts_repeated_rows_once():
    """Rows that were hit twice are added before they are squared, as the optimizer will do; the gradient itself stays."""
    weight = sparse_grad()
    expected = np.linalg.norm(dense(weight.grad))
    assert not weight.grad.is_coalesced()
    found = read([weight, *with_grads(torch.ones(4))])
    assert found.norms.tolist() == pytest.approx([expected, 2.0], rel=FLOAT32)
    assert not weight.grad.is_coalesced()


def test_read_sparse_gradient_with_nan_counts_it():
    """The damage is found among the stored values."""
    weight = sparse_grad()
    weight.grad = weight.grad.coalesce()
    weight.grad._values()[0, 1] = math.nan
    (report,) = read([weight]).nonfinite
    assert (report.num_nan, report.num_inf) == (1, 0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64, torch.complex64], ids=str)
def test_read_measuring_copies_and_changes_nothing(dtype):
    """The gradients are the same tensors with the same values; on an incident, too."""
    for damage in (1.0, math.nan):
        parameters = with_grads(torch.randn(5, dtype=torch.float64).to(dtype), torch.tensor([damage, 1.0], dtype=dtype))
        before = [(p.grad, p.grad.data_ptr(), p.grad.clone()) for p in parameters]
        read(parameters)
        for parameter, (grad, pointer, values) in zip(parameters, before, strict=True):
            assert parameter.grad is grad
            assert grad.data_ptr() == pointer
            assert torch.equal(grad.nan_to_num(7.0), values.nan_to_num(7.0))


def test_gradients_hold_the_parameters_own_memory():
    """No clone: what is scaled is what the optimizer reads."""
    parameters = with_grads(torch.ones(3), torch.ones(2))
    assert [t.data_ptr() for t in Gradients(parameters).tensors] == [p.grad.data_ptr() for p in parameters]


@pytest.mark.parametrize(
    ("dtype", "size"),
    [
        (torch.float32, 1e18),
        (torch.float32, 1e20),
        (torch.float32, 1e30),
        (torch.float32, 3e38),
        (torch.float64, 1e200),
        (torch.float64, 1e300),
        (torch.complex64, 1e25),
        (torch.complex128, 1e200),
        (torch.bfloat16, 1e30),
    ],
    ids=str,
)
def test_read_squares_overflow_gives_the_exact_norm(dtype, size):
    """Finite but too large to be squared is no damage; the norm is computed with scaling."""
    grads = [torch.full((8, 8), size, dtype=dtype), torch.ones(3, dtype=dtype)]
    found = read(with_grads(*grads))
    largest = np.abs(dense(grads[0])).max()
    assert found.global_norm == pytest.approx(8 * largest, rel=1e-6)
    assert found.norms.tolist() == pytest.approx([8 * largest, math.sqrt(3)], rel=1e-6)
    assert found.overflowed == (size > 1e19)
    assert found.nonfinite == ()
    assert found.is_finite
    assert found.max_abs is None or found.max_abs == pytest.approx(largest)


def test_read_only_the_sum_overflows_gives_the_exact_norm():
    """Each norm still fits, their squares together do not."""
    found = read(with_grads(*[torch.full((1,), 1.5e19) for _ in range(4)]))
    assert found.overflowed
    assert found.global_norm == pytest.approx(3e19, rel=1e-6)


def test_read_float16_at_its_largest_is_ordinary():
    """Four elements of 65504 have a norm beyond float16; float32 holds it."""
    found = read(with_grads(torch.full((4,), 65504.0, dtype=torch.float16)))
    assert found.global_norm == 2 * 65504.0
    assert not found.overflowed


def test_read_overflow_beside_nan_is_damage():
    """One NaN decides; the other parameter's exact norm is still told."""
    found = read(with_grads(torch.full((4,), 1e30), torch.tensor([math.nan, 1.0])))
    assert math.isnan(found.global_norm)
    assert not found.overflowed
    assert [report.name for report in found.nonfinite] == ["p1"]
    assert found.norms[0] == pytest.approx(2e30)


@examples
@given(
    st.lists(
        st.lists(st.sampled_from([1.0, -2.0, 0.0, math.nan, math.inf, -math.inf]), min_size=1, max_size=6),
        min_size=1,
        max_size=4,
    )
)
def test_read_damage_counts_equal_numpy(rows):
    """NaN and Inf for each parameter, worst first, ties in model order; the largest finite magnitude."""
    found = read(with_grads(*[torch.tensor(row) for row in rows]))
    arrays = [np.array(row) for row in rows]
    counts = {f"p{index}": (int(np.isnan(row).sum()), int(np.isinf(row).sum())) for index, row in enumerate(arrays)}
    damaged = sorted((name for name in counts if sum(counts[name])), key=lambda name: (-sum(counts[name]), name))
    assert [report.name for report in found.nonfinite] == damaged
    assert [(report.num_nan, report.num_inf) for report in found.nonfinite] == [counts[name] for name in damaged]
    flat = np.concatenate(arrays)
    assert found.is_finite == bool(np.isfinite(flat).all())
    assert math.isnan(found.global_norm) == bool(np.isnan(flat).any())
    assert math.isinf(found.global_norm) == bool(np.isinf(flat).any() and not np.isnan(flat).any())
    if damaged:
        assert found.max_abs == np.abs(np.where(np.isfinite(flat), flat, 0.0)).max()


def test_read_float8_with_nan_counts_it():
    """float8 has no arithmetic of its own."""
    (report,) = read(with_grads(torch.tensor([math.nan, 1.0]).to(torch.float8_e4m3fn))).nonfinite
    assert report.num_nan == 1


def test_read_complex_with_inf_in_the_imaginary_part_counts_it():
    """An element is damaged if either part is."""
    (report,) = read(with_grads(torch.tensor([complex(1, math.inf), complex(1, 1)]))).nonfinite
    assert (report.num_nan, report.num_inf) == (0, 1)


def test_read_damage_in_an_empty_neighbour_is_none():
    """A zero-size gradient beside a damaged one has no largest element."""
    found = read(with_grads(torch.ones(0), torch.tensor([math.nan, 3.0])))
    assert [report.name for report in found.nonfinite] == ["p1"]
    assert found.max_abs == 3.0


def read_passes(*passes, grad=1.0):
    """The measurement of one gradient that these backward passes, as (loss, norm so far), have built."""
    gradients = Gradients(with_grads(torch.tensor([grad])))
    told = [MicroBatch(*(None if value is None else torch.tensor(value) for value in each)) for each in passes]
    return measure(gradients, told).read(gradients, Layout.of(["p"], [(1,)]))


def test_read_micro_batches_in_order_has_the_last_loss():
    """The loss is that of the last backward pass."""
    found = read_passes((1.0, 2.0), (None, 3.0), (0.5, None))
    assert found.num_micro_batches == 3
    assert found.last_micro_batch == 2
    assert found.loss == 0.5
    assert found.damage is None
    assert found.is_finite


@pytest.mark.parametrize(
    ("passes", "grad", "first", "loss"),
    [
        ([(1.0, None)], math.nan, 0, None),
        ([(1.0, 1.0), (1.0, math.nan), (1.0, None)], math.nan, 1, None),
        ([(1.0, math.inf), (1.0, math.nan), (1.0, None)], math.nan, 0, None),
        ([(1.0, 1.0), (1.0, 1.0), (1.0, None)], math.nan, 2, None),
        ([(1.0, 1.0), (math.inf, math.nan), (math.nan, None)], math.nan, 1, math.inf),
        ([(1.0, 1.0), (-math.inf, 1.0), (1.0, None)], 1.0, 1, -math.inf),
        ([], math.inf, 0, None),
    ],
    ids=["only", "second", "first", "last", "by-loss", "loss-alone", "untold"],
)
def test_read_damage_names_the_first_bad_pass(passes, grad, first, loss):
    """By its loss, or by the gradients after it; the last pass where nothing earlier shows it."""
    found = read_passes(*passes, grad=grad)
    assert not found.is_finite
    assert found.damage.micro_batch == first
    assert found.damage.loss == loss


def test_read_float64_loss_beside_float32_gradients_stays_finite():
    """A loss beyond float32 is not made infinite on its way to the host."""
    gradients = Gradients(with_grads(torch.ones(1)))
    facts = measure(gradients, [MicroBatch(torch.tensor(1e200, dtype=torch.float64))])
    found = facts.read(gradients, Layout.of(["p"], [(1,)]))
    assert found.loss == torch.finfo(torch.float32).max
    assert found.is_finite


@examples
@given(st.lists(ELEMENTS, min_size=1, max_size=8), st.integers(-20, 20))
def test_norms_scaled_by_a_power_of_two_scale_exactly(row, exponent):
    """Measuring commutes with the loss scale, to the last bit, away from the ends of float32."""
    row = [value for value in row if 1e-9 < abs(value) < 1e9] or [1.0]
    grad = torch.tensor(row)
    plain = read(with_grads(grad.clone())).global_norm
    assert read(with_grads(grad * 2.0**exponent)).global_norm == plain * 2.0**exponent


def test_scale_each_dtype_multiplies_in_place():
    """One factor for all gradients, mixed dtypes included; rounding is that of the gradient's own dtype."""
    grads = [torch.randn(5).to(dtype) for dtype in (torch.float32, torch.float64, torch.float16, torch.complex64)]
    expected = [grad * torch.tensor(0.25) for grad in grads]
    parameters = with_grads(*grads)
    Gradients(parameters).scale_(torch.tensor(0.25))
    assert all(torch.equal(p.grad, want) for p, want in zip(parameters, expected, strict=True))


def test_scale_plain_number_works_too():
    """A host that knows the factor need not make a tensor of it."""
    parameters = with_grads(torch.ones(2))
    Gradients(parameters).scale_(0.5)
    assert parameters[0].grad.tolist() == [0.5, 0.5]


def test_scale_sparse_gradient_reaches_the_optimizer():
    """The coalesced values are those that `.grad` holds."""
    weight = sparse_grad()
    expected = weight.grad.to_dense() * 0.5
    Gradients([weight]).scale_(0.5)
    assert torch.equal(weight.grad.to_dense(), expected)


def test_clamp_complex_clamps_both_parts():
    """Real and imaginary part apart; NaN stays NaN."""
    parameters = with_grads(torch.tensor([complex(3, -4), complex(0.1, math.nan)]))
    Gradients(parameters).clamp_(1.0)
    parts = torch.view_as_real(parameters[0].grad)
    assert parts[0].tolist() == [1.0, -1.0]
    assert parts[1, 0].item() == pytest.approx(0.1)
    assert math.isnan(parts[1, 1])


def test_largest_parameters_come_first():
    """Largest first, those without a gradient never."""
    found = read(with_grads(torch.ones(1), None, torch.full((1,), 3.0), torch.full((1,), 2.0)))
    assert [report.name for report in found.largest(2)] == ["p2", "p3"]


def test_scale_sparse_gradient_beside_a_dense_one_leaves_the_dense_tensor_itself():
    """Only what was coalesced is another tensor afterwards."""
    sparse, (dense,) = sparse_grad(), with_grads(torch.ones(2))
    own, expected = dense.grad, sparse.grad.to_dense() * 0.5
    Gradients([sparse, dense]).scale_(0.5)
    assert dense.grad is own
    assert own.tolist() == [0.5, 0.5]
    assert torch.equal(sparse.grad.to_dense(), expected)
