"""The three ways to apply a decision: at once, queued before the host knows, and left to the device."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adagrad, AdamW
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_gradguard import ClipNorm, Detector, Explosion, Guard, Position, Verdict
from lightning_gradguard.act import choice
from lightning_gradguard.act.buffers import Buffers
from lightning_gradguard.act.gate import Gate
from lightning_gradguard.act.on_device import OnDevice
from lightning_gradguard.act.queued import Queued
from lightning_gradguard.clippers import FactorClipper
from lightning_gradguard.judge.judge import SkipThreshold
from lightning_gradguard.measure.logged import Logged
from lightning_gradguard.measure.parameters import WatchedParameters
from lightning_gradguard.measure.step import StepMeter

pytestmark = pytest.mark.filterwarnings("ignore::lightning_gradguard.GradientWarning")

FUSED = {
    "sgd": lambda parameters: SGD(parameters, lr=1e-3, momentum=0.9, fused=True),
    "adamw": lambda parameters: AdamW(parameters, lr=1e-3, fused=True),
    "adagrad": lambda parameters: Adagrad(parameters, lr=1e-3, fused=True),
}


class OwnClip(FactorClipper):
    """One of the user's, which minds a norm that is not finite."""

    def coefficient(self, gradients, global_norm):
        """To 0.5."""
        return 0.5 / global_norm.clamp(min=0.5)


SETTINGS = {
    "defaults": dict,
    "clip": lambda: {"clip": 0.5},
    "own clip": lambda: {"clip": OwnClip()},
    "skip": lambda: {"clip": 1.0, "explosion": "skip"},
    "patience": lambda: {"explosion": Explosion("skip", patience=2)},
    "max_norm": lambda: {"explosion": Explosion("skip", max_norm=50.0), "nonfinite": "warn"},
    "stop": lambda: {"explosion": "stop"},
}
FAULTS = {20: "batch", 30: "loss", 31: "loss", 40: "gradient"}
STEPS = 50


def run(optimizer_of, settings, devices, monkeypatch):
    """Train with faults; what was decided at each step, and the weights."""
    monkeypatch.setattr(choice, "DEFERRING_DEVICES", devices)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 1))
    optimizer = optimizer_of(model.parameters())
    records = []
    guard = Guard(
        model.named_parameters(), optimizer, named_buffers=model.named_buffers(), sinks=[records.append], **settings
    )
    for step in range(STEPS):
        inputs = torch.randn(16, 8)
        if FAULTS.get(step) == "batch":
            inputs[3, 2] = math.nan
        optimizer.zero_grad()
        loss = model(inputs).square().mean() * (1e3 if FAULTS.get(step) == "loss" else 1.0)
        guard.before_backward(loss)
        loss.backward()
        if FAULTS.get(step) == "gradient":
            model[0].weight.grad[0, 0] = math.inf
        guard.step()
        optimizer.step()
        if guard.stopped_by:
            break
    guard.flush()
    decided = [(record.position.step, record.decision, record.totals, len(record.alerts)) for record in records]
    figures = [(record.measurement.global_norm, record.clip_coef, record.clipped_norm) for record in records]
    return decided, torch.tensor(figures), torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("kind", FUSED)
