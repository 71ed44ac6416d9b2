"""Histograms after clipping are of what the optimizer gets, whichever way that is clipped."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import LBFGS, SGD, AdamW

from lightning_gradguard import AGC, ClipParameterNorm, ClipValue, Guard, ZClip
from lightning_gradguard.act import choice
from lightning_gradguard.clippers import Clipper

pytestmark = pytest.mark.filterwarnings("ignore::lightning_gradguard.GradientWarning")


class Halve(Clipper):
    """A clipper of the user's."""

    def clip_(self, gradients, global_norm):
        """Half of everything."""
        return ClipParameterNorm(float(global_norm) / 2).clip_(gradients, global_norm)


CLIPPERS = {
    "none": None,
    "norm": 0.5,
    "value": ClipValue(0.01),
    "agc": AGC(),
    "grouped": {"0.*": 0.1, "2.*": None},
    "zclip": ZClip(warmup_steps=2),
    "user's": Halve(),
}
OPTIMIZERS = {
    "fused": lambda parameters: AdamW(parameters, fused=True),
    "foreach": lambda parameters: SGD(parameters, lr=1e-3, foreach=True),
}
NAN_STEP, LARGE_STEP = 3, 4


def run(clipper, optimizer_of, num_steps=5):
    """Train with a NaN and with a norm that float32 can't hold: the records, and the gradients after each step."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1))
    optimizer = optimizer_of(model.parameters())
    records, got = [], []
    guard = Guard(
        model.named_parameters(),
        optimizer,
        clip=copy.deepcopy(clipper),
        explosion=None,
        histogram_every_n_steps=1,
        histograms_of="clipped",
        sinks=[records.append],
    )
    for step in range(num_steps):
        loss = (model(10.0 * torch.randn(4, 8)) ** 2).mean() * (math.nan if step == NAN_STEP else 1.0)
        guard.before_backward(loss)
        loss.backward()
        if step == LARGE_STEP:
            torch._foreach_mul_([parameter.grad for parameter in model.parameters()], 1e25)
        guard.step()
        optimizer.step()
        # A fused kernel writes back what it has divided.
        got.append([None if it.grad is None else it.grad.clone() for it in model.parameters()])
        optimizer.zero_grad()
    guard.flush()
    return records, got


@pytest.mark.parametrize("devices", [set(), {"cpu"}], ids=["host", "queued"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("clipper", CLIPPERS)
def test_histogram_after_clipping_is_of_what_the_optimizer_got(clipper, optimizer, devices, monkeypatch):
    """Counted by numpy from the gradients that are there after the step; a skipped step has none."""
    monkeypatch.setattr(choice, "DEFERRING_DEVICES", devices)
    records, got = run(CLIPPERS[clipper], OPTIMIZERS[optimizer])
    skipped = {record.position.step for record in records if record.decision.skip}
    assert {NAN_STEP} <= skipped <= {NAN_STEP, LARGE_STEP}  # a device does not apply what it can't take the norm of
    for record, gradients in zip(records, got, strict=True):
        histograms = record.histograms
        if record.decision.skip:
            assert histograms is None
            continue
        assert histograms.clipped
        for counts, gradient in zip(histograms.counts, gradients, strict=True):
            decades = np.log10(gradient[gradient != 0].abs().double().numpy())
            wanted = np.histogram(decades.clip(histograms.edges[0], histograms.edges[-1]), histograms.edges)[0]
            # Of an element on the edge of two bins either may be said.
            assert np.abs(wanted.cumsum() - counts.cumsum()).max() <= 1
            assert counts.sum() == len(decades)


def test_histogram_after_clipping_of_lbfgs_is_of_its_first_evaluation():
    """One step is one histogram, however often the closure is called."""
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    records, seen = [], []
    guard = Guard(
        model.named_parameters(),
        optimizer := LBFGS(model.parameters(), max_iter=3),
        clip=ClipValue(1e-3),
        histogram_every_n_steps=1,
        histograms_of="clipped",
        sinks=[records.append],
    )

    def closure():
        optimizer.zero_grad()
        loss = model(torch.ones(2, 4)).square().mean()
        loss.backward()
        guard.step()
        seen.append(model.weight.grad.clone())
        return loss

    optimizer.step(closure)
    assert len(seen) > 1
    assert len(records) == 1
    (full,) = np.flatnonzero(records[0].histograms.counts[0])
    assert records[0].histograms.edges[full] <= np.log10(float(seen[0].abs().max())) <= records[0].histograms.edges[full + 1]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_histogram_before_clipping_is_the_default(optimizer):
    """Also of a step that is skipped."""
    records = []
    model = nn.Linear(4, 1)
    guard = Guard(
        model.named_parameters(),
        OPTIMIZERS[optimizer](model.parameters()),
        clip=1e-3,
        histogram_every_n_steps=1,
        sinks=[records.append],
    )
    model(torch.ones(2, 4) * math.nan).sum().backward()
    guard.step()
    assert records[0].decision.skip
    assert not records[0].histograms.clipped
    assert records[0].histograms.num_nan.sum() == 4


def test_histograms_of_anything_else_are_refused():
    """With the choice in the message."""
    with pytest.raises(ValueError, match="`histograms_of` must be one of 'raw', 'clipped', got 'both'"):
        Guard(nn.Linear(1, 1).named_parameters(), histograms_of="both")
