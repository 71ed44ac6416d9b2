"""A guarded loop without a Trainer, and the records that it leaves."""

from __future__ import annotations

import math

import torch
from builders import mlp

from lightning_gradguard import Guard, Record


def records(**settings) -> list[Record]:
    """Five steps of a small network: two healthy, one clipped, one with NaN, one without gradients."""
    model = mlp(3, 4, 2)
    seen: list[Record] = []
    settings = {"nonfinite": "skip", "log_every_n_steps": 1, "histogram_every_n_steps": 2, "clip": 100.0} | settings
    guard = Guard(model.named_parameters(), sinks=[seen.append], **settings)
    guard._pipeline._reporter._sinks = guard._pipeline._reporter._sinks[
        :-1
    ]  # without the console, whose warnings are not the subject
    for factor in (1.0, 1.0, 1e4, math.nan, None):
        model.zero_grad()
        if factor is not None:
            (factor * model(torch.ones(2, 3)).square().sum()).backward()
        guard.step()
    return seen
