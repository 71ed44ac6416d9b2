"""Clippers that adapt, against a second implementation of each paper's formula in numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from builders import mlp, through_checkpoint, with_grads
from torch import nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import LBFGS, SGD, AdamW

from lightning_gradguard import (
    AGC,
    AdaGC,
    AutoClip,
    ClipNorm,
    ClipParameterNorm,
    Clipper,
    ClipValue,
    GradGuard,
    Grouped,
    Guard,
    GuardWarning,
    ZClip,
)
from lightning_gradguard.act import choice
from lightning_gradguard.measure.gradients import Gradients

NUM_STEPS = 60


def record(num_steps=NUM_STEPS):
    """Gradients of a training, [step][parameter], with ordinary noise and a few spikes."""
    torch.manual_seed(3)
    model = mlp(4, 12, 12, 1)
    optimizer = SGD(model.parameters(), lr=0.05)
    steps = []
    for step in range(num_steps):
        inputs = torch.randn(8, 4)
        factor = {20: 30.0, 33: 400.0, 34: 2.0, 50: 8.0}.get(step, 1.0)
        optimizer.zero_grad()
        (factor * (model(inputs) - inputs.sum(1, keepdim=True)).square().mean()).backward()
        steps.append([parameter.grad.clone() for parameter in model.parameters()])
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return steps


@pytest.fixture(scope="module")
def recorded():
    """The same for all tests of this file."""
    return record()


def parameters_with(grads, weights=None):
    """Parameters that carry copies of these gradients."""
    parameters = with_grads(*[grad.clone() for grad in grads])
    for parameter, weight in zip(parameters, weights or [], strict=False):
        parameter.data.copy_(weight)
    return parameters


def clip(clipper, parameters, names=()):
    """Clip what the parameters carry."""
    gradients = Gradients(parameters, names=names)
    return clipper.clip_(gradients, gradients.total_norm())


def play(clipper, steps):
    """Clip one step after another; what was done, and the gradients after, in float64."""
    done, after = [], []
    for grads in steps:
        parameters = parameters_with(grads)
        done.append(clip(clipper, parameters))
        after.append([parameter.grad.double().numpy() for parameter in parameters])
    return done, after


def norms_of(steps):
    """Global norm of each step, by numpy in float64."""
    return [math.sqrt(sum(float((grad.double() ** 2).sum()) for grad in grads)) for grads in steps]


def assert_scaled(steps, after, factors):
    """Each gradient is the recorded one times its factor: one a step, or one for each parameter."""
    for grads, clipped, factor in zip(steps, after, factors, strict=True):
        for grad, new, one in zip(grads, clipped, np.broadcast_to(factor, len(grads)), strict=True):
            np.testing.assert_allclose(new, grad.double().numpy() * one, rtol=2e-6, atol=1e-12)


# AutoClip


@pytest.mark.parametrize("window", [None, 7, 1000])
@pytest.mark.parametrize("percentile", [10.0, 50.0, 100.0])
def test_autoclip_recorded_gradients_equal_the_papers_formula(recorded, percentile, window):
    """min(1, eta / norm), eta being numpy's percentile of the norms so far."""
    norms = norms_of(recorded)
    factors = [
        min(1.0, np.percentile(norms[: step + 1][-(window or NUM_STEPS) :], percentile) / norms[step])
        for step in range(NUM_STEPS)
    ]
    done, after = play(AutoClip(percentile, window=window), recorded)
    assert_scaled(recorded, after, factors)
    assert [one.coef for one in done] == pytest.approx(factors, rel=2e-6)


def test_autoclip_first_step_is_not_clipped():
    """Its own percentile is itself; no statistic of one value turns it into NaN, not on the second step either."""
    clipper = AutoClip()
    assert clip(clipper, with_grads(torch.tensor([3.0]))).coef == 1.0
    assert clip(clipper, with_grads(torch.tensor([3.0]))).coef == 1.0


def test_autoclip_zero_gradients_do_not_freeze_it():
    """Twenty steps without a gradient, as with a warm-up from zero: they are no history."""
    clipper = AutoClip()
    for _ in range(20):
        clip(clipper, with_grads(torch.zeros(3)))
    parameters = with_grads(torch.ones(3))
    assert clip(clipper, parameters).coef == 1.0
    assert parameters[0].grad.tolist() == [1.0, 1.0, 1.0]


