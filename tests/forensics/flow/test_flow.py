"""What a replay measures by depth: factors of the chain rule, units, recurrences, paths."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_gradguard.forensics.flow.flow import FlowMeter
from lightning_gradguard.forensics.flow.path import deepest_path
from lightning_gradguard.forensics.flow.recurrence import recurrences
from lightning_gradguard.forensics.flow.report import table_of


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


def test_recurrence_without_any_gradient_says_nothing():
    """There is nothing that could fade or grow."""
    rnn = nn.RNN(1, 4)
    meter = FlowMeter(rnn)
    with meter.watch():
        (rnn(torch.rand(20, 3, 1))[0].sum() * 0.0).backward()
    assert recurrences(meter.flow) == []


def test_layer_that_several_ways_lead_from_is_found_once():
    """And one whose weight is none of the module's has none."""
    first, second, table = nn.Linear(3, 4), nn.Linear(4, 2), torch.ones(2, 2)

    class Diamond(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = first, second

        def forward(self, x):
            hidden = first(x).tanh()
            return F.linear(second(hidden.sin() + hidden.cos()), table)

    layers = measured(Diamond(), torch.rand(5, 3)).layers
    last = next(layer for layer in layers if layer.weight == "second.weight")
    assert len(last.before) == 1
    assert layers[-1].weight is None


@pytest.mark.parametrize("make", [nn.LSTM, nn.GRU])
def test_recurrent_layers_of_all_kinds_are_measured(make):
    """Also a packed sequence, whose rows of all steps lie one behind the other."""
    rnn = make(3, 4)
    x = torch.randn(7, 2, 3)
    meter = FlowMeter(rnn)
    with meter.watch():
        rnn(x)[0].sum().backward()
        rnn(nn.utils.rnn.pack_padded_sequence(x, [7, 5]))[0].data.sum().backward()
    assert [len(layer.times) for layer in meter.flow.layers] == [7, 7]


def test_table_of_a_deep_network_shows_its_ends():
    """Twelve layers at each end, and how many are left out."""
    network = nn.Sequential(*[nn.Linear(2, 2) for _ in range(40)])
    lines = table_of(measured(network, torch.randn(2, 2)))
    assert len(lines) == 2 + 12 + 1 + 12
    assert "(16 more)" in lines[14]


def test_network_on_several_inputs_is_no_recurrence():
    """One layer is applied eight times, but never to what it has made."""
    layer = nn.Linear(4, 4)
    meter = FlowMeter(layer)
    with meter.watch():
        torch.stack([layer(torch.randn(3, 4)) for _ in range(8)]).sum().backward()
    assert len(meter.flow.layers) == 8
    assert recurrences(meter.flow) == []


def test_recurrence_in_both_directions_fades_towards_the_middle():
    """The gradient of the two last states comes in at both ends."""
    torch.manual_seed(0)
    rnn = nn.RNN(2, 8, bidirectional=True)
    meter = FlowMeter(rnn)
    with meter.watch():
        rnn(torch.randn(60, 3, 2))[1].sum().backward()
    (found,) = recurrences(meter.flow)
    assert 10 < found.early < 50
    assert found.decades < -2


def test_memory_of_a_cell_counts_as_well():
    """What comes back through the memory of an LSTM cell alone is a gradient."""
    cell = nn.LSTMCell(2, 4)
    meter = FlowMeter(cell)
    with meter.watch():
        cell(torch.randn(3, 2))[1].sum().backward()
    assert meter.flow.layers[0].grad_norm == pytest.approx(math.sqrt(12))


def test_factors_multiply_along_one_path():
    """Beside each other lie four branches; the product comes to the fall of the norm, not to its fourth power."""
    torch.manual_seed(0)
    branches = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Sigmoid(), nn.Linear(8, 8)) for _ in range(4))
    network = nn.ModuleList([nn.Linear(4, 8), branches, nn.Linear(8, 1)])
    meter = FlowMeter(network)
    with meter.watch():
        hidden = network[0](torch.randn(16, 4))
        network[2](torch.stack([branch(hidden) for branch in branches]).mean(0)).sum().backward()
    path = deepest_path(meter.flow)
    first, last = path.layers[0], path.layers[-1]
    assert path.decades == pytest.approx(math.log10(first.grad_norm / last.grad_norm))
    assert sum(decades for _, decades in path.factors) == pytest.approx(path.decades)
    assert len(path.of("activation")) == 1


def test_frozen_layer_is_known_as_one():
    """It has a gradient at its output, and none that it trains by."""
    network = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    network[0].requires_grad_(False)
    assert [layer.is_trained for layer in measured(network, torch.randn(3, 2)).layers] == [False, True]
    assert [layer.weight for layer in measured(network, torch.randn(3, 2)).layers] == ["0.weight", "1.weight"]
