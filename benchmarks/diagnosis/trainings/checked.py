"""Further trainings, each with its cause; no rule is tuned on them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.detection.trainings.base import ONSET, Training
from benchmarks.detection.trainings.data import Batch, cancer, diabetes, digits, sampled, scaled, sequences, text
from benchmarks.detection.trainings.networks import (
    Transformer,
    adam,
    conv_net,
    cross_entropy,
    linears,
    mlp,
    residual,
    set_rate,
    sgd,
    squared_error,
)
from benchmarks.diagnosis.trainings.base import CHECKED, on_digits, register

vanishing, exploding = register(CHECKED, "vanishing"), register(CHECKED, "explosion")


class _Functional(nn.Module):
    """Linear layers whose activation is a function in `forward`, with no module of its own."""

    def __init__(self, sizes: list[int], activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(*pair) for pair in itertools.pairwise(sizes))
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = self.activation(layer(x))
        return self.layers[-1](x)


@vanishing("activation")
def functional_sigmoid() -> Training:
    """Eleven sigmoids, none of them a module."""
    network = _Functional([64] + [48] * 11 + [10], torch.sigmoid)
    return on_digits(network, adam(network, 1e-3))


@vanishing("saturation")
def unscaled_inputs_tanh() -> Training:
    """Inputs a thousand times too large, and weights that keep what they make of them."""
    network = mlp([64] + [48] * 5 + [10], nn.Tanh)
    for layer in linears(network):
        nn.init.normal_(layer.weight, std=8.0 / math.sqrt(layer.in_features))
    training = on_digits(network, sgd(network, 1e-4))
    draw = training.batch
    training.batch = lambda step: scaled(draw(step), 1000.0)
    return training


@vanishing("init")
def relu_init_small() -> Training:
    """Twenty ReLU layers with half the weights that they need."""
    network = mlp([64] + [48] * 20 + [10])
    for layer in linears(network):
        nn.init.normal_(layer.weight, std=0.7 / math.sqrt(layer.in_features))
        nn.init.zeros_(layer.bias)
    return on_digits(network, sgd(network, 0.01))


@vanishing("init")
def conv_init_small() -> Training:
    """Eight convolutions with weights of 0.01."""
    layers: list[nn.Module] = [nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 12, 3, padding=1), nn.Tanh()]
    for _ in range(7):
        layers += [nn.Conv2d(12, 12, 3, padding=1), nn.Tanh()]
    network = nn.Sequential(*layers, nn.Flatten(), nn.Linear(12 * 64, 10))
    for module in network:
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, std=0.01)
    return on_digits(network, sgd(network, 0.05))


@vanishing("dead", onset=ONSET)
def dead_conv() -> Training:
    """A convolution whose biases have been pushed far down."""
    network = nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(512, 10),
    )  # fmt: skip
    training = on_digits(network, adam(network, 1e-3))

    def before(step: int) -> None:
        if step == ONSET:
            network[3].bias.data -= 100.0

    training.before = before
    return training


@vanishing("loss")
def tiny_loss() -> Training:
    """A loss in a unit that makes it fifteen decades smaller."""
    network = mlp([10, 48, 48, 1])
    return Training(
        network, adam(network, 1e-3), sampled(diabetes(), 64), lambda batch: 1e-15 * F.mse_loss(network(batch[0]), batch[1])
    )


@vanishing("cut", onset=ONSET)
def zero_gate() -> Training:
    """The learned gate in front of the upper half is set to exactly zero by a schedule, beside a path around it."""
    lower, around, head = mlp([30, 32, 32, 32]), mlp([30, 32]), nn.Linear(32, 2)
    network = nn.ModuleDict({"lower": lower, "around": around, "head": head})
    gate = [1.0]

    def loss(batch: Batch) -> Tensor:
        hidden = around(batch[0]) + gate[0] * lower(batch[0])
        return F.cross_entropy(head(torch.relu(hidden)), batch[1])

    def before(step: int) -> None:
        gate[0] = 1.0 if step < ONSET else 0.0

    return Training(network, adam(network, 1e-3), sampled(cancer(), 32), loss, before=before)


@vanishing("recurrence")
def forgetful_rnn() -> Training:
    """Reads sixty-four pixels, and forgets each within a few steps; the loss looks at the last state only."""
    rnn, head = nn.RNN(1, 32, batch_first=True), nn.Linear(32, 10)
    rnn.weight_hh_l0.data = 0.3 * torch.eye(32)
    network = nn.ModuleDict({"rnn": rnn, "head": head})

    def loss(batch: Batch) -> Tensor:
        return F.cross_entropy(head(rnn(batch[0].unsqueeze(-1))[0][:, -1]), batch[1])

    return Training(network, sgd(network, 0.01), sampled(digits(), 32), loss)


class _Cell(nn.Module):
    """A recurrent cell in a loop of Python."""

    def __init__(self, width: int, gain: float, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.enter, self.again, self.head = nn.Linear(1, width), nn.Linear(width, width, bias=False), nn.Linear(width, 10)
        nn.init.orthogonal_(self.again.weight, gain)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        state = x.new_zeros(len(x), self.again.in_features)
        for pixel in x.unbind(1):
            state = self.activation(self.enter(pixel[:, None]) + self.again(state))
        return self.head(state)


@vanishing("recurrence")
def forgetful_cell() -> Training:
    """The same, written as a loop."""
    network = _Cell(32, 0.4, torch.tanh)
    return on_digits(network, sgd(network, 0.01))


@exploding("recurrence", onset=0)
def unstable_cell() -> Training:
    """Each of sixty-four steps amplifies."""
    network = _Cell(32, 2.2, torch.relu)
    return on_digits(network, sgd(network, 1e-4))


@exploding("sample")
def outlier_input() -> Training:
    """One of 32 rows holds values a thousand times too large, and a wrong label, or there would be no gradient."""
    network = mlp([64, 64, 64, 10])
    training = on_digits(network, adam(network, 1e-3))
    draw = training.batch

    def batch(step: int) -> Batch:
        inputs, targets = draw(step)
        if step == ONSET:
            inputs, targets = inputs.clone(), targets.clone()
            inputs[5] *= 1000.0
            targets[5] = (targets[5] + 5) % 10
        return inputs, targets

    training.batch = batch
    return training


@exploding("sample")
def outlier_target() -> Training:
    """One target was written down in another unit."""
    network = residual(3, 32)
    network[-1] = nn.Linear(32, 1)
    network[0] = nn.Linear(10, 32)
    training = Training(network, adam(network, 1e-3), sampled(diabetes(), 48), squared_error(network))
    draw = training.batch

    def batch(step: int) -> Batch:
        inputs, targets = draw(step)
        targets = targets.clone()
        targets[17] *= 1000.0 if step == ONSET else 1.0
        return inputs, targets

    training.batch = batch
    return training


@exploding("batch")
def unscaled_regression_batch() -> Training:
    """All inputs and targets of a batch in another unit."""
    network = mlp([10, 48, 48, 1], nn.Tanh)
    training = Training(network, adam(network, 2e-3), sampled(diabetes(), 48), squared_error(network))
    draw = training.batch

    def batch(step: int) -> Batch:
        inputs, targets = draw(step)
        return (30.0 * inputs, 30.0 * targets) if step == ONSET else (inputs, targets)

    training.batch = batch
    return training


@exploding("weights")
def corrupted_conv() -> Training:
    """A kernel is a hundred times too large from one step on, as after a wrong load."""
    network = conv_net()
    layers = [module for module in network if not isinstance(module, nn.BatchNorm2d)]
    network = nn.Sequential(*layers)
    training = on_digits(network, adam(network, 1e-3))

    def before(step: int) -> None:
        if step == ONSET:
            network[4].weight.data *= 100.0

    training.before = before
    return training


@exploding("weights")
def flipped_bit_in_attention() -> Training:
    """One weight of the second block's output projection becomes 3e4."""
    network = Transformer()
    training = Training(network, adam(network, 2e-3), sequences(text(), 16, 24), cross_entropy(network))

    def before(step: int) -> None:
        if step == ONSET:
            network.body.layers[1].self_attn.out_proj.weight.data[2, 3] = 3e4

    training.before = before
    return training


