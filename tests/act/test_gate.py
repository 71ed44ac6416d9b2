"""Decisions that the device takes by itself, and optimizers that evaluate several times a step."""

from __future__ import annotations

import math

import pytest
import torch
from builders import mlp
from torch.optim import LBFGS, SGD, AdamW

from lightning_gradguard import Guard, Position
from lightning_gradguard.act import choice

pytestmark = pytest.mark.filterwarnings("ignore::lightning_gradguard.GradientWarning")


def train(kind, factors, **settings):
    """Train on batches whose losses are multiplied by these factors; the model, and the guard."""
    torch.manual_seed(0)
    model = mlp(3, 8, 2)
    optimizer = kind(model.parameters())
    guard = Guard(model.named_parameters(), optimizer, **settings)
    for seed, factor in enumerate(factors):
        optimizer.zero_grad()
        batch = torch.randn(4, 3, generator=torch.Generator().manual_seed(seed))
        (factor * model(batch).square().mean()).backward()
        guard.step()
        optimizer.step()
    guard.flush()
    return model, guard


KINDS = {
    "sgd": lambda parameters: SGD(parameters, lr=0.1, momentum=0.9, fused=True),
    "adamw": lambda parameters: AdamW(parameters, lr=0.1, fused=True),
}
FACTORS = [1.0, 2.0, math.nan, 1.0, 1e8, 1.0, math.inf, 3.0]


@pytest.mark.smoke
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("clip", [None, 0.01])
def test_deferred_steps_decide_as_those_decided_at_once(kind, clip, monkeypatch):
    """Same skips, counts and alerts, a step later; the weights agree within the kernel's rounding."""
    at_once, expected = train(kind, FACTORS, clip=clip)
    monkeypatch.setattr(choice, "DEFERRING_DEVICES", {"cuda", "cpu"})
    deferred, told = train(kind, FACTORS, clip=clip)
    assert told.totals == expected.totals
    assert told.totals.num_skipped == 2
    assert [alert.step for alert in told.alerts] == [alert.step for alert in expected.alerts]
    for a, b in zip(deferred.parameters(), at_once.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.smoke
@pytest.mark.parametrize("bad", [0, 1, 3])
def test_lbfgs_bad_evaluation_undoes_the_whole_step(bad):
    """The closure runs several times; one of them turns out NaN, and the weights go back."""
    model = mlp(3, 2)
    optimizer = LBFGS(model.parameters(), lr=0.1, max_iter=5)
    guard = Guard(model.named_parameters(), optimizer)
    calls = []

    def closure(spoiled):
        optimizer.zero_grad()
        loss = model(torch.ones(2, 3)).square().sum()
        (loss * (math.nan if spoiled and len(calls) == bad else 1.0)).backward()
        calls.append(1)
        guard.step()
        return loss

    optimizer.step(lambda: closure(spoiled=False))
    before = [parameter.clone() for parameter in model.parameters()]
    calls.clear()
    optimizer.step(lambda: closure(spoiled=True))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert (guard.totals.num_steps, guard.totals.num_skipped) == (2, 1)
    calls.clear()
    optimizer.step(lambda: closure(spoiled=False))
    assert not torch.equal(before[0], model[0].weight)


def test_lbfgs_bad_gradients_outside_of_a_step_are_taken_away():
    """There is nothing to put back then."""
    model = mlp(3, 2)
    guard = Guard(model.named_parameters(), LBFGS(model.parameters()))
    before = [parameter.clone() for parameter in model.parameters()]
    (model(torch.ones(2, 3)).sum() * math.nan).backward()
    assert guard.step().decision.skip
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_alert_in_a_trainers_loop_says_where():
    """Epoch, batch and optimizer, where they are known."""
    parameter = torch.nn.Parameter(torch.ones(2))
    guard = Guard([("w", parameter)])
    parameter.grad = torch.full((2,), math.nan)
    (alert,) = guard.step(Position(step=7, epoch=1, batch_idx=3, optimizer=1, num_optimizers=2)).alerts
    assert "step 7 (epoch 1, batch 3), optimizer 1" in alert.message
    assert (alert.epoch, alert.batch_idx, alert.optimizer) == (1, 3, 1)
