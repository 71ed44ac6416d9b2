"""How far weights have moved, against what the optimizer's updates can account for."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_gradguard import Guard
from lightning_gradguard.forensics.flow.updates import AppliedStep, reach
from lightning_gradguard.forensics.flow.weight_history import INTERVAL, WeightHistory
from lightning_gradguard.forensics.flow.weight_samples import WeightSamples

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1),
    "decaying sgd": lambda p: torch.optim.SGD(p, 0.1, weight_decay=0.1),
    "momentum": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.01),
    "nesterov": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, 0.1),
    "adam with L2": lambda p: torch.optim.Adam(p, 0.1, weight_decay=0.1),
    "amsgrad": lambda p: torch.optim.Adam(p, 0.1, amsgrad=True),
    "fast adam": lambda p: torch.optim.Adam(p, 0.1, betas=(0.5, 0.99), eps=1e-16),
    "adamw": lambda p: torch.optim.AdamW(p, 0.1, weight_decay=0.5),
    "adamax": lambda p: torch.optim.Adamax(p, 0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.1),
    "rmsprop with momentum": lambda p: torch.optim.RMSprop(p, 0.1, momentum=0.8),
    "adagrad": lambda p: torch.optim.Adagrad(p, 0.1),
}


class Run:
    """A layer, its optimizer, a guard that measures, and the history."""

    def __init__(self, make=OPTIMIZERS["sgd"]):
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 3)
        self.optimizer = make(self.layer.parameters())
        self.history = WeightHistory(self.layer.named_parameters())
        self.guard = Guard(self.layer.named_parameters(), explosion=None, vanishing=None, nonfinite=None)

    def step(self, scale=1.0, *, is_applied=True):
        """One step with gradients of some size."""
        self.optimizer.zero_grad()
        (scale * self.layer(torch.randn(8, 4)).square().mean()).backward()
        record = self.guard.step()
        self.history.note(self.optimizer, record.measurement, is_applied=is_applied)
        if is_applied:
            self.optimizer.step()

    def growth(self, name="weight"):
        """Of one parameter."""
        return next(growth for growth in self.history.weight_growths(self.optimizer) if growth.name == name)


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_update_is_what_the_last_step_did(make):
    """Against the difference of the weights."""
    run = Run(make)
    for _ in range(3):
        before = run.layer.weight.detach().clone()
        run.step()
    growth = run.growth()
    assert growth.rate == pytest.approx(float((run.layer.weight.detach() - before).norm() / before.norm()), rel=1e-5)
    assert growth.excess == 0.0


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
@given(scales=st.lists(st.sampled_from([1e-12, 1e-3, 1.0, 30.0, 1e4]), min_size=1, max_size=2 * INTERVAL))
@settings(max_examples=8, deadline=None)
def test_no_optimizer_carries_a_weight_beyond_its_reach(make, scales):
    """Whatever the gradients were: a batch a hundred million times as large, or almost none for long."""
    run = Run(make)
    for scale in scales:
        run.step(scale)
    for name in ("weight", "bias"):
        growth = run.growth(name)
        if math.isfinite(growth.norm):
            assert growth.norm <= (growth.before + growth.reach) * 1.0001
            assert growth.excess == 0.0


@pytest.mark.parametrize("make", [
    lambda p: torch.optim.NAdam(p, 0.1),
    torch.optim.Adadelta,
    lambda p: torch.optim.RMSprop(p, 0.1, centered=True),
    lambda p: torch.optim.Adam(p, 0.1, betas=(0.99, 0.9)),
    lambda p: type("Own", (torch.optim.Adam,), {})(p, 0.1),
    lambda p: torch.optim.SGD(p, 0.1, weight_decay=20.0),
    lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, dampening=-0.5),
])  # fmt: skip
def test_reach_of_an_unknown_optimizer_is_not_known(make):
    """No bound is better than a wrong one; then no jump is claimed either."""
    run = Run(make)
    run.step()
    run.layer.weight.data *= 100.0
    assert run.growth().reach is None
    assert run.growth().jump == 1.0


def test_reach_follows_the_rate_that_each_step_had():
    """A schedule has lowered it since."""
    run = Run(lambda p: torch.optim.Adagrad(p, 1.0))
    run.step()
    run.optimizer.param_groups[0]["lr"] = 1e-6
    run.step()
    assert run.growth().reach == pytest.approx((1.0 + 1e-6) * math.sqrt(12))


def test_reach_is_unknown_where_a_gradient_was_not_measured():
    """For SGD the gradient tells the size of an update; for Adam it does not matter."""
    settings_ = {"momentum": 0.0, "weight_decay": 0.0, "dampening": 0.0, "nesterov": False}
    optimizer = torch.optim.SGD([torch.zeros(2, 2)], 0.1)
    steps = [AppliedStep(0.1, 1.0), AppliedStep(0.1, None)]
    assert reach(optimizer, settings_, steps, num_elements=4, norm=1.0, momentum=0.0) is None
    assert reach(optimizer, settings_, steps[:1], num_elements=4, norm=1.0, momentum=0.0) == pytest.approx(0.1)


def test_jump_is_what_updates_do_not_explain():
    """A weight that somebody multiplies, against one that only the optimizer moves."""
    run = Run()
    for _ in range(INTERVAL + 2):
        run.step(1e-6)
    run.layer.weight.data *= 10.0
    assert run.growth().jump == pytest.approx(10.0, rel=1e-3)
    assert run.growth("bias").jump == pytest.approx(1.0, rel=1e-3)
    assert run.growth().num_steps == INTERVAL + 2


@pytest.mark.parametrize("name", ["momentum", "adam", "adamw"])
def test_excess_is_what_the_last_update_does_not_explain(name):
    """Three percent a step by somebody else, which the norms alone would not show."""
    run = Run(OPTIMIZERS[name])
    for _ in range(40):
        run.step(1e-6 if name == "momentum" else 1.0)
        run.optimizer.param_groups[0]["lr"] = 1e-3
    run.step()
    run.layer.weight.data *= 1.03
    growth = run.growth()
    assert 0.01 < growth.excess / growth.norm < 0.031


def test_skipped_step_is_no_update():
    """What the optimizer last did stays the last that was applied."""
    run = Run()
    run.step()
    rate = run.growth().rate
    run.step(scale=1e30, is_applied=False)
    assert run.growth().rate == pytest.approx(rate)
    assert run.growth().reach < 100.0


def test_parameter_of_two_optimizers_has_no_reach():
    """Each of them may have moved it."""
    run = Run()
    run.history.note(torch.optim.SGD(run.layer.parameters(), 0.5))
    run.step()
    assert run.growth().reach is None
    assert run.growth().excess == 0.0


def test_momentum_from_before_the_first_look_is_counted():
    """As after a checkpoint, when the optimizer comes with its state."""
    run = Run(OPTIMIZERS["momentum"])
    for _ in range(3):
        run.step(1e3)
    run.history = WeightHistory(run.layer.named_parameters())
    run.step(0.0)
    growth = run.growth()
    assert growth.before < growth.norm <= growth.before + growth.reach


def test_decay_alone_is_told_from_what_the_loss_does():
    """Decoupled: as the product of the factors; in Adam it can't be told."""
    adamw, adam = Run(OPTIMIZERS["adamw"]), Run(OPTIMIZERS["adam with L2"])
    for run in (adamw, adam):
        for _ in range(4):
            run.step()
    assert adamw.growth().decayed == pytest.approx(0.95**4)
    assert adam.growth().decayed is None
    assert adam.growth().pull > 0.0


