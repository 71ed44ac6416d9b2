"""Trainings in which gradients no longer reach a part of the network."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.detection.trainings.base import ONSET, Training, sick
from benchmarks.detection.trainings.data import Batch, cancer, diabetes, digits, sampled
from benchmarks.detection.trainings.networks import adam, cross_entropy, linears, mlp, sgd, squared_error

VANISHING, DEAD = "vanishing by depth", "dead or detached"


def _digits(network: nn.Module, optimizer: torch.optim.Optimizer, size: int = 32) -> Training:
    return Training(network, optimizer, sampled(digits(), size), cross_entropy(network))


@sick(VANISHING, "vanishing", onset=0)
def deep_sigmoid_sgd() -> Training:
    """Nine sigmoid layers."""
    network = mlp([64] + [40] * 8 + [10], nn.Sigmoid)
    return _digits(network, sgd(network, 0.1))


@sick(VANISHING, "vanishing", onset=0)
def deep_sigmoid_adam() -> Training:
    """Thirteen sigmoid layers."""
    network = mlp([30] + [40] * 12 + [2], nn.Sigmoid)
    return Training(network, adam(network, 1e-3), sampled(cancer(), 32), cross_entropy(network))


@sick(VANISHING, "vanishing", onset=0)
def bad_init_small() -> Training:
    """Seven tanh layers with weights of 0.01."""
    network = mlp([64] + [40] * 6 + [10], nn.Tanh)
    for layer in linears(network):
        nn.init.normal_(layer.weight, std=0.01)
    return _digits(network, sgd(network, 0.05))


@sick(VANISHING, "vanishing", onset=0)
def deep_tanh_default() -> Training:
    """Sixteen tanh layers with torch's default weights, which shrink what they pass on."""
    network = mlp([10] + [40] * 15 + [1], nn.Tanh)
    return Training(network, sgd(network, 0.01), sampled(diabetes(), 32), squared_error(network))


@sick(VANISHING, "vanishing", onset=0)
def deep_tanh_digits() -> Training:
    """Twenty tanh layers with torch's default weights."""
    network = mlp([64] + [40] * 19 + [10], nn.Tanh)
    return _digits(network, sgd(network, 0.01))


def _saturating(network: nn.Sequential, training: Training, size: float) -> Training:
    """From one step on the biases of all hidden layers lie so far out that their units saturate, whatever comes in."""

    def before(step: int) -> None:
        if step == ONSET:
            for layer in linears(network)[:-1]:
                layer.bias.data += size * torch.where(torch.rand_like(layer.bias) < 0.5, -1.0, 1.0)

    training.before = before
    return training


@sick(VANISHING, "vanishing")
def saturating_tanh() -> Training:
    """Saturated later in training."""
    network = mlp([64] + [40] * 6 + [10], nn.Tanh)
    for layer in linears(network):
        nn.init.xavier_normal_(layer.weight, nn.init.calculate_gain("tanh"))
    return _saturating(network, _digits(network, sgd(network, 0.01)), 10.0)


@sick(VANISHING, "vanishing")
def saturating_sigmoid() -> Training:
    """Saturated later in training."""
    network = mlp([30, 40, 40, 40, 40, 2], nn.Sigmoid)
    for layer in linears(network):
        nn.init.xavier_normal_(layer.weight, 4.0)
    training = Training(network, sgd(network, 0.01), sampled(cancer(), 32), cross_entropy(network))
    return _saturating(network, training, 20.0)


@sick(VANISHING, "vanishing", onset=0)
def fp16_underflow() -> Training:
    """Gradients pass through fp16 without loss scaling, under a loss in a small unit."""
    network = mlp([10, 64, 64, 64, 1])
    for module in network:
        if isinstance(module, nn.ReLU):
            module.register_full_backward_hook(lambda _, grads, __: tuple(grad.half().float() for grad in grads))
    return Training(
        network,
        adam(network, 1e-3),
        sampled(diabetes(), 256),
        lambda batch: 1e-6 * F.mse_loss(network(batch[0]), batch[1]),
    )


@sick(DEAD, "vanishing", onset=0)
def dead_relu_layer() -> Training:
    """The biases of one layer are so low that no unit ever fires."""
    network = mlp([10, 64, 64, 64, 1])
    linears(network)[1].bias.data.fill_(-8.0)
    return Training(network, adam(network, 1e-3), sampled(diabetes(), 32), squared_error(network))


@sick(DEAD, "vanishing")
def dead_relu_later() -> Training:
    """One step at far too high a rate leaves a layer without a unit that fires."""
    network = mlp([64, 64, 64, 64, 10])
    training = _digits(network, sgd(network, 0.05))

    def before(step: int) -> None:
        if step == ONSET:
            linears(network)[1].bias.data -= 50.0

    training.before = before
    return training


@sick(DEAD, "vanishing", onset=0)
def detached_branch() -> Training:
    """A stray `detach()` cuts off half the network."""
    lower, upper = mlp([64, 48, 48]), mlp([48, 48, 10])
    network = nn.ModuleList([lower, upper])

    def loss(batch: Batch) -> Tensor:
        hidden = lower(batch[0])
        return F.cross_entropy(upper(torch.relu(hidden).detach() + 0 * hidden), batch[1])

    return Training(network, adam(network, 1e-3), sampled(digits(), 32), loss)


@sick(DEAD, "vanishing")
def detached_later() -> Training:
    """The gate of a side branch closes for good."""
    trunk, side, head = mlp([30, 32, 32]), mlp([30, 32, 32]), nn.Linear(32, 2)
    network = nn.ModuleDict({"trunk": trunk, "side": side, "head": head})

    def loss(batch: tuple[int, Batch]) -> Tensor:
        step, (inputs, targets) = batch
        hidden = trunk(inputs) + side(inputs) * float(step < ONSET)
        return F.cross_entropy(head(torch.relu(hidden)), targets)

    draw = sampled(cancer(), 32)
    return Training(network, adam(network, 1e-3), lambda step: (step, draw(step)), loss)


@sick(DEAD, "vanishing", onset=0)
def zero_init() -> Training:
    """All weights are zero: only the last bias learns."""
    network = mlp([64, 48, 48, 10])
    for parameter in network.parameters():
        nn.init.zeros_(parameter)
    return _digits(network, adam(network, 1e-3))


@sick(DEAD, "vanishing", onset=0)
def zero_init_cancer() -> Training:
    """All weights and biases are zero."""
    network = mlp([30, 48, 2], nn.Tanh)
    for parameter in network.parameters():
        nn.init.zeros_(parameter)
    return Training(network, sgd(network, 0.05), sampled(cancer(), 32), cross_entropy(network))
