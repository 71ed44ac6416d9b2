"""Faults seen in other tools; each has its test here, named after it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from builders import mlp, through_checkpoint, with_grads
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.optim import SGD, Adam
from torch.utils.tensorboard import SummaryWriter

from lightning_gradguard import ClipNorm, ClipValue, Explosion, Guard
from lightning_gradguard.layout import Layout
from lightning_gradguard.measure.gradients import Gradients
from lightning_gradguard.measure.histogram import HistogramMeter
from lightning_gradguard.sinks import TensorBoardSink

pytestmark = pytest.mark.filterwarnings("ignore::lightning_gradguard.GradientWarning")


class Loop:
    """A model of one or many parameters whose gradients are set from outside."""

    def __init__(self, count=1, **settings):
        self.parameters = [torch.nn.Parameter(torch.ones(4)) for _ in range(count)]
        named = [(f"layer{index}.weight", parameter) for index, parameter in enumerate(self.parameters)]
        self.guard = Guard(named, SGD(self.parameters, lr=0.0), **({"explosion": "skip"} | settings))

    def steps(self, norms):
        """The records of steps on gradients of these global norms."""
        return [self.step(norm) for norm in norms]

    def step(self, norm):
        """One step."""
        for parameter in self.parameters:
            parameter.grad = torch.full((4,), float(norm) / math.sqrt(4 * len(self.parameters)))
        return self.guard.step()


def skipped(records):
    """Which steps were passed over."""
    return [index for index, record in enumerate(records) if record.decision.skip]


def healthy(count, seed=0):
    """Norms of an ordinary training."""
    return np.exp(np.random.default_rng(seed).normal(0.0, 0.2, count))


def test_one_nan_skips_no_healthy_step_after_it():
    """OLMo-core's SkipStepOptimizer passes over the next 128 steps."""
    assert skipped(Loop().steps([*healthy(64), math.nan, *healthy(128, seed=1)])) == [64]


def test_one_nan_hides_no_later_spike():
    """KillLossSpike and stabilityguard's StabilityMonitor then miss one of 1e6."""
    assert skipped(Loop().steps([*healthy(64), math.nan, *healthy(5, seed=1), 1e6, 1.0])) == [64, 70]


@pytest.mark.parametrize("clip", [1.0, ClipNorm(1.0, math.inf), ClipValue(0.1)], ids=str)
def test_one_nan_poisons_no_later_clipping(clip):
    """After it, 30 of 30 clean steps of AutoClip are all NaN; ZClip never recovers either."""
    loop = Loop(clip=clip, nonfinite="warn", explosion=None)
    loop.steps([*healthy(20), math.nan])
    for norm in 10.0 * healthy(30, seed=1):
        record = loop.step(norm)
        assert math.isfinite(record.clipped_norm)
        assert loop.parameters[0].grad.isfinite().all()


def test_second_step_with_one_value_of_history_stays_clean():
    """AutoClip's StandardClip takes the standard deviation of one value: NaN on its second step."""
    loop = Loop(clip=1.0, explosion=Explosion("skip", warmup_steps=2))
    for record in loop.steps([2.0, 2.0, 2.0]):
        assert not record.decision.skip
        assert record.clipped_norm == pytest.approx(1.0, rel=1e-5)
        assert loop.parameters[0].grad.isfinite().all()


def test_warmup_is_counted_in_steps_whatever_the_number_of_parameters():
    """In smartclip each parameter is one observation, so that it ends after one step."""
    for count in (1, 100):
        limits = [record.explosion_limit for record in Loop(count).steps([1.0] * 20)]
        assert [math.isfinite(limit) for limit in limits] == [False] * 16 + [True] * 4


def test_clean_step_after_a_scaler_overflow_is_applied():
    """Stabilityguard drops it."""
    model = mlp(3, 2)
    optimizer = SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    guard = Guard(model.named_parameters(), optimizer, scaler=scaler)

    def step(factor):
        optimizer.zero_grad()
        before = model[0].weight.clone()
        scaler.scale(model(torch.ones(2, 3)).square().sum()).backward()
        model[0].weight.grad *= factor
        guard.step()
        scaler.step(optimizer)
        scaler.update()
        return not torch.equal(before, model[0].weight)

    assert [step(factor) for factor in (1.0, math.inf, 1.0)] == [True, False, True]
    assert guard.totals.num_overflows == 1
    assert scaler.get_scale() == 512.0


def test_blame_goes_to_the_worst_and_between_equals_to_the_first():
    """In stabilityguard it depends on the order of hashes."""
    named = [(f"layer{index}.weight", parameter) for index, parameter in enumerate(with_grads(*torch.ones(5, 3)))]
    guard = Guard(named)
    for index, count in ((4, 1), (1, 1), (3, 2)):
        named[index][1].grad[:count] = math.nan
    (alert,) = guard.step().alerts
    assert [report.name for report in alert.parameters] == ["layer3.weight", "layer1.weight", "layer4.weight"]


