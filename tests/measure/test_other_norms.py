"""Norms of type 1 and infinity: those of numpy, at logged steps alone."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from builders import mlp
from torch import nn

from lightning_gradguard import Guard
from lightning_gradguard.layout import Layout
from lightning_gradguard.measure.gradients import Gradients
from lightning_gradguard.measure.measurement import MicroBatch, measure
from lightning_gradguard.sinks.tags import description, scalars

TYPES = (1.0, math.inf)
VALUES = [[3.0, -4.0], [1e-30, 0.0, -2e-30], [math.inf, 1.0], [math.nan, 2.0], [math.nan, math.inf], None]
pytestmark = pytest.mark.filterwarnings("ignore::lightning_gradguard.GradientWarning")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64, torch.bfloat16])
def test_other_norms_are_those_of_numpy(dtype):
    """Tiny ones, NaN, infinity, and a parameter without gradient."""
    parameters = [nn.Parameter(torch.zeros(len(values or [0.0]), dtype=dtype)) for values in VALUES]
    for parameter, values in zip(parameters, VALUES, strict=True):
        parameter.grad = None if values is None else torch.tensor(values, dtype=dtype)
    gradients = Gradients(parameters)
    layout = Layout.of("abcdef", [tuple(it.shape) for it in parameters])
    found = measure(gradients, [MicroBatch(torch.ones(()))], norm_types=TYPES).read(gradients, layout).other_norms
    with np.errstate(invalid="ignore"):
        for norm_type in TYPES:
            wanted = [0.0 if it.grad is None else np.linalg.norm(it.grad.double().numpy(), norm_type) for it in parameters]
            np.testing.assert_allclose(found[norm_type], wanted, rtol=1e-6)


def test_other_norms_are_measured_at_logged_steps_alone():
    """At others no kernel is queued for them."""
    records = []
    model = mlp(3, 4, 1)
    guard = Guard(model.named_parameters(), log_every_n_steps=3, log_norm_types=[math.inf, 2.0, 1.0], sinks=[records.append])
    for _ in range(6):
        model.zero_grad()
        model(torch.ones(2, 3)).sum().backward()
        guard.step()
    assert [list(record.measurement.other_norms) for record in records] == [[], [], [math.inf, 1.0]] * 2


@pytest.mark.parametrize(
    ("norms", "groups"), [("totals", set()), ("groups", {"a", "b"}), ("all", {"a", "b", "a.weight", "a.bias", "b.weight"})]
)
def test_other_norms_are_scalars_beside_the_others(norms, groups):
    """Of the model, its groups and its parameters, as with the 2-norm; each is described."""
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 1, bias=False)})
    records = []
    guard = Guard(model.named_parameters(), log_every_n_steps=1, log_norm_types=[1.0, math.inf], sinks=[records.append])
    model["b"](model["a"](torch.tensor([[1.0, -2.0]]))).sum().backward()
    guard.step()
    values = scalars(records[0], norms)
    elements = torch.cat([it.grad.flatten() for it in model.parameters()]).abs()
    assert values["global_norm_1"] == pytest.approx(float(elements.sum()))
    assert values["global_norm_inf"] == pytest.approx(float(elements.max()))
    assert values.keys() >= {"global_norm", "clipped_norm"}
    for suffix in ("", "_1", "_inf"):
        tags = {tag.partition("/")[2] for tag in values if tag.startswith(f"norm{suffix}/")}
        assert tags == groups
    if groups:
        of_a = torch.cat([it.grad.flatten() for it in model["a"].parameters()]).abs()
        assert values["norm_1/a"] == pytest.approx(float(of_a.sum()))
        assert values["norm_inf/a"] == pytest.approx(float(of_a.max()))
    assert all(description(f"gradguard/0/{tag}") for tag in values)
    assert (
        description("gradguard/norm_inf/a.b")
        == "Largest magnitude (infinity norm) of the gradients of a.b, before clipping."
    )


@pytest.mark.parametrize("wrong", [[3.0], ["inf"], 1.0, [True]])
def test_other_norms_of_a_type_that_is_not_measured_are_refused(wrong):
    """With those that are."""
    with pytest.raises(ValueError, match=r"`log_norm_types` must be a list of 1.0 .* and math.inf"):
        Guard(nn.Linear(1, 1).named_parameters(), log_norm_types=wrong)
