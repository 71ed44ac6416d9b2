"""What every clipper has to keep to."""

from __future__ import annotations

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from builders import examples, through_checkpoint, with_grads
from hypothesis import given
from hypothesis import strategies as st

import lightning_gradguard
from lightning_gradguard import AGC, AdaGC, AutoClip, ClipNorm, ClipParameterNorm, ClipValue, Grouped, ZClip
from lightning_gradguard.clippers import Clipped, Clipper, FactorClipper
from lightning_gradguard.measure.gradients import Gradients


class Halve(FactorClipper):
    """A clipper as a user would write it: half of whatever is above its limit."""

    def coefficient(self, gradients, global_norm):
        return torch.where(global_norm > 1.0, 0.5, 1.0)


MAKERS = {
    "norm": lambda: ClipNorm(1.0),
    "norm-1": lambda: ClipNorm(1.0, norm_type=1.0),
    "norm-3": lambda: ClipNorm(1.0, norm_type=3.0),
    "norm-inf": lambda: ClipNorm(1.0, norm_type=math.inf),
    "value": lambda: ClipValue(0.5),
    "parameter-norm": lambda: ClipParameterNorm(1.0),
    "parameter-norm-1": lambda: ClipParameterNorm(1.0, norm_type=1.0),
    "parameter-norm-inf": lambda: ClipParameterNorm(1.0, norm_type=math.inf),
    "agc": lambda: AGC(clip_factor=1.0, eps=0.5),
    "autoclip": lambda: AutoClip(percentile=50.0, window=4),
    "zclip": lambda: ZClip(warmup_steps=3),
    "zclip-uncapped": lambda: ZClip(warmup_steps=3, max_norm=None),
    "adagc": lambda: AdaGC(warmup_steps=3),
    "grouped": lambda: Grouped({"0": AutoClip(), "1": 1.0, "2": AGC(clip_factor=1.0, eps=0.5)}),
    "own": Halve,
}
every_clipper = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
factor_clippers = {key: make for key, make in MAKERS.items() if isinstance(make(), FactorClipper)}
every_factor_clipper = pytest.mark.parametrize("make", factor_clippers.values(), ids=factor_clippers)
PUBLIC = {name: getattr(lightning_gradguard, name) for name in lightning_gradguard.__all__}
ROWS = st.lists(
    st.lists(st.floats(-1e6, 1e6).map(lambda x: float(np.float32(x))), min_size=1, max_size=4), min_size=1, max_size=4
)


def clip(clipper, *grads):
    """Clip these gradients; what was done, and the gradients after."""
    parameters = with_grads(*grads)
    gradients = Gradients(parameters)
    done = clipper.clip_(gradients, gradients.total_norm())
    return done, [parameter.grad for parameter in parameters]


def tensors(rows):
    """Fresh float32 gradients."""
    return [torch.tensor(row, dtype=torch.float32) for row in rows]


def norm_of(grads):
    """2-norm in float64, by numpy."""
    return float(np.linalg.norm(torch.cat([grad.reshape(-1) for grad in grads]).double().numpy()))


@every_clipper
@examples
@given(rows=ROWS)
def test_clipper_any_gradients_tells_what_it_did(make, rows):
    """The norm after is the norm after, `coef` its ratio, in (0, 1]; nothing grows or turns round."""
    before = tensors(rows)
    done, after = clip(make(), *tensors(rows))
    assert 0.0 < done.coef <= 1.0
    assert done.norm == pytest.approx(norm_of(after), rel=1e-5, abs=1e-30)
    assert done.norm == pytest.approx(done.coef * norm_of(before), rel=1e-5, abs=1e-30)
    for old, new in zip(before, after, strict=True):
        assert (new.abs() <= old.abs()).all()
        assert (new * old >= 0).all()


@every_clipper
@examples
@given(rows=ROWS)
def test_clipper_below_its_threshold_changes_no_bit(make, rows):
    """Not even by a factor of one plus rounding."""
    largest = max(abs(value) for row in rows for value in row) or 1.0
    small = [torch.tensor(row, dtype=torch.float32) / largest * 0.01 for row in rows]
    done, after = clip(make(), *[grad.clone() for grad in small])
    assert done.coef == 1.0
    assert all(torch.equal(new, old) for new, old in zip(after, small, strict=True))


@pytest.mark.parametrize("make", [make for key, make in MAKERS.items() if key != "own"])
@examples
@given(rows=ROWS)
def test_clipper_applied_twice_does_nothing_more(make, rows):
    """Up to the 1e-6 that torch adds to a norm before it divides."""
    _, once = clip(make(), *tensors(rows))
    _, twice = clip(make(), *[grad.clone() for grad in once])
    for new, old in zip(twice, once, strict=True):
        assert torch.allclose(new, old, rtol=3e-6, atol=1e-35)


@every_factor_clipper
@examples
@given(rows=ROWS)
def test_factor_clipper_keeps_the_direction(make, rows):
    """Each element is the old one times the same factor, to the last bit."""
    before = tensors(rows)
    done, after = clip(make(), *tensors(rows))
    factor = torch.tensor(done.coef, dtype=torch.float32)
    assert all(torch.equal(new, old * factor) for new, old in zip(after, before, strict=True))


