"""What several test files build: measurements, gradients, small networks."""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Sequence

import numpy as np
import torch
from hypothesis import settings
from torch import Tensor, nn

from lightning_gradguard import Detector, Measurement, Verdict
from lightning_gradguard.alert import ParameterReport
from lightning_gradguard.layout import Layout
from lightning_gradguard.measure.gradients import Gradients
from lightning_gradguard.measure.measurement import measure
from lightning_gradguard.record import Damage

examples = settings(deadline=None, derandomize=True, max_examples=25)
"""For every property test: seeded, and no clock, since several workers share the cores."""


def layers(count: int) -> Layout:
    """A layout of `count` modules with one matrix each."""
    return Layout.of([f"layers.{index}.weight" for index in range(count)], [(8, 8)] * count)


def measurement(
    norms: Sequence[float], *, loss: float | None = None, overflowed: bool = False, loss_scale: float | None = None
) -> Measurement:
    """A measurement of as many modules as there are norms."""
    layout, values = layers(len(norms)), np.array(norms, dtype=np.float64)
    damaged = tuple(
        ParameterReport(name, norm, num_nan=int(math.isnan(norm)), num_inf=int(math.isinf(norm)))
        for name, norm in zip(layout.names, norms, strict=True)
        if not math.isfinite(norm)
    )
    bad_loss = loss is not None and not math.isfinite(loss)
    return Measurement(
        layout,
        values,
        np.ones(len(norms), dtype=np.bool_),
        math.nan if any(math.isnan(norm) for norm in norms) else math.hypot(*norms),
        loss=loss,
        damage=Damage(0, loss=loss) if bad_loss else Damage(0) if damaged else None,
        loss_scale=loss_scale,
        nonfinite=damaged,
        overflowed=overflowed,
    )


def no_gradients() -> Measurement:
    """A step on which no parameter has a gradient."""
    return Measurement(layers(2), np.zeros(2), np.zeros(2, dtype=np.bool_), 0.0)


def judge(detector: Detector, measured: Measurement) -> Verdict | None:
    """One step as a guard that never skips would take it."""
    verdict = detector.observe(measured)
    if verdict is None and measured.is_finite:
        detector.learn(measured)
    return verdict


def with_grads(*grads: Tensor | None, shape: tuple[int, ...] = (2,)) -> list[Tensor]:
    """Parameters that carry these gradients; None: no gradient."""
    parameters = []
    for grad in grads:
        like = torch.zeros(shape) if grad is None else grad
        parameter = nn.Parameter(torch.zeros(like.shape, dtype=like.dtype))
        parameter.grad = grad
        parameters.append(parameter)
    return parameters


def read(parameters: Sequence[Tensor]) -> Measurement:
    """Measure what the parameters carry, the way a guard does."""
    gradients = Gradients(parameters)
    layout = Layout.of([f"p{index}" for index in range(len(parameters))], [tuple(p.shape) for p in parameters])
    return measure(gradients).read(gradients, layout)


def through_checkpoint(state: dict) -> dict:
    """A state as it comes back from a checkpoint."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def mlp(*widths: int) -> nn.Sequential:
    """A small network of linear layers with tanh between."""
    stack = []
    for inputs, outputs in itertools.pairwise(widths):
        stack += [nn.Linear(inputs, outputs), nn.Tanh()]
    return nn.Sequential(*stack[:-1])