def test_autoclip_window_forgets():
    """Once the large norms have left the window, they no longer count."""
    clipper = AutoClip(50.0, window=3)
    for size in (100.0, 100.0, 1.0, 1.0):
        clip(clipper, with_grads(torch.tensor([size])))
    assert clip(clipper, with_grads(torch.tensor([50.0]))).norm == pytest.approx(1.0)


# ZClip


def zclip_factors(norms, z, decay, warmup_steps, max_norm):
    """The rule, written down a second time: EMA of mean and variance, reciprocal clipping, a cap."""
    mean = variance = None
    factors = []
    for step, norm in enumerate(norms):
        target = norm
        if mean is not None:
            score = (norm - mean) / math.sqrt(variance)
            if score > z:
                target = mean + (z * math.sqrt(variance)) / (score / z)
            mean = decay * mean + (1 - decay) * target
            variance = decay * variance + (1 - decay) * (target - mean) ** 2
        elif step + 1 == warmup_steps:
            mean, variance = np.mean(norms[:warmup_steps]), np.var(norms[:warmup_steps])
        factors.append(min(target, max_norm) / norm if min(target, max_norm) < norm else 1.0)
    return factors


@pytest.mark.parametrize("max_norm", [1.0, 5.0, None])
@pytest.mark.parametrize(("z", "decay", "warmup_steps"), [(2.5, 0.97, 25), (1.0, 0.5, 2), (2.0, 0.9, 10)])
def test_zclip_recorded_gradients_equal_the_authors_rule(recorded, z, decay, warmup_steps, max_norm):
    """Spikes inside and after the warm-up, and a spike right after a spike."""
    factors = zclip_factors(norms_of(recorded), z, decay, warmup_steps, max_norm or math.inf)
    done, after = play(ZClip(z, decay, warmup_steps, max_norm), recorded)
    assert_scaled(recorded, after, factors)
    assert [one.coef for one in done] == pytest.approx(factors, rel=5e-6)
    assert min(factors) < 0.1


def test_zclip_spike_further_out_ends_up_lower():
    """That is what reciprocal clipping means."""
    after = []
    for size in (3.0, 30.0, 300.0):
        clipper = ZClip(warmup_steps=4, max_norm=None)
        for norm in (1.0, 1.1, 0.9, 1.0):
            clip(clipper, with_grads(torch.tensor([norm])))
        after.append(clip(clipper, with_grads(torch.tensor([size]))).norm)
    assert after[0] > after[1] > after[2] > 1.0


def test_zclip_warm_up_is_counted_in_steps():
    """A hundred parameters are no hundred steps: in the second step there is no z-score yet."""
    clipper = ZClip(warmup_steps=3, max_norm=None)
    for size in (1.0, 50.0):
        assert clip(clipper, with_grads(*[torch.tensor([size])] * 100)).coef == 1.0


def test_zclip_zero_gradients_do_not_freeze_it():
    """Mean 0 and variance 0 would bring every later norm to 0."""
    clipper = ZClip(warmup_steps=3, max_norm=None)
    for _ in range(10):
        clip(clipper, with_grads(torch.zeros(2)))
    assert clip(clipper, with_grads(torch.ones(2))).coef == 1.0


def test_zclip_constant_norms_keep_the_mean():
    """Without variance an outlier comes down to the mean, and nothing is divided by zero."""
    clipper = ZClip(warmup_steps=2, max_norm=None)
    for _ in range(3):
        assert clip(clipper, with_grads(torch.tensor([2.0]))).coef == 1.0
    assert clip(clipper, with_grads(torch.tensor([8.0]))).norm == pytest.approx(2.0)


# AdaGC


def adagc_factors(steps, ratio, decay, warmup_steps, max_norm):
    """The paper's algorithm 1, per tensor."""
    norms = np.array([[float(grad.double().norm()) for grad in grads] for grads in steps])
    gamma = np.full(norms.shape[1], np.inf)
    factors = []
    for step, row in enumerate(norms):
        if step < warmup_steps:
            factor = np.full_like(row, min(max_norm / np.linalg.norm(row), 1.0))
            gamma = np.minimum(gamma, factor * row)
        else:
            factor = np.minimum(ratio * gamma / row, 1.0)
            gamma = decay * gamma + (1 - decay) * factor * row
        factors.append(factor)
    return factors