def test_weight_in_new_storage_is_not_compared():
    """Somebody has put other data into the parameter; the elements that were kept belong to the old."""
    run = Run()
    run.step()
    run.layer.weight.data = torch.ones(3, 4)
    assert run.growth().update == 0.0


@pytest.mark.parametrize("make", [torch.Tensor.to_sparse, lambda it: it.repeat(1, 2)[:, ::2]])
def test_weight_that_is_sparse_or_has_gaps_is_not_compared(make):
    """Its elements don't lie one behind the other."""
    weight = torch.nn.Parameter(make(torch.ones(3, 4)))
    samples = WeightSamples([("weight", weight)], torch.optim.SGD([weight], 0.1))
    samples.take()
    assert samples.compare(weight) is None


def test_memory_that_is_shared_later_is_not_read_where_it_was():
    """Sending a model to another process moves its weights; where they were, memory is free."""
    run = Run()
    run.step()
    run.layer.share_memory()
    run.step(scale=1e-3)
    assert run.growth().update == pytest.approx(0.1 * float(run.layer.weight.grad.norm()), rel=1e-3)


def test_storage_can_be_resized_as_before():
    """What numpy has seen could not."""
    run = Run()
    run.step()
    run.layer.weight.untyped_storage().resize_(4096)
    run.step()
    assert run.growth().update > 0.0


def test_group_added_later_is_followed_from_then_on():
    """Its decay since the beginning is not known."""
    run = Run()
    run.step()
    extra = nn.Parameter(torch.ones(2, 2))
    run.optimizer.add_param_group({"params": [extra]})
    run.step()
    assert run.growth().decayed == 1.0
    assert {growth.name for growth in run.history.weight_growths(run.optimizer)} == {"weight", "bias"}


def test_rate_that_is_a_tensor_is_kept_as_it_was():
    """Capturable optimizers change it in place."""
    run = Run(lambda p: torch.optim.Adagrad(p, torch.tensor(1.0)))
    run.step()
    run.optimizer.param_groups[0]["lr"].fill_(100.0)
    assert run.growth().reach == pytest.approx(math.sqrt(12))
