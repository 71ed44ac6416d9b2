"""Optimizers that evaluate their closure by themselves: one step is one step, and a bad one leaves no trace."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from builders import mlp
from torch.optim import SGD

from lightning_gradguard import AutoClip, GradientError, Guard
from lightning_gradguard.act import choice

pytestmark = pytest.mark.filterwarnings("ignore::lightning_gradguard.GradientWarning")


class SAM(torch.optim.Optimizer):
    """Two evaluations a step, weights moved in between; it can't do without gradients.

    References:
        P. Foret et al., "Sharpness-aware minimization for efficiently improving generalization", arXiv:2010.01412, 2021.
    """

    def __init__(self, params, rho=0.05, lr=0.1):
        super().__init__(params, {"rho": rho, "calls": 0})
        self.base = SGD(self.param_groups, lr=lr, momentum=0.9)

    @torch.no_grad()
    def step(self, closure):
        closure = torch.enable_grad()(closure)
        self.param_groups[0]["calls"] += 1
        loss = closure()
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.norm(torch.stack([p.grad.norm() for p in params]))
        for p in params:
            self.state[p]["e"] = 0.05 * p.grad / (norm + 1e-12)
            p.add_(self.state[p]["e"])
        closure()
        for p in params:
            p.sub_(self.state[p].pop("e"))
        self.base.step()
        return loss


class Often(SAM):
    """The same, with a number of evaluations that changes from step to step."""

    @torch.no_grad()
    def step(self, closure):
        self.num_steps = getattr(self, "num_steps", 0) + 1
        return super().step(closure) if self.num_steps % 2 else self.base.step(torch.enable_grad()(closure))


class Run:
    """A guarded training whose `n`-th evaluation is bad."""

    def __init__(self, kind, bad=None, **settings):
        torch.manual_seed(0)
        self.model = mlp(3, 4, 1)
        self.optimizer = kind(self.model.parameters())
        self.guard = Guard(self.model.named_parameters(), self.optimizer, **settings)
        self.bad, self.num_evaluations = bad, 0
        self.norms = []

    def step(self):
        """One step; what it returns."""

        def closure():
            self.optimizer.zero_grad()
            loss = self.model(torch.ones(2, 3)).square().sum()
            (loss * (math.nan if self.num_evaluations == self.bad else 1.0)).backward()
            self.num_evaluations += 1
            self.guard.step()
            self.norms.append(math.hypot(*(float(p.grad.norm()) for p in self.model.parameters() if p.grad is not None)))
            return loss

        return self.optimizer.step(closure)

    def everything(self):
        """Weights, state and settings."""
        state = self.optimizer.state_dict()
        return copy.deepcopy([list(self.model.parameters()), state, self.optimizer.base.state_dict()])


def same(a, b):
    """Whether two nested structures are equal to the bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.mark.smoke
@pytest.mark.parametrize("bad", [4, 5, 0, 1])
def test_sam_bad_evaluation_leaves_weights_state_and_settings_as_they_were(bad):
    """The first of a step or the second, also in the very first step."""
    run = Run(SAM, bad)
    for _ in range(bad // 2):
        run.step()
    before = run.everything()
    assert run.step() is None
    assert same(run.everything(), before)
    assert (run.guard.totals.num_steps, run.guard.totals.num_skipped) == (bad // 2 + 1, 1)
    run.step()
    assert not same(run.everything(), before)


def test_sam_step_counts_once_and_trains_as_without_a_guard():
    """Two evaluations are one step."""
    run, plain = Run(SAM), Run(SAM)
    for _ in range(4):
        run.step()
    plain.guard.detach()
    for _ in range(4):
        plain.optimizer.step(lambda: _loss(plain))
    assert run.guard.num_steps == 4
    assert all(map(torch.equal, run.model.parameters(), plain.model.parameters()))


def _loss(run):
    run.optimizer.zero_grad()
    loss = run.model(torch.ones(2, 3)).square().sum()
    loss.backward()
    return loss


@pytest.mark.parametrize("devices", [set(), {"cpu"}], ids=["at once", "queued"])
def test_sam_each_evaluation_is_clipped(devices, monkeypatch):
    """Where torch's own clipping inside of the closure would clip."""
    monkeypatch.setattr(choice, "DEFERRING_DEVICES", devices)
    run = Run(SAM, clip=0.01)
    run.step()
    assert run.norms == pytest.approx([0.01, 0.01], rel=1e-4)
    assert run.guard.totals.num_clipped == 1


def test_sam_clipper_learns_once_a_step_and_not_from_a_bad_one():
    """One step is one entry of its history."""
    run, good = Run(SAM, bad=5, clip=AutoClip()), Run(SAM, clip=AutoClip())
    for _ in range(3):
        run.step()
    for _ in range(2):
        good.step()
    assert run.guard._pipeline._gate.clipper.state_dict() == good.guard._pipeline._gate.clipper.state_dict()


def test_optimizer_with_a_changing_number_of_evaluations_is_undone(recwarn):
    """Once it was seen to take more than one."""
    run = Run(Often, bad=3)
    run.step()
    run.step()
    before = run.everything()
    run.step()
    assert same(run.everything(), before)


def test_raise_from_inside_of_a_step_leaves_it_undone():
    """The error is the user's to see; the weights are as before."""
    run = Run(SAM, bad=3, nonfinite="raise")
    run.step()
    before = run.everything()
    with pytest.raises(GradientError):
        run.step()
    assert same(run.everything(), before)


def test_error_of_the_closures_own_passes_through():
    """Nothing of it is ours."""
    run = Run(SAM)

    def closure():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run.optimizer.step(closure)
    run.step()


class Unforgiving(SGD):
    """An optimizer of a user's that fails without gradients, called as usual, without a closure."""

    def step(self, closure=None):
        assert all(p.grad is not None for group in self.param_groups for p in group["params"])
        return super().step(closure)


def test_foreign_optimizer_without_a_closure_is_passed_over():
    """Its `step` is not called at all on a bad step, and its own again after `detach`."""
    model = mlp(3, 1)
    optimizer = Unforgiving(model.parameters(), lr=0.1)
    guard = Guard(model.named_parameters(), optimizer)
    for factor in (1.0, math.nan, 1.0):
        optimizer.zero_grad()
        (factor * model(torch.ones(1, 3)).sum()).backward()
        guard.step()
        optimizer.step()
    assert guard.totals.num_skipped == 1
    assert "step" in vars(optimizer)
    guard.detach()
    assert "step" not in vars(optimizer)


def test_foreign_optimizer_whose_step_was_not_called_steps_the_next_time():
    """A loop may leave out `optimizer.step()` for a bad step by itself."""
    model = mlp(3, 1)
    optimizer = Unforgiving(model.parameters(), lr=0.1)
    guard = Guard(model.named_parameters(), optimizer)
    before = [p.clone() for p in model.parameters()]
    for factor in (math.nan, 1.0):
        optimizer.zero_grad()
        (factor * model(torch.ones(1, 3)).sum()).backward()
        if not guard.step().decision.skip:
            optimizer.step()
    assert not torch.equal(before[0], next(model.parameters()))


def test_foreign_optimizer_whose_first_step_is_skipped_gives_no_warning_of_its_scheduler():
    """Torch's schedulers look whether the optimizer has stepped before them."""
    model = mlp(3, 1)
    optimizer = Unforgiving(model.parameters(), lr=0.1)
    guard = Guard(model.named_parameters(), optimizer)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    (math.nan * model(torch.ones(1, 3)).sum()).backward()
    guard.step()
    optimizer.step()
    scheduler.step()