@pytest.mark.parametrize(
    ("ratio", "decay", "warmup_steps", "max_norm"), [(1.05, 0.98, 100, 1.0), (1.05, 0.98, 10, 1.0), (1.5, 0.9, 1, 5.0)]
)
def test_adagc_recorded_gradients_equal_the_papers_formula(recorded, ratio, decay, warmup_steps, max_norm):
    """In its warm-up, and after."""
    factors = adagc_factors(recorded, ratio, decay, warmup_steps, max_norm)
    _, after = play(AdaGC(ratio, decay, warmup_steps, max_norm), recorded)
    assert_scaled(recorded, after, factors)


def test_adagc_spike_of_one_tensor_leaves_the_others():
    """That is what it is for."""
    clipper = AdaGC(warmup_steps=2, max_norm=10.0)
    for _ in range(3):
        clip(clipper, with_grads(torch.ones(2), torch.ones(3)))
    parameters = with_grads(torch.full((2,), 1e4), torch.ones(3))
    clip(clipper, parameters)
    assert parameters[0].grad.norm().item() == pytest.approx(1.05 * math.sqrt(2))
    assert parameters[1].grad.tolist() == [1.0, 1.0, 1.0]


def test_adagc_zero_gradient_does_not_freeze_its_tensor():
    """Neither in the warm-up, where the paper takes the smallest norm, nor after."""
    clipper = AdaGC(warmup_steps=2, max_norm=10.0)
    for first in (0.0, 1.0, 1.0, 0.0, 0.0):
        clip(clipper, with_grads(torch.tensor([first]), torch.ones(1)))
    assert clip(clipper, with_grads(torch.ones(1), torch.ones(1))).coef == 1.0


def test_adagc_late_tensor_has_a_warm_up_of_its_own():
    """Unfrozen after the others' warm-up, it is neither free nor frozen."""
    clipper = AdaGC(warmup_steps=2, max_norm=1.0)
    for _ in range(4):
        clip(clipper, with_grads(torch.tensor([0.5])), names=["old"])
    parameters = with_grads(torch.tensor([0.5]), torch.tensor([100.0]))
    clip(clipper, parameters, names=["old", "new"])
    assert parameters[1].grad.item() == pytest.approx(100.0 / math.hypot(0.5, 100.0))
    assert parameters[0].grad.item() == 0.5


def test_adagc_damaged_tensor_leaves_the_sound_ones_their_limits():
    """The sound ones are clipped by what is known; nothing of the step is remembered."""
    clipper = AdaGC(warmup_steps=1, max_norm=10.0)
    clip(clipper, with_grads(torch.ones(1), torch.ones(1)))
    before = clipper.state_dict()
    parameters = with_grads(torch.tensor([math.nan]), torch.tensor([7.0]))
    assert clip(clipper, parameters).coef == 1.0
    assert parameters[1].grad.item() == pytest.approx(1.05)
    assert clipper.state_dict() == before


def test_adagc_state_follows_names_not_positions():
    """After a parameter was added in front, and in whatever order a checkpoint lists them."""
    saved = AdaGC(warmup_steps=1, max_norm=100.0)
    clip(saved, with_grads(torch.tensor([1.0]), torch.tensor([9.0])), names=["a", "b"])
    state = through_checkpoint(saved.state_dict())
    turned = {key: dict(reversed(values.items())) for key, values in state.items()}
    clipper = AdaGC(warmup_steps=1, max_norm=100.0)
    clipper.load_state_dict(turned)
    parameters = with_grads(torch.tensor([9.0]), torch.tensor([9.0]))
    clip(clipper, parameters, names=["b", "a"])
    assert [parameter.grad.item() for parameter in parameters] == pytest.approx([9.0, 1.05])


# AGC


def agc_by_hand(weight, grad, clip_factor, eps):
    """The paper's equation 3, unit by unit, in float64."""
    weight, grad = weight.double().numpy(), grad.double().numpy().copy()
    units = [(...,)] if grad.ndim <= 1 else [(row,) for row in range(len(grad))]
    for unit in units:
        limit = clip_factor * max(np.linalg.norm(weight[unit]), eps)
        norm = np.linalg.norm(grad[unit])
        if norm > limit:
            grad[unit] *= limit / norm
    return grad


