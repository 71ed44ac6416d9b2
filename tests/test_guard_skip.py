"""A skipped step leaves everything as it was, whatever the optimizer and its implementation."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from builders import mlp
from torch import nn
from torch.optim import SGD, Adagrad, Adam, AdamW, NAdam, RMSprop

from lightning_gradguard import GradientWarning, Guard

KINDS = {
    "sgd": (SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}),
    "adam": (Adam, {"lr": 0.1, "weight_decay": 0.1, "amsgrad": True}),
    "adamw": (AdamW, {"lr": 0.1, "weight_decay": 0.1}),
    "rmsprop": (RMSprop, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}),
    "adagrad": (Adagrad, {"lr": 0.1, "weight_decay": 0.1}),
    "nadam": (NAdam, {"lr": 0.1, "weight_decay": 0.1}),
}
FUSED = ("sgd", "adam", "adamw", "adagrad")
VARIANTS = [(kind, {"foreach": foreach}) for kind in KINDS for foreach in (False, True)]
VARIANTS += [(kind, {"fused": True}) for kind in FUSED]
every_optimizer = pytest.mark.parametrize(
    ("kind", "variant"), VARIANTS, ids=[f"{kind}-{'-'.join(f'{k}={v}' for k, v in how.items())}" for kind, how in VARIANTS]
)


class Training:
    """A guarded training of a small network."""

    def __init__(self, kind, variant, **settings):
        torch.manual_seed(0)
        self.model = mlp(3, 8, 2)
        cls, options = KINDS[kind]
        self.optimizer = cls(self.model.parameters(), **options, **variant)
        self.guard = Guard(self.model.named_parameters(), self.optimizer, **settings)

    def step(self, seed, factor=1.0):
        """One step on the batch of this seed, its loss multiplied by a factor."""
        batch = torch.randn(4, 3, generator=torch.Generator().manual_seed(seed))
        self.optimizer.zero_grad()
        (factor * self.model(batch).square().mean()).backward()
        record = self.guard.step()
        self.optimizer.step()
        return record

    def state(self):
        """Weights, optimizer state and step counters, each with its path."""
        return {**flatten(self.model.state_dict()), **flatten(self.optimizer.state_dict())}


def flatten(tree, path=()):
    """The leaves of nested dictionaries and lists; tensors copied."""
    if isinstance(tree, (dict, list, tuple)):
        items = tree.items() if isinstance(tree, dict) else enumerate(tree)
        return {key: leaf for name, child in items for key, leaf in flatten(child, (*path, name)).items()}
    return {path: tree.clone() if isinstance(tree, torch.Tensor) else tree}


def assert_same(before, after):
    """To the last bit, with nothing added or missing."""
    assert before.keys() == after.keys()
    for key, value in before.items():
        same = torch.equal(value, after[key]) if isinstance(value, torch.Tensor) else value == after[key]
        assert same, key


@every_optimizer
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_skip_after_healthy_steps_leaves_every_bit(kind, variant, bad):
    """Weights, momentum, step counters; weight decay is not applied either."""
    training = Training(kind, variant)
    for seed in range(3):
        training.step(seed)
    before = training.state()
    with pytest.warns(GradientWarning, match="The step is skipped"):
        record = training.step(3, factor=bad)
    assert record.decision.skip
    assert_same(before, training.state())


@every_optimizer
def test_skip_on_the_first_step_leaves_no_state(kind, variant):
    """An optimizer that has not stepped yet has nothing but its settings."""
    training = Training(kind, variant)
    before = training.state()
    with pytest.warns(GradientWarning, match="step 0"):
        training.step(0, factor=math.nan)
    assert_same(before, training.state())


@every_optimizer
def test_skip_in_between_trains_on_as_if_the_batch_had_not_been(kind, variant):
    """The run with a bad batch ends bit-identically to the one without it."""
    disturbed, untouched = Training(kind, variant), Training(kind, variant)
    for seed in range(6):
        if seed == 3:
            with pytest.warns(GradientWarning, match="step 3"):
                disturbed.step(99, factor=math.nan)
        disturbed.step(seed)
        untouched.step(seed)
    assert_same(untouched.state(), disturbed.state())


def test_skip_of_warn_is_no_skip():
    """Only the actions from "skip" on keep the step out: a control for the tests above."""
    training = Training("sgd", {"foreach": False}, nonfinite="warn")
    with pytest.warns(GradientWarning, match="The step is applied"):
        record = training.step(0, factor=math.nan)
    assert not record.decision.skip
    assert training.model[0].weight.isnan().any()


def test_skip_of_one_optimizer_leaves_the_other_alone():
    """The guard takes only its own parameters' gradients away."""
    model = mlp(3, 4, 2)
    first, second = SGD(model[0].parameters(), lr=0.1), SGD(model[2].parameters(), lr=0.1)
    guard = Guard(model.named_parameters(), first)
    model(torch.ones(2, 3)).sum().backward()
    model[0].weight.grad[0, 0] = math.nan
    with pytest.warns(GradientWarning, match=r"`0\.weight`"):
        guard.step()
    assert model[0].weight.grad is None
    assert model[2].weight.grad is not None
    assert second.param_groups[0]["lr"] == 0.1


def test_skip_after_a_nan_batch_repairs_batchnorm():
    """Running mean and variance would stay NaN for good; the guard's own evaluation is as before."""
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    optimizer = SGD(model.parameters(), lr=0.1)
    guard = Guard(model.named_parameters(), optimizer, named_buffers=model.named_buffers())

    def step(batch):
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        record = guard.step()
        optimizer.step()
        return record

    for _ in range(3):
        step(torch.randn(8, 3))
    before = copy.deepcopy(model).eval()
    with pytest.warns(GradientWarning, match="NaN"):
        assert step(torch.full((8, 3), math.nan)).decision.skip
    assert torch.equal(model[1].running_mean, before[1].running_mean)
    assert torch.equal(model[1].running_var, before[1].running_var)
    inputs = torch.randn(5, 3)
    assert torch.equal(copy.deepcopy(model).eval()(inputs), before(inputs))
    assert not step(torch.randn(8, 3)).decision.skip
