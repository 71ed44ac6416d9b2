"""What a replay measures by depth: factors of the chain rule, units, recurrences, growth of weights."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_gradguard.forensics.flow.factors import table_of
from lightning_gradguard.forensics.flow.flow import FlowMeter
from lightning_gradguard.forensics.flow.recurrence import recurrences
from lightning_gradguard.forensics.flow.weight_growth import INTERVAL, WeightWatch


def measured(network, x):
    """The flow of one step."""
    meter = FlowMeter(network, len(x))
    with meter.watch():
        network(x).square().mean().backward()
    return meter.flow


def test_factors_are_those_of_autograd():
    """Against gradients at each place, taken from torch itself."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(6, 8), nn.Sigmoid(), nn.Linear(8, 5), nn.ReLU(inplace=True), nn.Linear(5, 1))
    x = torch.randn(16, 6)
    flow = measured(network, x)
    values, y = [], x
    for layer in network:
        y = F.relu(y) if isinstance(layer, nn.ReLU) else layer(y)
        values.append(y)
    norms = [float(grad.norm()) for grad in torch.autograd.grad(y.square().mean(), values)]
    assert [layer.grad_norm for layer in flow.layers] == pytest.approx(norms, rel=1e-5)
    expected = [norms[index - 1] / norms[index] for index in range(1, 5)]
    assert [layer.factor for layer in flow.layers[1:]] == pytest.approx(expected, rel=1e-5)
    assert math.prod(expected) == pytest.approx(norms[0] / norms[-1], rel=1e-5)


def test_meter_leaves_nothing_on_the_module():
    """Neither hooks nor gradients that differ from those without it."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    x = torch.randn(8, 4)
    network(x).square().mean().backward()
    plain = [parameter.grad.clone() for parameter in network.parameters()]
    network.zero_grad()
    measured(network, x)
    assert all(torch.equal(parameter.grad, grad) for parameter, grad in zip(network.parameters(), plain, strict=True))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())


def test_functions_count_as_layers():
    """An activation without a module of its own is found, under the caller's path."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x):
            return torch.sigmoid(self.inner(x))

    flow = measured(nn.Sequential(Block(), Block()), torch.randn(4, 4))
    assert [(layer.module, layer.op) for layer in flow.layers] == [
        ("0.inner", "linear"), ("0", "sigmoid"), ("1.inner", "linear"), ("1", "sigmoid"),
    ]  # fmt: skip


def test_detached_layer_has_no_gradient():
    """None where none arrived, which is not zero."""
    lower, upper = nn.Linear(4, 4), nn.Linear(4, 1)
    network = nn.ModuleList([lower, upper])
    meter = FlowMeter(network)
    with meter.watch():
        upper(lower(torch.randn(4, 4)).detach()).sum().backward()
    assert [layer.grad_norm is None for layer in meter.flow.layers] == [True, False]


def test_part_of_a_row_is_its_part_of_the_gradient():
    """What each sample adds to the weights' gradient: exact for a single layer with a bias."""
    torch.manual_seed(0)
    network = nn.Linear(3, 1)
    x = torch.randn(5, 3)
    flow = measured(network, x)
    (layer,) = flow.layers
    for row in range(5):
        network.zero_grad()
        (network(x[row : row + 1]).square().sum() / 5).backward()
        error = float(network.bias.grad.abs())
        assert layer.rows[row] == pytest.approx(error * math.hypot(1.0, float(x[row].norm())), rel=1e-4)