def test_agc_recorded_gradients_equal_the_papers_formula(recorded):
    """Matrices by rows, vectors as a whole; some units are above the limit, some below."""
    torch.manual_seed(0)
    weights = [torch.randn_like(grad) for grad in recorded[0]]
    for grads in recorded:
        parameters = parameters_with(grads, weights)
        done = clip(AGC(0.05), parameters)
        expected = [agc_by_hand(weight, grad, 0.05, 1e-3) for weight, grad in zip(weights, grads, strict=True)]
        for parameter, by_hand in zip(parameters, expected, strict=True):
            np.testing.assert_allclose(parameter.grad.double().numpy(), by_hand, rtol=3e-6, atol=1e-12)
        assert done.norm == pytest.approx(math.sqrt(sum((by_hand**2).sum() for by_hand in expected)), rel=1e-5)


@pytest.mark.parametrize("shape", [(), (1,), (5,), (3, 4), (3, 4, 2), (3, 4, 2, 2), (3, 2, 2, 2, 2), (2, 0), (0, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.complex64], ids=str)
def test_agc_any_shape_and_dtype_bounds_each_unit(shape, dtype):
    """Output units, whatever a kernel's dimensions."""
    (parameter,) = with_grads(torch.randn(shape, dtype=dtype) * 100)
    parameter.data.copy_(torch.randn(shape, dtype=dtype))
    clip(AGC(0.1), [parameter])
    units = [(parameter.data, parameter.grad)] if len(shape) <= 1 else zip(parameter.data, parameter.grad, strict=True)
    slack = 1.01 if dtype is torch.bfloat16 else 1.00001
    for weight, grad in units:
        assert grad.abs().double().norm() <= 0.1 * weight.abs().double().norm().clamp(min=1e-3) * slack


def test_agc_zero_initialised_parameters_are_not_frozen():
    """Without the floor `eps` a bias that starts at zero would stay there for good."""
    (bias,) = with_grads(torch.ones(4))
    clip(AGC(), [bias])
    assert bias.grad.norm().item() == pytest.approx(0.01 * 1e-3)


def test_agc_excluded_parameters_are_left():
    """By pattern, as the paper leaves the last layer."""
    parameters = with_grads(torch.ones(4), torch.ones(4))
    clip(AGC(exclude=["head.*"]), parameters, names=["body.weight", "head.weight"])
    assert parameters[0].grad.norm() < 1e-4
    assert parameters[1].grad.tolist() == [1.0] * 4


def test_agc_damaged_unit_leaves_the_others():
    """Row by row: one NaN says nothing about the next row."""
    (parameter,) = with_grads(torch.tensor([[math.nan, 1.0], [3.0, 4.0], [math.inf, 1.0]]))
    parameter.data.fill_(1.0)
    clip(AGC(1.0), [parameter])
    assert repr(parameter.grad[[0, 2]].tolist()) == repr([[math.nan, 1.0], [math.inf, 1.0]])
    assert parameter.grad[1].norm().item() == pytest.approx(math.sqrt(2))


def test_agc_sparse_gradient_equals_its_dense_form():
    """Rows that occur are the units; the others have no gradient anyway."""
    layers = [nn.Embedding(6, 3, sparse=sparse) for sparse in (True, False)]
    layers[1].load_state_dict(layers[0].state_dict())
    for layer in layers:
        (5 * layer(torch.tensor([1, 1, 4])).sum()).backward()
    done = [clip(AGC(), [layer.weight]) for layer in layers]
    assert done[0].norm == pytest.approx(done[1].norm)
    assert torch.allclose(layers[0].weight.grad.to_dense(), layers[1].weight.grad)


# ClipParameterNorm


@pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.0, math.inf])
def test_clip_parameter_norm_equals_torch_on_each_parameter(recorded, norm_type):
    """To the last bit, in float32."""
    for grads in recorded:
        ours, theirs = parameters_with(grads), parameters_with(grads)
        clip(ClipParameterNorm(0.1, norm_type), ours)
        for parameter in theirs:
            clip_grad_norm_([parameter], 0.1, norm_type)
        assert all(torch.equal(a.grad, b.grad) for a, b in zip(ours, theirs, strict=True))


def test_clip_parameter_norm_mixed_dtypes_and_absent_gradients():
    """Each in its own precision; None stays None."""
    parameters = with_grads(torch.ones(4), None, torch.ones(4, dtype=torch.float64), torch.ones(4, dtype=torch.bfloat16))
    clip(ClipParameterNorm(1.0), parameters)
    assert parameters[1].grad is None
    assert [parameters[index].grad.norm().item() for index in (0, 2, 3)] == pytest.approx([1.0] * 3, rel=1e-2)


# Groups