def test_deferred_decisions_equal_immediate_ones_at_every_step(kind, settings, monkeypatch):
    """A fused optimizer that the device makes skip and clip ends where the host's own decisions lead."""
    decided, figures, weights = run(FUSED[kind], settings(), set(), monkeypatch)
    deferred, deferred_figures, deferred_weights = run(FUSED[kind], settings(), {"cpu"}, monkeypatch)
    assert deferred == decided
    torch.testing.assert_close(deferred_figures, figures, equal_nan=True, rtol=1e-5, atol=0.0)
    torch.testing.assert_close(deferred_weights, weights, equal_nan=True, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_queued_decisions_equal_immediate_ones_at_every_step(settings, monkeypatch):
    """Clipping before the host knows changes nothing, to the last bit."""
    foreach = lambda parameters: AdamW(parameters, lr=1e-3, foreach=True)  # noqa: E731
    decided, figures, weights = run(foreach, settings(), set(), monkeypatch)
    queued, queued_figures, queued_weights = run(foreach, settings(), {"cpu"}, monkeypatch)
    assert queued == decided
    torch.testing.assert_close(queued_figures, figures, equal_nan=True, rtol=1e-6, atol=0.0)
    assert torch.equal(queued_weights, weights) or weights.isnan().any()


def test_queued_step_beyond_float32_is_clipped_with_its_true_norm(monkeypatch):
    """The device can't know the norm of such gradients; the host clips them once it does."""
    monkeypatch.setattr(choice, "DEFERRING_DEVICES", {"cpu"})
    parameter = nn.Parameter(torch.zeros(4))
    guard = Guard([("p", parameter)], SGD([parameter], lr=0.1), clip=1.0, explosion=None)
    parameter.grad = torch.full((4,), 1e25)
    record = guard.step()
    assert record.measurement.overflowed
    torch.testing.assert_close(parameter.grad, torch.full((4,), 0.5))


@pytest.mark.parametrize(
    ("element", "said"),
    [
        (1e25, "the norm of the gradient of `0` is infinite: an element is, or float32 can't hold the sum of their squares"),
        (9e18, "the global gradient norm is beyond what float32 can hold, although that of each gradient is not"),
        (math.nan, "the gradient of `0` holds NaN; the norms of 1 more of 2 gradients are not finite"),
    ],
)
def test_device_that_has_skipped_a_step_by_its_norm_is_said_to_and_nothing_is_counted(element, said, monkeypatch):
    """The gradients are gone by then: whether their elements are finite is not known."""
    monkeypatch.setattr(choice, "DEFERRING_DEVICES", {"cpu"})
    parameters = [nn.Parameter(torch.zeros(4)) for _ in range(2)]
    optimizer = AdamW(parameters, lr=0.1, fused=True)
    guard = Guard([(str(index), parameter) for index, parameter in enumerate(parameters)], optimizer)
    for step in range(3):
        for parameter in parameters:
            parameter.grad = torch.full((4,), element if step == 2 else 1.0)
        before = parameters[0].detach().clone()
        guard.step()
        optimizer.step()
    guard.flush()
    assert torch.equal(parameters[0].detach(), before)
    assert guard.last.totals.num_skipped == 1
    assert said in guard.alerts[-1].message
    assert "The step is skipped." in guard.alerts[-1].message
    assert not guard.last.measurement.is_counted


def test_deferred_step_whose_norm_float32_can_not_hold_is_told_with_its_true_one(monkeypatch):
    """Those of the parameters are known by then."""
    monkeypatch.setattr(choice, "DEFERRING_DEVICES", {"cpu"})
    parameters = [nn.Parameter(torch.zeros(1)) for _ in range(2)]
    optimizer = AdamW(parameters, fused=True)
    guard = Guard([("p", parameters[0]), ("q", parameters[1])], optimizer, nonfinite="warn", explosion=None)
    for value in (1.0, 3e38):  # the first step is decided at once
        for parameter in parameters:
            parameter.grad = torch.full((1,), value)
        guard.step()
        optimizer.step()
    assert guard.is_pending
    guard.flush()
    assert not guard.is_pending
    assert guard.last.measurement.overflowed
    assert guard.last.measurement.nonfinite == ()
    assert guard.last.measurement.global_norm == pytest.approx(3e38 * math.sqrt(2.0))


@pytest.mark.parametrize("devices", [set(), {"cpu"}], ids=["at once", "deferred"])
def test_window_with_a_loss_that_is_nan_is_skipped_also_where_gradients_are_finite(devices, monkeypatch):
    """The device compares what it was told of each of the two backward passes."""
    monkeypatch.setattr(choice, "DEFERRING_DEVICES", devices)
    torch.manual_seed(0)
    model, seen = nn.Linear(4, 1), []
    optimizer = AdamW(model.parameters(), lr=0.1, fused=True)
    guard = Guard(model.named_parameters(), optimizer, sinks=[lambda record: seen.append(record.decision.skip)])
    weights = []
    for step in range(5):
        weights.append(model.weight.detach().clone())
        for micro_batch in range(2):
            loss = model(torch.randn(3, 4)).square().mean() + (math.nan if (step, micro_batch) == (3, 0) else 0.0)
            guard.before_backward(loss)
            loss.backward()
        guard.step()
        optimizer.step()
        optimizer.zero_grad()
    guard.flush()
    assert seen == [False, False, False, True, False]
    assert torch.equal(weights[4], weights[3])
    assert not torch.equal(weights[3], weights[2])


class Always(Detector):
    """Skips every step, by its own reasons."""

    name = "always"

    def observe(self, measurement):
        """A hit whatever comes."""
        return Verdict(self.name, 1.0, 0.0, "as always", "none")


def test_detector_with_reasons_of_its_own_is_asked_before_the_step(monkeypatch):
    """What the device can't judge is never left to it."""
    monkeypatch.setattr(choice, "DEFERRING_DEVICES", {"cpu"})
    parameter = nn.Parameter(torch.zeros(4))
    optimizer = AdamW([parameter], fused=True)
    guard = Guard([("p", parameter)], optimizer, detectors=[Always("skip")])
    for _ in range(3):
        parameter.grad = torch.ones(4)
        assert guard.step().decision.skip
        optimizer.step()
    assert torch.equal(parameter.detach(), torch.zeros(4))


def meta_step(optimizer_of, clipper):
    """The way of a model without memory, and a step of it: whoever reads a value there gets an error."""
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).to("meta")
    optimizer = optimizer_of(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.empty_like(parameter)
    watched = WatchedParameters(model.named_parameters(), optimizer)
    gate = Gate(watched, clipper, Buffers(model.named_buffers()), uses_scaler=False)
    meter = StepMeter(watched, None, Logged())
    meter.before_backward(torch.empty((), device="meta"))
    return choice.executor_for(gate, watched), meter.measure(Position(step=0))


@pytest.mark.smoke
@pytest.mark.parametrize("clipper", [None, ClipNorm(1.0), ClipNorm(1.0, norm_type=1.0)])
def test_deciding_on_meta_reads_nothing(clipper, monkeypatch):
    """A healthy step of a fused optimizer has no sync: skip, clip and copy of the facts are queued."""
    monkeypatch.setattr(choice, "DEFERRING_DEVICES", {"meta"})
    executor, step = meta_step(FUSED["adamw"], clipper)
    assert isinstance(executor, OnDevice)
    pending = executor.begin_(step, SkipThreshold(max_norm=10.0, must_be_finite=True))
    assert pending.is_left_to_device
    assert step.facts.pack().device.type == "meta"


@pytest.mark.parametrize("clipper", [None, ClipNorm(1.0)])
def test_queueing_on_meta_reads_nothing(clipper, monkeypatch):
    """Any other optimizer: everything is queued before the one sync."""
    monkeypatch.setattr(choice, "DEFERRING_DEVICES", {"meta"})
    executor, step = meta_step(lambda parameters: AdamW(parameters, foreach=True), clipper)
    assert isinstance(executor, Queued)
    assert not executor.begin_(step, None).is_left_to_device


class Launches(TorchDispatchMode):
    """Counts what a GPU would be sent: operators that do more than look at memory in another way."""

    NONE = ("detach", "view", "reshape", "flatten", "unsqueeze", "select", "alias", "slice", "empty")

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func._opname
        is_copy = name in ("copy_", "_to_copy")  # of the figures, on their way between host and device
        if name not in self.NONE and not is_copy:
            self.names.append(name)
        return result


@pytest.mark.parametrize("fused", [True, False])
def test_guarded_step_takes_at_most_four_launches_more_than_torchs_own_clipping(fused, monkeypatch):
    """On a GPU each costs, however small the model is."""
    monkeypatch.setattr(choice, "DEFERRING_DEVICES", {"cpu"})
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1))
    optimizer = AdamW(model.parameters(), lr=1e-3, fused=fused, foreach=None if fused else True)
    guard = Guard(model.named_parameters(), optimizer, clip=0.1, explosion="skip")
    for _ in range(30):
        optimizer.zero_grad()
        loss = model(torch.randn(4, 8)).square().mean()
        with Launches() as before:
            guard.before_backward(loss)
        loss.backward()
        gradients = [parameter.grad.clone() for parameter in model.parameters()]
        with Launches() as guarded:
            guard.step()
        optimizer.step()
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        parameter.grad = gradient
    with Launches() as torchs_own:
        nn.utils.clip_grad_norm_(model.parameters(), 0.1, foreach=True)
    assert len(before.names + guarded.names) <= len(torchs_own.names) + 4, (before.names, guarded.names, torchs_own.names)


def test_stop_that_a_save_was_first_to_learn_of_keeps_the_next_step_from_being_applied(monkeypatch):
    """As without the save: the device has skipped the bad step, and the host asks the next one to be skipped, too."""
    monkeypatch.setattr(choice, "DEFERRING_DEVICES", {"cpu"})
    ends = []
    for saves in (False, True):
        torch.manual_seed(0)
        model = nn.Linear(8, 1)
        guard = Guard(model.named_parameters(), AdamW(model.parameters(), lr=1e-2, fused=True), nonfinite="stop")
        for step in range(8):
            loss = model(torch.full((4, 8), math.nan if step == 5 else 1.0)).square().mean()
            guard.before_backward(loss)
            loss.backward()
            guard.step()
            guard._parameters.optimizer.step()
            guard._parameters.optimizer.zero_grad()
            if saves:
                guard.state_dict()
            if step == 6:
                ends.append(model.weight.detach().clone())
    assert torch.equal(*ends)