@exploding("rate")
def rate_jump_adam() -> Training:
    """The rate is a thousand times too high from one step on."""
    network = mlp([10, 64, 64, 64, 1])
    optimizer = adam(network, 1e-3)
    training = Training(network, optimizer, sampled(diabetes(), 48), squared_error(network))
    training.before = lambda step: set_rate(optimizer, 1.0 if step >= ONSET else 1e-3)
    return training


@exploding("rate")
def rate_jump_plain_sgd() -> Training:
    """The same without momentum, so that the optimizer keeps no state."""
    network = mlp([64, 64, 64, 10])
    optimizer = sgd(network, 0.05, momentum=0.0)
    training = on_digits(network, optimizer)
    training.before = lambda step: set_rate(optimizer, 20.0 if step >= ONSET else 0.05)
    return training


@exploding("init", onset=0)
def tanh_free_init_large() -> Training:
    """Six linear-ReLU layers drawn from a standard normal distribution."""
    network = mlp([64] + [48] * 6 + [10])
    for layer in linears(network):
        nn.init.normal_(layer.weight)
    return on_digits(network, sgd(network, 1e-6))


@exploding("normalisation", onset=0)
def residual_without_norm() -> Training:
    """Thirty-two residual blocks with He's initialisation and nothing that keeps their sum in bounds."""
    network = residual(32, 24, norm=lambda _: nn.Identity())
    for layer in linears(network):
        nn.init.kaiming_uniform_(layer.weight, nonlinearity="relu")
        nn.init.zeros_(layer.bias)
    return on_digits(network, adam(network, 1e-4))


@exploding("foreign")
def hook_multiplies() -> Training:
    """Something multiplies a gradient after the backward pass."""
    network = mlp([64, 64, 64, 10])
    training = on_digits(network, adam(network, 1e-3))
    weight = linears(network)[2].weight

    def after(step: int) -> None:
        if step >= ONSET and weight.grad is not None:
            weight.grad *= 200.0

    training.after = after
    return training