def test_grouped_each_group_equals_its_clipper_alone(recorded):
    """First match wins, a group's norm is its own, and what matches nothing is left."""
    names = ["encoder.0.weight", "encoder.0.bias", "encoder.head.weight", "encoder.head.bias", "out.weight", "out.bias"]
    clipper = Grouped({"*.head.*": ClipValue(0.01), "encoder.*": ClipNorm(0.1), "*.bias": None})
    for grads in recorded:
        ours, theirs = parameters_with(grads), parameters_with(grads)
        done = clip(clipper, ours, names=names)
        clip(ClipNorm(0.1), theirs[:2])
        clip(ClipValue(0.01), theirs[2:4])
        assert all(torch.equal(a.grad, b.grad) for a, b in zip(ours, theirs, strict=True))
        assert done.norm == pytest.approx(norms_of([[parameter.grad for parameter in ours]])[0], rel=1e-5)


def test_grouped_one_clipper_named_twice_keeps_two_histories():
    """Otherwise the groups' norms would mix."""
    clipper = Grouped(dict.fromkeys(["a", "b"], AutoClip(50.0)))
    clip(clipper, with_grads(torch.tensor([1.0]), torch.tensor([100.0])), names=["a", "b"])
    assert clip(clipper, with_grads(torch.tensor([1.0]), torch.tensor([100.0])), names=["a", "b"]).coef == 1.0


def test_grouped_damaged_group_leaves_the_others_clipped():
    """And the step's norm is said to be NaN, as it is."""
    parameters = with_grads(torch.tensor([math.nan, 5.0]), torch.tensor([3.0, 4.0]))
    done = clip(Grouped({"0": 1.0, "1": 1.0}), parameters)
    assert parameters[0].grad[1].item() == 5.0
    assert parameters[1].grad.norm().item() == pytest.approx(1.0)
    assert (done.coef, math.isnan(done.norm)) == (1.0, True)


def test_grouped_changed_groups_start_afresh_with_a_warning():
    """Groups that are as they were keep their history."""
    saved = Grouped({"a": AutoClip(), "b": ZClip(), "d": None})
    clip(saved, with_grads(torch.ones(1), torch.ones(1)), names=["a", "b"])
    resumed = Grouped({"a": AutoClip(), "b": AutoClip(), "c": 1.0, "d": None})
    with pytest.warns(GuardWarning) as warned:
        resumed.load_state_dict(through_checkpoint(saved.state_dict()))
    messages = [str(one.message) for one in warned]
    assert ["ZClip for the clipper of `b`" in messages[0], "nothing for the clipper of `c`" in messages[1]] == [True, True]
    assert resumed.groups["a"].state_dict() == saved.groups["a"].state_dict()


# In a guard

MAKERS = {
    "agc": lambda: AGC(0.02, exclude=["4.*"]),
    "autoclip": lambda: AutoClip(40.0, window=5),
    "zclip": lambda: ZClip(warmup_steps=3, max_norm=0.5),
    "adagc": lambda: AdaGC(warmup_steps=3, max_norm=0.5),
    "parameter-norm": lambda: ClipParameterNorm(0.05),
    "grouped": lambda: {"0.*": 0.05, "2.*": AGC(), "*": AutoClip(40.0)},
}
every_clipper = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


def train(make, *, factors=(1.0,) * 12, fused=False, kind=SGD, resume_at=None, **settings):
    """Train on losses multiplied by these factors, through a guard; the model, the guard, the norms after clipping."""
    torch.manual_seed(0)
    model = mlp(3, 6, 6, 1)
    optimizer = kind(model.parameters(), lr=0.05, fused=fused)
    guard = Guard(model.named_parameters(), optimizer, clip=make(), explosion=None, vanishing=None, **settings)
    clipped = []
    for step, factor in enumerate(factors):
        if step == resume_at:
            state = through_checkpoint(guard.state_dict())
            guard = Guard(model.named_parameters(), optimizer, clip=make(), explosion=None, vanishing=None, **settings)
            guard.load_state_dict(state)
        inputs = torch.randn(8, 3, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        (factor * (model(inputs) - inputs.sum(1, keepdim=True)).square().mean()).backward()
        clipped.append(guard.step().clipped_norm)
        optimizer.step()
    return model, guard, clipped


def weights(model):
    """All of them in one tensor."""
    return torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()])