@pytest.mark.parametrize(
    "make",
    [
        ClipNorm,
        lambda size: ClipNorm(size, 1.0),
        ClipValue,
        ClipParameterNorm,
        lambda size: AGC(eps=size),
        lambda size: ZClip(max_norm=size),
        lambda size: AdaGC(max_norm=size),
        lambda size: Grouped({"*": size}),
    ],
)
@examples
@given(rows=ROWS, exponent=st.integers(0, 20))
def test_clipper_gradients_and_limit_scaled_alike_scale_the_result(make, rows, exponent):
    """Units of the loss don't matter, up to the 1e-6 that torch adds to a norm."""
    scale = 2.0**exponent
    _, plain = clip(make(1.0), *tensors(rows))
    _, scaled = clip(make(scale), *[grad * scale for grad in tensors(rows)])
    for a, b in zip(plain, scaled, strict=True):
        assert torch.allclose(a * scale, b, rtol=3e-6, atol=1e-35)


ODD = {
    "nan": [[1.0, math.nan], [2.0]],
    "all-nan": [[math.nan, math.nan]],
    "inf": [[1.0, math.inf, 2.0]],
    "minus-inf": [[1.0, -math.inf], [3.0]],
    "zero": [[0.0, 0.0]],
    "one": [[3.0]],
    "empty": [[], [5.0]],
    "only-empty": [[]],
}


@every_clipper
@pytest.mark.parametrize("rows", ODD.values(), ids=ODD)
def test_clipper_on_odd_gradients_spreads_no_damage(make, rows):
    """What was finite stays finite, and nothing raises or warns."""
    before = tensors(rows)
    done, after = clip(make(), *tensors(rows))
    assert 0.0 <= done.coef <= 1.0
    for old, new in zip(before, after, strict=True):
        assert torch.equal(old.isnan(), new.isnan())
        assert bool((new.isfinite() | ~old.isfinite()).all())


def test_clip_value_infinite_element_has_a_coefficient_above_zero():
    """`coef` lies in (0, 1] by contract, also where a clamp has brought infinity down."""
    done, _ = clip(ClipValue(0.5), torch.tensor([1.0, math.inf]))
    assert 0.0 < done.coef <= 1.0


@every_factor_clipper
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_factor_clipper_nonfinite_gradients_are_left_as_they_are(make, bad):
    """The clipping of torch would turn [1, inf, 2] into [0, nan, 0]."""
    done, (after,) = clip(make(), torch.tensor([1.0, bad, 2.0]))
    assert repr(after.tolist()) == repr([1.0, bad, 2.0])
    assert done.coef == 1.0


@every_clipper
def test_clipper_state_round_trip_continues_bit_identically(make):
    """Through a checkpoint, into a fresh one."""
    through, resumed = make(), make()
    steps = [torch.randn(5) * 10 ** float(torch.randn(())) for _ in range(20)]
    for grad in steps[:10]:
        clip(through, grad.clone())
    resumed.load_state_dict(through_checkpoint(through.state_dict()))
    for grad in steps[10:]:
        (done, (a,)), (again, (b,)) = clip(through, grad.clone()), clip(resumed, grad.clone())
        assert done == again
        assert torch.equal(a, b)


@every_clipper
@pytest.mark.parametrize("clone", [copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))], ids=["deepcopy", "pickle"])
def test_clipper_copied_clips_alike(make, clone):
    """Each optimizer gets a copy of its own."""
    original = make()
    (done, (a,)), (again, (b,)) = clip(original, torch.full((4,), 7.0)), clip(clone(original), torch.full((4,), 7.0))
    assert done == again
    assert torch.equal(a, b)


@every_clipper
def test_clipper_one_damaged_step_changes_no_later_one(make):
    """Whatever it remembers, NaN does not enter."""
    untouched, disturbed = make(), make()
    clip(disturbed, torch.tensor([1.0, math.nan]))
    for scale in (1.0, 10.0, 0.1):
        (done, (a,)), (again, (b,)) = clip(untouched, torch.full((4,), scale)), clip(disturbed, torch.full((4,), scale))
        assert done == again
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "clipper",
    [
        ClipNorm(2.5, norm_type=math.inf),
        ClipValue(0.25),
        ClipParameterNorm(2.5, norm_type=math.inf),
        AGC(0.02, exclude=["head.*"]),
        AutoClip(20.0, window=None),
        ZClip(3.0, max_norm=None),
        AdaGC(1.1),
        Grouped({"a.*": 1.0, "b.*": AGC(), "c": None}),
    ],
    ids=lambda clipper: type(clipper).__name__,
)
def test_clipper_shown_reads_like_its_call(clipper):
    """So that a printed configuration can be pasted."""
    assert repr(eval(repr(clipper), {"inf": math.inf} | PUBLIC)) == repr(clipper)


def test_clipper_is_abstract():
    """A rule is needed; state is optional."""
    with pytest.raises(TypeError, match="clip_"):
        Clipper()
    assert Clipped(coef=0.5, norm=1.0) == Clipped(0.5, 1.0)
