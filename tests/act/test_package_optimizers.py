"""Optimizers from packages: one step is one step, and a skip leaves all as it was."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from builders import mlp

from lightning_gradguard import Guard

others = pytest.importorskip("pytorch_optimizer")
schedulefree = pytest.importorskip("schedulefree")

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning_gradguard.GradientWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:pytorch_optimizer"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

OPTIMIZERS = {
    "AdaFactor": others.AdaFactor,
    "Adan": lambda p: others.Adan(p, lr=0.01),
    "Lion": lambda p: others.Lion(p, lr=0.01),
    "Prodigy": others.Prodigy,
    "Ranger21": lambda p: others.Ranger21(p, num_iterations=100, lr=0.01),
    "SAM": lambda p: others.SAM(p, torch.optim.SGD, lr=0.05, momentum=0.9),
    "ScheduleFree": lambda p: schedulefree.AdamWScheduleFree(p, lr=0.01),
    "SOAP": lambda p: others.SOAP(p, lr=0.01),
    "StableAdamW": lambda p: others.StableAdamW(p, lr=0.01),
    "Tiger": lambda p: others.Tiger(p, lr=0.01),
}


class Run:
    """A training of four steps, with a guard or without; a step of it may be bad."""

    def __init__(self, make, *, is_guarded=True, bad=None):
        torch.manual_seed(0)
        self.model = mlp(3, 4, 1)
        self.optimizer = make(list(self.model.parameters()))
        if hasattr(self.optimizer, "train"):
            self.optimizer.train()
        self.guard = Guard(self.model.named_parameters(), self.optimizer) if is_guarded else None
        self.bad = bad

    def step(self, number, *, in_closure):
        """One step, its gradients made inside of the optimizer's step or before it."""

        def closure():
            self.optimizer.zero_grad()
            batch = torch.randn(8, 3, generator=torch.Generator().manual_seed(number))
            loss = self.model(batch).square().mean()
            (loss * (math.nan if number == self.bad else 1.0)).backward()
            if self.guard is not None:
                self.guard.step()
            return loss

        if in_closure:
            self.optimizer.step(closure)
        else:
            closure()
            self.optimizer.step()

    def everything(self):
        """Weights, state and settings, copied."""
        groups = [{key: value for key, value in group.items() if key != "params"} for group in self.optimizer.param_groups]
        return copy.deepcopy([[p.detach() for p in self.model.parameters()], [*self.optimizer.state.values()], groups])


def same(a, b):
    """Whether two nested structures are equal to the bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def cases():
    """Each with a closure, and those that can without."""
    return [(name, True) for name in OPTIMIZERS] + [(name, False) for name in OPTIMIZERS if name != "SAM"]


@pytest.mark.parametrize(("name", "in_closure"), cases())
def test_healthy_training_is_as_without_a_guard(name, in_closure):
    """To the bit, and each step counts once."""
    guarded, plain = Run(OPTIMIZERS[name]), Run(OPTIMIZERS[name], is_guarded=False)
    for number in range(4):
        guarded.step(number, in_closure=in_closure)
        plain.step(number, in_closure=in_closure)
    assert all(map(torch.equal, guarded.model.parameters(), plain.model.parameters()))
    assert guarded.guard.num_steps == 4


@pytest.mark.parametrize("bad", [0, 2])
@pytest.mark.parametrize(("name", "in_closure"), cases())
def test_skipped_step_leaves_weights_state_and_settings_as_they_were(name, in_closure, bad):
    """The very first step too; training goes on afterwards."""
    run = Run(OPTIMIZERS[name], bad=bad)
    for number in range(bad):
        run.step(number, in_closure=in_closure)
    before = run.everything()
    run.step(bad, in_closure=in_closure)
    assert same(run.everything(), before)
    assert (run.guard.num_steps, run.guard.totals.num_skipped) == (bad + 1, 1)
    run.step(bad + 1, in_closure=in_closure)
    assert not same(run.everything(), before)