@every_clipper
@pytest.mark.parametrize("kind", [SGD, AdamW])
def test_adaptive_clipper_fused_optimizer_trains_as_the_plain_one(make, kind):
    """Through `grad_scale` where the rule is one factor; within the kernel's rounding."""
    plain, guard, norms = train(make, kind=kind)
    fused, _, fused_norms = train(make, kind=kind, fused=True)
    assert torch.allclose(weights(plain), weights(fused), rtol=1e-5, atol=1e-6)
    assert norms == pytest.approx(fused_norms, rel=1e-4)
    assert guard.totals.num_clipped > 0


@every_clipper
def test_adaptive_clipper_resumed_guard_continues_bit_identically(make):
    """Through a checkpoint in the middle of the warm-up, and after it."""
    model, _, norms = train(make)
    for step in (2, 8):
        resumed, _, resumed_norms = train(make, resume_at=step)
        assert torch.equal(weights(model), weights(resumed))
        assert norms == resumed_norms


@every_clipper
@pytest.mark.filterwarnings("ignore::lightning_gradguard.GradientWarning")
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_adaptive_clipper_skipped_step_leaves_its_state(make, bad):
    """As if the step had not been; also where the step is let through."""
    _, plain, _ = train(make, factors=[1.0] * 4)
    _, skipping, _ = train(make, factors=[1.0] * 4 + [bad])
    assert skipping.state_dict()["clipper"] == plain.state_dict()["clipper"]
    _, applying, _ = train(make, factors=[1.0] * 4 + [bad], nonfinite="log")
    assert applying.state_dict()["clipper"] == plain.state_dict()["clipper"]


@every_clipper
def test_adaptive_clipper_norm_beyond_float32_is_clipped_and_not_remembered(make):
    """Finite elements whose squares overflow."""
    _, plain, _ = train(make, factors=[1.0] * 4)
    _, guard, norms = train(make, factors=[1.0] * 4 + [1e28])
    assert math.isfinite(norms[-1])
    assert guard.last.measurement.overflowed
    assert guard.last.clip_coef < 1.0
    assert guard.state_dict()["clipper"] == plain.state_dict()["clipper"]


@pytest.mark.parametrize("make", [AutoClip, lambda: ZClip(warmup_steps=50), lambda: AdaGC(warmup_steps=50)])
@pytest.mark.filterwarnings("ignore::lightning_gradguard.GradientWarning")
@pytest.mark.parametrize("is_bad", [False, True])
def test_adaptive_clipper_lbfgs_step_is_one_entry(make, is_bad):
    """However often the closure runs; and none if a later evaluation turns the step bad."""
    model = mlp(3, 2)
    optimizer = LBFGS(model.parameters(), lr=0.1, max_iter=5)
    guard = Guard(model.named_parameters(), optimizer, clip=make())
    states, calls = [], []
    for step in range(2):

        def closure(step=step):
            calls.append(step)
            optimizer.zero_grad()
            loss = model(torch.ones(2, 3)).square().sum()
            (loss * (math.nan if is_bad and step and calls.count(1) == 3 else 1.0)).backward()
            guard.step()
            return loss

        optimizer.step(closure)
        states.append(guard.state_dict()["clipper"]["state"])
    assert calls.count(1) >= 3
    assert [count_of(state) for state in states] == [1, 1 if is_bad else 2]


def count_of(state):
    """Steps that a history knows of."""
    if "counts" in state:
        return next(iter(state["counts"].values()))
    return len(state.get("values", state.get("first")))


@pytest.mark.parametrize("make", [AutoClip, ZClip])
@pytest.mark.parametrize("fused", [False, True])
def test_clipper_that_needs_the_host_is_not_deferred(make, fused, monkeypatch):
    """On a GPU: the host waits for the norm, so that the history is that of a CPU."""
    model, plain, norms = train(make, fused=fused)
    monkeypatch.setattr(choice, "DEFERRING_DEVICES", {"cuda", "cpu"})
    other, guard, other_norms = train(make, fused=fused)
    assert torch.equal(weights(model), weights(other))
    assert norms == other_norms
    assert guard.state_dict()["clipper"] == plain.state_dict()["clipper"]


def test_per_tensor_clipper_measures_once(monkeypatch):
    """It takes the norms that the guard has measured."""
    calls = []
    norms = Gradients.norms
    monkeypatch.setattr(Gradients, "norms", lambda *args, **kwargs: calls.append(1) or norms(*args, **kwargs))
    for make in (AdaGC, lambda: ClipParameterNorm(1.0), lambda: {"0.*": 1.0}):
        calls.clear()
        train(make, factors=[1.0])
        assert len(calls) == 1


