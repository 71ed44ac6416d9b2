"""Which parameters are watched, by name."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from builders import mlp
from torch import nn

from lightning_gradguard import Guard
from lightning_gradguard.measure.name_filter import NameFilter


def trained(model, guard, optimizer, *, damage=None):
    """One step; `damage` is the name of a parameter and what its first gradient element becomes."""
    optimizer.zero_grad()
    loss = model(torch.ones(4, 3)).square().sum()
    guard.before_backward(loss)
    loss.backward()
    if damage is not None:
        dict(model.named_parameters())[damage[0]].grad.view(-1)[0] = damage[1]
    record = guard.step()
    optimizer.step()
    return record


def made(optimizer_of=torch.optim.SGD, **settings):
    """A model of two layers, its optimizer and its guard."""
    torch.manual_seed(0)
    model = mlp(3, 4, 2)
    fused = {"fused": True} if settings.pop("fused", False) else {}
    optimizer = optimizer_of(model.parameters(), lr=0.1, **fused)
    return model, optimizer, Guard(model.named_parameters(), optimizer=optimizer, **settings)


def test_filter_included_parameters_alone_are_measured():
    """By pattern, in model order; exclusion wins."""
    model, optimizer, guard = made(include=["0.*", "2.bias"], exclude=["0.bias"])
    measurement = trained(model, guard, optimizer).measurement
    assert measurement.names == ("0.weight", "2.bias")
    assert measurement.global_norm == pytest.approx(math.hypot(*measurement.by_name.values()))


@pytest.mark.parametrize("fused", [False, True])
def test_filter_clipping_equals_clip_grad_norm_over_the_included(fused):
    """Excluded gradients stay as they are, also where a fused kernel could scale them all."""
    model, optimizer, guard = made(include=["2.*"], clip=0.1, fused=fused)
    twin = copy.deepcopy(model)
    twin(torch.ones(4, 3)).square().sum().backward()
    torch.nn.utils.clip_grad_norm_(twin[2].parameters(), 0.1)
    record = trained(model, guard, optimizer)
    assert record.clip_coef < 1.0
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("fused", [False, True])
def test_filter_damage_in_an_excluded_parameter_skips_the_step_for_all(value, fused):
    """It is named, and no weight moves; the next step is in order."""
    model, optimizer, guard = made(exclude=["0.*"], fused=fused)
    before = copy.deepcopy(model.state_dict())
    with pytest.warns(UserWarning, match=r"the gradient of `0\.weight`"):
        record = trained(model, guard, optimizer, damage=("0.weight", value))
    assert record.decision.skip
    assert [report.name for report in record.measurement.nonfinite] == ["0.weight"]
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not trained(model, guard, optimizer).decision.skip


def test_filter_damage_in_both_names_both():
    """The included first."""
    model, optimizer, guard = made(exclude=["0.*"])
    optimizer.zero_grad()
    model(torch.full((4, 3), math.nan)).sum().backward()
    with pytest.warns(UserWarning, match=r"the gradient of `2\.weight`"):
        record = guard.step()
    assert {report.name for report in record.measurement.nonfinite} == {"0.weight", "0.bias", "2.weight"}


def test_filter_norm_too_large_for_float32_is_no_damage():
    """Finite gradients, whose squares overflow: in the excluded ones nothing is said, in the included it is an explosion."""
    model, optimizer, guard = made(exclude=["0.*"])
    assert not guard.alerts
    assert trained(model, guard, optimizer, damage=("0.weight", 1e30)).measurement.is_finite
    model, optimizer, guard = made(exclude=["0.*"])
    with pytest.warns(UserWarning, match="Explosion"):
        record = trained(model, guard, optimizer, damage=("2.weight", 1e30))
    assert record.measurement.overflowed
    assert record.measurement.is_finite


def test_filter_micro_batch_that_damaged_an_excluded_parameter_is_named():
    """The first of two."""
    model, optimizer, guard = made(exclude=["0.*"])
    optimizer.zero_grad()
    for number in range(2):
        loss = model(torch.ones(4, 3)).square().sum()
        guard.before_backward(loss)
        loss.backward()
        if number == 0:
            model[0].weight.grad[0, 0] = math.nan
    with pytest.warns(UserWarning, match="Nonfinite"):
        record = guard.step()
    assert record.alerts[0].micro_batch == 0


def test_filter_excluded_parameter_without_a_gradient_is_in_order():
    """As a frozen one."""
    model = mlp(3, 4, 2)
    model[0].requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    guard = Guard(model.named_parameters(), optimizer=optimizer, exclude=["0.*"])
    assert trained(model, guard, optimizer).measurement.is_finite


def test_filter_optimizer_without_an_included_parameter_is_watched_for_damage_only():
    """One of two optimizers, where the patterns name the other's parameters."""
    model = nn.ModuleDict({"left": nn.Linear(3, 2), "right": nn.Linear(3, 2)})
    optimizer = torch.optim.SGD(model["left"].parameters(), lr=0.1)
    guard = Guard(model.named_parameters(), optimizer=optimizer, include=["right.*"], clip=1.0)
    for _ in range(40):
        model["left"](torch.ones(4, 3)).square().sum().backward()
        record = guard.step()
    assert (record.measurement.names, record.measurement.global_norm, guard.alerts) == ((), 0.0, [])
    model["left"].weight.grad[0, 0] = math.nan
    with pytest.warns(UserWarning, match=r"left\.weight"):
        assert guard.step().decision.skip


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"include": ["encoder.*"]}, r"`include` must hold patterns that match.*got 'encoder\.\*'.*`0\.weight`, `0\.bias`"),
        ({"exclude": ["0.*", "nothing"]}, "`exclude` must hold patterns that match.*'nothing'"),
        ({"exclude": ["*"]}, "must leave a parameter to watch"),
        ({"include": "0.*"}, r"`include` must be a list of patterns.*Put it in brackets"),
        ({"include": []}, "`include` must be a list of patterns.*leave it out"),
        ({"exclude": [3]}, "`exclude` must be a list of patterns"),
    ],
)
def test_filter_that_makes_no_sense_is_refused(settings, match):
    """With the pattern, and names that there are."""
    with pytest.raises(ValueError, match=match):
        made(**settings)


def test_filter_of_many_names_names_five():
    """An error is read by people."""
    with pytest.raises(ValueError, match=r"`layer\.4`, \.\.\."):
        NameFilter.of(["x"], ()).check(f"layer.{index}" for index in range(100))


def test_filter_lbfgs_step_is_undone_for_excluded_parameters_too():
    """It has moved them by the time the damage shows."""
    model = mlp(3, 4, 2)
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1)
    guard = Guard(model.named_parameters(), optimizer=optimizer, exclude=["0.*"])
    before = copy.deepcopy(model.state_dict())
    calls = []

    def closure():
        optimizer.zero_grad()
        loss = model(torch.ones(4, 3)).square().sum()
        loss.backward()
        calls.append(loss)
        if len(calls) == 3:
            model[0].weight.grad[0, 0] = math.nan
        guard.step()
        return loss

    with pytest.warns(UserWarning, match=r"0\.weight"):
        optimizer.step(closure)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