def test_state_of_a_run_can_be_loaded():
    """Lightning's SpikeDetection raises in `load_state_dict`."""
    loop, resumed = Loop(clip=1.0), Loop(clip=1.0)
    loop.steps([*healthy(40), math.nan, 100.0])
    resumed.guard.load_state_dict(through_checkpoint(loop.guard.state_dict()))
    assert resumed.guard.state_dict() == loop.guard.state_dict()


def test_nonfinite_switch_means_what_it_says():
    """Lightning's SpikeDetection has `finite_only` inverted."""
    assert skipped(Loop(nonfinite="skip").steps([1.0, math.nan, math.inf])) == [1, 2]
    assert skipped(Loop(nonfinite=None).steps([1.0, math.nan, math.inf])) == []


@pytest.mark.parametrize("bad", [math.nan, 1e9])
def test_bad_step_is_found_before_it_is_applied(bad):
    """Lightning's SpikeDetection fires when the weights have moved."""
    model = mlp(3, 2)
    optimizer = Adam(model.parameters(), lr=0.1)
    guard = Guard(model.named_parameters(), optimizer, explosion="stop")
    for step in range(31):
        before = model[0].weight.clone()
        optimizer.zero_grad()
        ((bad if step == 30 else 1.0) * model(torch.ones(2, 3)).sum()).backward()
        guard.step()
        optimizer.step()
        assert torch.equal(before, model[0].weight) == (step == 30)


def test_clipping_leaves_a_zero_initialised_bias_trainable():
    """Composer's AGC, without an eps, multiplies its gradient by zero. The limit here does not look at weights."""
    bias = torch.nn.Parameter(torch.zeros(4))
    guard = Guard([("bias", bias)], clip=1.0)
    bias.grad = torch.full((4,), 2.0)
    guard.step()
    assert bias.grad.norm().item() == pytest.approx(1.0, rel=1e-5)


def test_clipping_spreads_no_infinity():
    """torch.nn.utils.clip_grad_norm_ turns [1, inf, 2] into [0, nan, 0]."""
    theirs, ours = with_grads(*[torch.tensor([1.0, math.inf, 2.0]) for _ in range(2)])
    torch.nn.utils.clip_grad_norm_([theirs], 1.0)
    assert repr(theirs.grad.tolist()) == "[0.0, nan, 0.0]"
    guard = Guard([("w", ours)], clip=1.0, nonfinite="warn")
    guard.step()
    assert ours.grad.tolist() == [1.0, math.inf, 2.0]


def test_histogram_counts_nan_instead_of_dropping_it():
    """wandb.watch leaves NaN out before it bins."""
    gradients = Gradients(with_grads(torch.tensor([1.5, math.nan, math.inf, 0.0])))
    meter = HistogramMeter()
    found = meter.read(meter.count(gradients), gradients.present, Layout.of(["w"], [(4,)]))
    assert (found.counts.sum(), found.num_nan[0], found.num_inf[0], found.num_zero[0]) == (1, 1, 1, 1)


def test_histogram_of_nothing_but_nan_reaches_tensorboard(tmp_path):
    """SummaryWriter.add_histogram raises on it, and lightning-bolts crashes."""
    sink = TensorBoardSink(SummaryWriter(tmp_path))
    loop = Loop(sinks=[sink], histogram_every_n_steps=1)
    loop.step(math.nan)
    sink.close()
    tags = EventAccumulator(str(tmp_path)).Reload().Tags()
    assert "gradients/layer0.weight" in tags["histograms"]
    assert "gradguard/log10_norms" in tags["histograms"]


def test_falling_loss_and_norm_raise_no_alarm():
    """Trainscope's CUSUM does, on every run that learns."""
    loop = Loop(vanishing="warn")
    for scale in np.geomspace(1.0, 1e-4, 200):
        loop.guard.before_backward(torch.tensor(float(scale)))
        assert loop.step(scale).verdicts == ()


def test_summed_loss_raises_no_alarm():
    """Trainpulse and neurolens have absolute thresholds, as norm > 100."""
    assert not any(record.verdicts for record in Loop().steps(5000.0 * healthy(200)))


def test_norm_is_that_of_the_whole_step_unscaled():
    """Hooks of wandb, gradviz and smdebug see scaled gradients, one micro-batch at a time."""
    model = torch.nn.Linear(4, 1, bias=False)
    optimizer = SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    guard = Guard(model.named_parameters(), optimizer, scaler=scaler)
    for _ in range(4):
        loss = scaler.scale(model(torch.full((1, 4), 0.5)).sum())
        guard.before_backward(loss)
        loss.backward()
    assert guard.step().measurement.global_norm == pytest.approx(4.0)