# What users write


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AGC(0.0), "`clip_factor` must be a number > 0 and finite, got 0.0"),
        (lambda: AGC(eps=0.0), "`eps` must be a number > 0 and finite, got 0.0. Without a floor"),
        (lambda: AGC(exclude="head.*"), "`exclude` must be a list of patterns, got 'head.*'"),
        (lambda: AGC(exclude=[3]), r"`exclude` must be a list of patterns, got \[3\]"),
        (lambda: AutoClip(0.0), "`percentile` must be a number > 0 and <= 100, got 0.0. The paper's choice is 10"),
        (lambda: AutoClip(101.0), "`percentile` must be a number > 0 and <= 100, got 101.0"),
        (lambda: AutoClip(window=0), "`window` must be an integer >= 1, got 0. To remember all"),
        (lambda: ZClip(-1.0), "`z` must be a number > 0 and finite, got -1.0"),
        (lambda: ZClip(decay=1.0), "`decay` must be a number > 0 and < 1, got 1.0. The authors' choice is 0.97"),
        (lambda: ZClip(warmup_steps=1), "`warmup_steps` must be an integer >= 2, got 1"),
        (lambda: ZClip(max_norm=math.nan), "`max_norm` must be a number > 0 and finite, got nan. To clip outliers only"),
        (lambda: AdaGC(1.0), "`ratio` must be a number > 1 and finite, got 1.0. The paper's choice is 1.05"),
        (lambda: AdaGC(decay=True), "`decay` must be a number > 0 and < 1, got True"),
        (lambda: AdaGC(warmup_steps=0), "`warmup_steps` must be an integer >= 1, got 0"),
        (lambda: AdaGC(max_norm=0), "`max_norm` must be a number > 0 and finite, got 0"),
        (lambda: ClipParameterNorm(0.0), "`max_norm` must be a number > 0 and finite, got 0.0"),
        (lambda: ClipParameterNorm(1.0, 0.0), "`norm_type` must be a number > 0, got 0.0"),
        (lambda: GradGuard(clip={}), "`groups` must map at least one pattern of names to what clips, got {}"),
        (lambda: GradGuard(clip={1: 1.0}), "`groups` must map at least one pattern"),
        (lambda: GradGuard(clip={"a": -1.0}), "`clip` for `a` must be a number > 0 and finite, got -1.0"),
        (lambda: GradGuard(clip={"a": "1"}), r"`clip` for `a` must be a number .* or None, got '1'. For example"),
        (lambda: Grouped([("a", 1.0)]), "`groups` must map at least one pattern"),
    ],
)
def test_adaptive_clipper_bad_value_names_parameter_constraint_value_and_remedy(make, message):
    """One sentence that says what to write instead."""
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("class_path: lightning_gradguard.AGC\ninit_args: {clip_factor: 0.02, exclude: ['head.*']}", AGC),
        ("class_path: lightning_gradguard.AutoClip\ninit_args: {window: null}", AutoClip),
        ("class_path: lightning_gradguard.ZClip\ninit_args: {max_norm: null}", ZClip),
        ("class_path: lightning_gradguard.AdaGC", AdaGC),
        ("class_path: lightning_gradguard.ClipParameterNorm\ninit_args: {max_norm: 2.0}", ClipParameterNorm),
        ("encoder.*: 1.0\nnorm.*: null\nhead.*: {class_path: lightning_gradguard.AGC}", dict),
    ],
)
def test_adaptive_clipper_from_a_configuration_file(text, kind, tmp_path):
    """As LightningCLI builds it."""
    jsonargparse = pytest.importorskip("jsonargparse")
    parser = jsonargparse.ArgumentParser()
    parser.add_class_arguments(GradGuard, "guard")
    (tmp_path / "config.yaml").write_text("clip:\n" + "\n".join(f"  {line}" for line in text.splitlines()))
    made = parser.instantiate(parser.parse_args([f"--guard={tmp_path / 'config.yaml'}"])).guard
    clipper = made._settings.clipper
    assert isinstance(clipper, Grouped if kind is dict else kind)
    if kind is dict:
        assert [type(one) for one in clipper.groups.values()] == [ClipNorm, type(None), AGC]
    assert isinstance(clipper, Clipper)
