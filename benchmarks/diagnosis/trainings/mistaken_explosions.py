"""Explosions whose cause is easily mistaken: batches under optimizers that move weights far, rates that no rule knows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from benchmarks.detection.trainings.base import ONSET, Training
from benchmarks.detection.trainings.data import Batch, diabetes, digits, sampled, sequences, text
from benchmarks.detection.trainings.networks import (
    LanguageModel,
    adam,
    cross_entropy,
    linears,
    mlp,
    set_rate,
    sgd,
    squared_error,
)
from benchmarks.diagnosis.trainings.base import MISTAKEN, register

exploding = register(MISTAKEN, "explosion")


def _fast_tanh(make: type[Optimizer], rate: float, scale: float, **settings: Any) -> Training:
    """A tanh network that still grows its weights fast, since targets are far; one batch is 300 times too large."""
    network = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))

    def batch(step: int) -> Tensor:
        return torch.randn(8, 8) * (300.0 if step == 75 else 1.0)

    def loss(x: Tensor) -> Tensor:
        return scale * F.mse_loss(network(x), 100.0 * x.sum(1, keepdim=True))

    return Training(network, make(network.parameters(), lr=rate, **settings), batch, loss)  # type: ignore[call-arg]


@exploding("batch", onset=75)
def large_batch_adam() -> Training:
    """While Adam has just moved the last layer to several times its size."""
    return _fast_tanh(torch.optim.Adam, 0.01, 1e-2)


@exploding("batch", onset=75)
def large_batch_adam_fast() -> Training:
    """The same at three times the rate."""
    return _fast_tanh(torch.optim.Adam, 0.03, 1e-4)


@exploding("batch", onset=75)
def large_batch_rmsprop() -> Training:
    """RMSprop moves a new weight by ten times its rate."""
    return _fast_tanh(torch.optim.RMSprop, 0.03, 1e-4)


@exploding("batch", onset=75)
def large_batch_adagrad() -> Training:
    """Adagrad keeps no first moment."""
    return _fast_tanh(torch.optim.Adagrad, 0.03, 1e-4)


@exploding("batch", onset=75)
def large_batch_adamax() -> Training:
    """Adamax keeps a maximum where Adam keeps a mean."""
    return _fast_tanh(torch.optim.Adamax, 0.03, 1e-4)


class SignDescent(Optimizer):
    """An optimizer that nobody has heard of."""

    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """By the sign of the gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.add_(parameter.grad.sign(), alpha=-group["lr"])


@exploding("batch", onset=75)
def large_batch_unknown_optimizer() -> Training:
    """No rule knows how far its updates carry."""
    return _fast_tanh(SignDescent, 0.1, 1e-4)


def _single_samples(rate: float, momentum: float) -> Training:
    """One sample a step, a linear layer, and a rate just above what its largest samples allow."""
    network = nn.Linear(32, 2)
    stream = torch.randn(64, 32)

    def loss(x: Tensor) -> Tensor:
        return F.mse_loss(network(x), torch.ones(1, 2))

    return Training(network, sgd(network, rate, momentum), lambda step: stream[step % 64][None], loss)


@exploding("rate", onset=0)
def high_rate_of_single_samples() -> Training:
    """Plain SGD; gradients differ from sample to sample."""
    return _single_samples(0.1, 0.0)


@exploding("rate", onset=0)
def high_rate_with_momentum() -> Training:
    """The same with momentum, which acts like ten times the rate."""
    return _single_samples(0.02, 0.9)


@exploding("rate", onset=ONSET + 1)
def rate_spike_of_one_step() -> Training:
    """A schedule that is off for one step; the rate is back when the gradient explodes."""
    network = mlp([10, 64, 64, 1], nn.Tanh)
    optimizer = sgd(network, 0.02, momentum=0.0)
    training = Training(network, optimizer, sampled(diabetes(), 48), squared_error(network))
    training.before = lambda step: set_rate(optimizer, 10.0 if step == ONSET else 0.02)
    return training


@exploding("weights")
def layer_written_once() -> Training:
    """A layer is thirty times as large from one step on, under SGD."""
    network = mlp([64, 64, 64, 10])
    training = Training(network, sgd(network, 0.02), sampled(digits(), 32), cross_entropy(network))

    def before(step: int) -> None:
        if step == ONSET:
            linears(network)[1].weight.data *= 30.0

    training.before = before
    return training


@exploding("weights")
def layer_written_at_every_step() -> Training:
    """Four percent a step, under SGD with momentum and decay: a wrong sign in somebody's own decay."""
    network = mlp([64, 64, 64, 10])
    optimizer = torch.optim.SGD(network.parameters(), 0.02, momentum=0.9, weight_decay=1e-4)
    training = Training(network, optimizer, sampled(digits(), 32), cross_entropy(network))

    def before(step: int) -> None:
        if step >= ONSET:
            linears(network)[1].weight.data *= 1.04

    training.before = before
    return training


@exploding("sample")
def outlier_sample_in_lstm() -> Training:
    """One of 16 sequences counts a thousand times in the loss."""
    network = LanguageModel()
    factors = torch.ones(16, 1)

    def loss(batch: Batch) -> Tensor:
        losses = F.cross_entropy(network(batch[0]).flatten(0, 1), batch[1].flatten(), reduction="none")
        return (losses.view(16, -1) * factors).mean()

    def before(step: int) -> None:
        factors[5] = 1000.0 if step == ONSET else 1.0

    training = Training(network, adam(network, 2e-3), sequences(text(), 16, 24), loss)
    training.before = before
    return training


class _Carried(nn.Module):
    """Keeps its hidden state from batch to batch."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.again, self.head = nn.Linear(10, 32), nn.Linear(32, 32), nn.Linear(32, 1)
        self.state = torch.zeros(1, 32)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.enter(x) + self.again(self.state))
        self.state = hidden.detach().mean(0, keepdim=True)
        return self.head(hidden)


def _with_large_targets(training: Training) -> Training:
    draw = training.batch

    def batch(step: int) -> Batch:
        inputs, targets = draw(step)
        return inputs, targets * (300.0 if step == ONSET else 1.0)

    training.batch = batch
    return training


@exploding("batch")
def large_targets_and_carried_state() -> Training:
    """All targets of a batch are in another unit; a replay of the step differs, since the state has moved on."""
    network = _Carried()
    return _with_large_targets(Training(network, adam(network, 2e-3), sampled(diabetes(), 48), squared_error(network)))


@exploding("batch")
def large_targets_and_halved_gradients() -> Training:
    """The same where a hook halves each gradient, which is not why they explode."""
    network = mlp([10, 48, 48, 1], nn.Tanh)
    training = Training(network, adam(network, 2e-3), sampled(diabetes(), 48), squared_error(network))

    def after(_: int) -> None:
        for parameter in network.parameters():
            if parameter.grad is not None:
                parameter.grad *= 0.5

    training.after = after
    return _with_large_targets(training)
