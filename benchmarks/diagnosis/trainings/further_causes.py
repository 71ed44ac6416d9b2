"""A fourth table: causes in networks and by faults that no earlier one has, and alarms for which no cause is on the list."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.detection.trainings.base import ONSET, Training
from benchmarks.detection.trainings.data import Batch, cancer, diabetes, digits, sampled, sequences, text
from benchmarks.detection.trainings.networks import (
    LanguageModel,
    Transformer,
    adam,
    cross_entropy,
    linears,
    mlp,
    set_rate,
    sgd,
    squared_error,
)
from benchmarks.diagnosis.trainings.base import FURTHER, NOT_ON_THE_LIST, on_digits, register

vanishing, exploding = register(FURTHER, "vanishing"), register(FURTHER, "explosion")


def _convolutions(depth: int = 3, width: int = 8) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Unflatten(1, (1, 8, 8))]
    for index in range(depth):
        layers += [nn.Conv2d(width if index else 1, width, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * width, 10))


def _at_onset(training: Training, change: Callable[[], object]) -> Training:
    """Runs `change` before the step at which the fault begins."""

    def before(step: int) -> None:
        if step == ONSET:
            change()

    training.before = before
    return training


@exploding(NOT_ON_THE_LIST)
def temperature_drops() -> Training:
    """The logits are divided by a thousandth from one step on, for every batch: neither data nor weights nor rate."""
    network = mlp([64, 64, 64, 10])
    temperature = [1.0]

    def loss(batch: Batch) -> Tensor:
        return F.cross_entropy(network(batch[0]) / temperature[0], batch[1])

    training = Training(network, sgd(network, 1e-5), sampled(digits(), 32), loss)
    return _at_onset(training, lambda: temperature.__setitem__(0, 1e-3))


@exploding(NOT_ON_THE_LIST)
def loss_becomes_a_sum() -> Training:
    """Summed over the batch and no longer averaged, and a hundred times heavier, from one step on."""
    network = mlp([10, 48, 48, 1])
    factor = [1.0]
    training = Training(
        network,
        sgd(network, 1e-5),
        sampled(diabetes(), 48),
        lambda batch: factor[0] * F.mse_loss(network(batch[0]), batch[1]),
    )
    return _at_onset(training, lambda: factor.__setitem__(0, 4800.0))


@exploding("recurrence", onset=0)
def relu_rnn_time_first() -> Training:
    """`nn.RNN` with ReLU, two layers, time first, and a recurrent weight that amplifies."""
    rnn, head = nn.RNN(1, 24, 2, nonlinearity="relu"), nn.Linear(24, 10)
    with torch.no_grad():
        for weight in (rnn.weight_hh_l0, rnn.weight_hh_l1):
            weight.copy_(1.6 * torch.eye(24))
    network = nn.ModuleDict({"rnn": rnn, "head": head})

    def loss(batch: Batch) -> Tensor:
        return F.cross_entropy(head(rnn(batch[0].T.unsqueeze(-1))[0][-1]), batch[1])

    return Training(network, sgd(network, 1e-9), sampled(digits(), 32), loss)


@exploding("rate", onset=ONSET + 1)
def schedule_with_a_peak() -> Training:
    """Three hundred times the rate for three steps, under Adam, in a net of convolutions."""
    network = _convolutions()
    optimizer = adam(network, 1e-3)
    training = on_digits(network, optimizer)
    training.before = lambda step: set_rate(optimizer, 0.3 if ONSET <= step < ONSET + 3 else 1e-3)
    return training


@exploding("rate", onset=40)
def momentum_that_never_forgets() -> Training:
    """A rate that plain SGD would bear, with a momentum of 0.999."""
    network = mlp([10, 48, 48, 1], nn.Tanh)
    return Training(network, sgd(network, 0.1, 0.999), sampled(diabetes(), 48), squared_error(network))


@exploding("batch")
def images_in_bytes() -> Training:
    """One batch came without being divided by 255, in a net of convolutions."""
    network = _convolutions()
    training = on_digits(network, adam(network, 1e-3))
    draw = training.batch

    def batch(step: int) -> Batch:
        inputs, targets = draw(step)
        return (inputs * 255.0, (targets + 3) % 10) if step == ONSET else (inputs, targets)

    training.batch = batch
    return training


@exploding("sample")
def hot_pixel() -> Training:
    """One pixel of one image of a batch is ten thousand, and its label wrong, or there would be no gradient."""
    network = _convolutions()
    training = on_digits(network, adam(network, 1e-3))
    draw = training.batch

    def batch(step: int) -> Batch:
        inputs, targets = draw(step)
        if step == ONSET:
            inputs, targets = inputs.clone(), targets.clone()
            inputs[21, 30] = 1e4
            targets[21] = (targets[21] + 5) % 10
        return inputs, targets

    training.batch = batch
    return training


@exploding("sample")
def unit_of_one_target_in_an_lstm() -> Training:
    """A regression over sequences; one target is in another unit."""
    rnn, head = nn.LSTM(10, 24, batch_first=True), nn.Linear(24, 1)
    network = nn.ModuleDict({"rnn": rnn, "head": head})
    draw = sampled(diabetes(), 24)

    def batch(step: int) -> Batch:
        inputs, targets = draw(step)
        targets = targets.clone()
        targets[9] = 2000.0 if step == ONSET else targets[9]
        return inputs[:, None].repeat(1, 6, 1), targets

    def loss(batch: Batch) -> Tensor:
        return F.mse_loss(head(rnn(batch[0])[0][:, -1]), batch[1])

    return Training(network, adam(network, 2e-3), batch, loss)


@exploding("weights")
def head_drawn_anew() -> Training:
    """The last layer is initialised again, far too large, while the rest goes on."""
    network = mlp([64, 64, 64, 10])
    training = on_digits(network, adam(network, 1e-3))
    return _at_onset(training, lambda: nn.init.normal_(linears(network)[-1].weight, std=20.0))


@exploding("weights")
def all_weights_times_four() -> Training:
    """A wrong average of weights is loaded, under RMSprop."""
    network = mlp([10, 48, 48, 48, 1])
    training = Training(
        network, torch.optim.RMSprop(network.parameters(), 1e-3), sampled(diabetes(), 48), squared_error(network)
    )

    def change() -> None:
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.mul_(4.0)

    return _at_onset(training, change)


@exploding("foreign")
def gradients_that_are_never_cleared() -> Training:
    """From one step on each gradient has those of all steps before on top."""
    network = mlp([64, 64, 64, 10])
    training = on_digits(network, sgd(network, 1e-4))
    kept: dict[int, Tensor] = {}

    def after(step: int) -> None:
        for index, parameter in enumerate(network.parameters()):
            if step >= ONSET and parameter.grad is not None:
                parameter.grad += kept.get(index, torch.zeros(()))
                kept[index] = parameter.grad.clone()

    training.after = after
    return training


@exploding("foreign")
def loss_scale_left_in() -> Training:
    """All gradients are as many times too large as the loss had been scaled; nobody has divided them."""
    network = Transformer()
    training = Training(network, adam(network, 1e-3), sequences(text(), 16, 24), cross_entropy(network))

    def after(step: int) -> None:
        for parameter in network.parameters():
            if step == ONSET and parameter.grad is not None:
                parameter.grad *= 65536.0

    training.after = after
    return training


@exploding("init", onset=0)
def conv_init_large() -> Training:
    """Six convolutions drawn from a standard normal distribution."""
    network = _convolutions(6)
    for module in network:
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight)
    return on_digits(network, sgd(network, 1e-9))


@vanishing("saturation", onset=ONSET)
def clipped_activations() -> Training:
    """ReLU6 whose inputs have been pushed above six."""
    network = mlp([64, 48, 48, 48, 10], nn.ReLU6)
    training = on_digits(network, adam(network, 1e-3))
    return _at_onset(training, lambda: linears(network)[1].bias.data.fill_(100.0))


@vanishing("activation")
def hard_sigmoids() -> Training:
    """Ten of them, whose slope is a sixth."""
    network = mlp([64] + [48] * 10 + [10], nn.Hardsigmoid)
    return on_digits(network, adam(network, 1e-3))


@vanishing("cut")
def rounded_in_the_middle() -> Training:
    """Values are rounded between two halves: a slope of zero everywhere."""
    lower, upper = mlp([64, 48, 48]), mlp([48, 48, 10])
    network = nn.ModuleDict({"lower": lower, "upper": upper})

    def loss(batch: Batch) -> Tensor:
        return F.cross_entropy(upper(torch.round(4 * lower(batch[0]))), batch[1])

    return Training(network, adam(network, 1e-3), sampled(digits(), 32), loss)


@vanishing("weights", onset=30)
def penalty_in_the_loss() -> Training:
    """The loss itself pulls all weights towards zero, and there is nothing to learn; the optimizer has no decay."""
    network = mlp([16] + [64] * 7 + [1])

    def batch(_: int) -> Batch:
        return torch.randn(64, 16), torch.randn(64, 1)

    def loss(batch: Batch) -> Tensor:
        penalty = sum(layer.weight.square().sum() for layer in linears(network))
        return F.mse_loss(network(batch[0]), batch[1]) + 0.5 * penalty

    return Training(network, torch.optim.Adam(network.parameters(), 2e-3), batch, loss)


@vanishing("recurrence")
def gru_that_forgets() -> Training:
    """Update gates biased so that nothing is kept, in a model of text whose loss looks at the last character only."""
    network = LanguageModel(nn.GRU)
    with torch.no_grad():
        network.rnn.bias_hh_l0[:64] = -5.0
    draw = sequences(text(), 16, 200)

    def loss(batch: Batch) -> Tensor:
        return F.cross_entropy(network(batch[0])[:, -1], batch[1][:, -1])

    return Training(network, sgd(network, 1e-3), draw, loss)


@vanishing("saturation", onset=ONSET)
def sigmoid_output_that_is_certain() -> Training:
    """The last bias has been pushed up: every prediction is one, and a squared error has no slope there."""
    network = nn.Sequential(*mlp([30, 32, 32, 1]), nn.Sigmoid())

    def loss(batch: Batch) -> Tensor:
        return F.mse_loss(network(batch[0])[:, 0], batch[1].float())

    training = Training(network, sgd(network, 0.05), sampled(cancer(), 32), loss)
    return _at_onset(training, lambda: linears(network)[-1].bias.data.fill_(60.0))