@pytest.mark.parametrize(("gain", "low", "high"), [(0.5, 0.3, 0.5), (1.2, 1.1, 1.2)])
@pytest.mark.parametrize("batch_first", [True, False])
def test_recurrence_factor_of_an_identity_is_its_gain(gain, low, high, batch_first):
    """A ReLU net whose state stays positive multiplies by exactly its weight at each step back in time."""
    rnn = nn.RNN(1, 4, nonlinearity="relu", batch_first=batch_first)
    nn.init.constant_(rnn.weight_ih_l0, 0.1)
    rnn.weight_hh_l0.data = gain * torch.eye(4)
    x = torch.rand(3, 20, 1) if batch_first else torch.rand(20, 3, 1)
    meter = FlowMeter(rnn)
    with meter.watch():
        states = rnn(x)[0]
        (states[:, -1] if batch_first else states[-1]).sum().backward()
    (found,) = recurrences(meter.flow)
    assert found.num_steps == 20
    assert found.factor == pytest.approx(gain, rel=1e-4)


def test_recurrence_in_a_loop_is_one_weight_used_again():
    """A cell that Python calls step by step."""
    cell = nn.Linear(4, 4, bias=False)
    cell.weight.data = 0.5 * torch.eye(4)
    meter = FlowMeter(cell)
    with meter.watch():
        state = torch.rand(3, 4, requires_grad=True)
        for _ in range(12):
            state = cell(state)
        state.sum().backward()
    (found,) = recurrences(meter.flow)
    assert (found.num_steps, round(found.factor, 4)) == (12, 0.5)


@pytest.mark.parametrize("make", [nn.LSTM, nn.GRU])
def test_recurrent_layers_of_all_kinds_are_measured(make):
    """Also a packed sequence, which has no steps to tell apart."""
    rnn = make(3, 4)
    x = torch.randn(7, 2, 3)
    meter = FlowMeter(rnn)
    with meter.watch():
        rnn(x)[0].sum().backward()
        rnn(nn.utils.rnn.pack_padded_sequence(x, [7, 7]))[0].data.sum().backward()
    assert [len(layer.times) for layer in meter.flow.layers] == [7, 0]


def test_table_of_a_deep_network_shows_its_ends():
    """Twelve layers at each end, and how many are left out."""
    network = nn.Sequential(*[nn.Linear(2, 2) for _ in range(40)])
    lines = table_of(measured(network, torch.randn(2, 2)))
    assert len(lines) == 2 + 12 + 1 + 12
    assert "(16 more)" in lines[14]


@pytest.mark.parametrize("make", [
    lambda parameters: torch.optim.SGD(parameters, 0.1),
    lambda parameters: torch.optim.SGD(parameters, 0.1, momentum=0.9),
    lambda parameters: torch.optim.Adam(parameters, 0.01),
])  # fmt: skip
def test_update_is_that_which_the_optimizer_made(make):
    """Against the difference of the weights."""
    torch.manual_seed(0)
    layer = nn.Linear(4, 3)
    optimizer = make(layer.parameters())
    watch = WeightWatch(layer.named_parameters())
    for _ in range(3):
        optimizer.zero_grad()
        layer(torch.randn(8, 4)).square().mean().backward()
        before = layer.weight.detach().clone()
        norms = {name: float(parameter.grad.norm()) for name, parameter in layer.named_parameters()}
        optimizer.step()
        watch.note()
    growth = next(growth for growth in watch.weight_growths(optimizer, norms) if growth.name == "weight")
    assert growth.update == pytest.approx(float((layer.weight - before).detach().norm()), rel=1e-3)
    assert growth.rate == pytest.approx(growth.update / float(layer.weight.detach().norm()), rel=1e-3)


def test_jump_is_what_updates_do_not_explain():
    """A weight that somebody multiplies, against one that only the optimizer moves."""
    layer = nn.Linear(4, 4)
    optimizer = torch.optim.SGD(layer.parameters(), 1e-3)
    watch = WeightWatch(layer.named_parameters())
    for _ in range(INTERVAL + 2):
        watch.note()
    layer.weight.data *= 10.0
    weight, bias = watch.weight_growths(optimizer, {})
    assert weight.jump == pytest.approx(10.0)
    assert bias.jump == pytest.approx(1.0)
    assert weight.num_steps == INTERVAL + 2
