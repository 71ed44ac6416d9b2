"""Trainings written after the last change of a detector, healthy and sick, to judge the result by once."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.nn import functional as F

from benchmarks.detection.trainings.base import ONSET, STEPS, Training, healthy, sick
from benchmarks.detection.trainings.data import Batch, cancer, diabetes, digits, sampled, sequences, text, words
from benchmarks.detection.trainings.explosions import FROM_START, SLOW, SUDDEN
from benchmarks.detection.trainings.networks import (
    LanguageModel,
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
from benchmarks.detection.trainings.nonfinite import NONFINITE, OVERFLOW
from benchmarks.detection.trainings.vanishing import DEAD, VANISHING


def _digits(network: nn.Module, optimizer: torch.optim.Optimizer, size: int = 32) -> Training:
    return Training(network, optimizer, sampled(digits(), size), cross_entropy(network))


def _diabetes(network: nn.Module, optimizer: torch.optim.Optimizer, size: int = 32) -> Training:
    return Training(network, optimizer, sampled(diabetes(), size), squared_error(network))


@healthy
def gru_text() -> Training:
    """Next character, by gated units."""
    network = LanguageModel(nn.GRU)
    return Training(network, adam(network, 3e-3), sequences(text(), 16, 30), cross_entropy(network))


@healthy
def late_leaky() -> Training:
    """Eight leaky layers on cell samples, which hesitate before they learn."""
    network = mlp([30] + [48] * 8 + [2], nn.LeakyReLU)
    return Training(network, adam(network, 5e-4), sampled(cancer(), 32), cross_entropy(network))


@healthy
def zero_head() -> Training:
    """The last layer begins at zero: at the first step nothing reaches the others."""
    network = mlp([64, 64, 64, 10])
    nn.init.zeros_(linears(network)[-1].weight)
    return _digits(network, adam(network, 1e-3))


@healthy
def deep_selu() -> Training:
    """Twelve self-normalising layers."""
    network = mlp([64] + [48] * 11 + [10], nn.SELU)
    for layer in linears(network):
        nn.init.kaiming_normal_(layer.weight, nonlinearity="linear")
    return _digits(network, adam(network, 5e-4))


@healthy
def variational() -> Training:
    """An autoencoder with noise in the middle, whose penalty is phased in."""
    encoder, decoder = mlp([64, 48, 16]), mlp([8, 48, 64])
    network = nn.ModuleList([encoder, decoder])
    draw = sampled(digits(), 64)

    def loss(batch: tuple[int, Batch]) -> Tensor:
        step, (images, _) = batch
        mean, log_variance = encoder(images).chunk(2, 1)
        code = mean + torch.exp(0.5 * log_variance) * torch.randn_like(mean)
        penalty = 0.5 * (mean.square() + log_variance.exp() - log_variance - 1).sum(1).mean()
        return F.mse_loss(decoder(code), images, reduction="none").sum(1).mean() + min(1.0, step / 200) * penalty

    return Training(network, adam(network, 2e-3), lambda step: (step, draw(step)), loss)


@healthy
def contrastive() -> Training:
    """Two noisy views of each image have to find each other."""
    network = mlp([64, 64, 32])
    images = sampled(digits(), 64)

    def loss(batch: Batch) -> Tensor:
        views = [F.normalize(network(batch[0] + 0.1 * torch.randn_like(batch[0])), dim=1) for _ in range(2)]
        return F.cross_entropy(views[0] @ views[1].T / 0.1, torch.arange(len(batch[0])))

    return Training(network, adam(network, 1e-3), images, loss)


@healthy
def dropout_half() -> Training:
    """Half of the units are switched off at random."""
    network = mlp([64, 96, 96, 10], lambda: nn.Sequential(nn.ReLU(), nn.Dropout(0.5)))
    return _digits(network, adam(network, 2e-3))


@healthy
def adagrad_words() -> Training:
    """Next word from four, with an embedding of rare words."""
    network = nn.Sequential(nn.EmbeddingBag(2_000, 24), nn.Linear(24, 64))

    def loss(batch: Batch) -> Tensor:
        return F.cross_entropy(network(batch[0]), batch[1][:, -1] % 64)

    return Training(network, torch.optim.Adagrad(network.parameters(), 0.1), sequences(words(), 48, 4), loss)


@healthy
def transformer_restarts() -> Training:
    """Next character; a cosine that starts again every 75 steps."""
    network = Transformer()
    optimizer = adam(network, 3e-3)
    training = Training(network, optimizer, sequences(text(), 16, 24), cross_entropy(network))
    training.before = lambda step: set_rate(optimizer, 3e-3 * 0.5 * (1 + math.cos(math.pi * (step % 75) / 75)) + 1e-5)
    return training


@healthy
def one_cycle() -> Training:
    """The rate climbs for a third of the training, to a high one, and comes down."""
    network = conv_net()
    optimizer = sgd(network, 0.01)
    training = _digits(network, optimizer)

    def before(step: int) -> None:
        up = step / (STEPS / 3)
        set_rate(optimizer, 0.01 + 0.19 * (up if up < 1 else max(0.0, 1.5 - up / 2)))

    training.before = before
    return training


@sick(SUDDEN, "explosion", "nonfinite", onset=ONSET + 1)
def rate_spike_adam() -> Training:
    """The rate is a thousand times too high for three steps."""
    network = mlp([10, 64, 64, 1])
    optimizer = adam(network, 2e-3)
    training = _diabetes(network, optimizer)
    training.before = lambda step: set_rate(optimizer, 2.0 if ONSET <= step < ONSET + 3 else 2e-3)
    return training


@sick(SUDDEN, "explosion")
def kernel_spike() -> Training:
    """Sixty times the usual gradient in one kernel."""
    network = conv_net()
    training = _digits(network, adam(network, 1e-3))
    kernel = network[1].weight

    def after(step: int) -> None:
        if step == ONSET and kernel.grad is not None:
            kernel.grad *= 60.0

    training.after = after
    return training


@sick(SUDDEN, "explosion")
def bad_targets() -> Training:
    """The targets of one batch were not standardised."""
    network = mlp([10, 64, 64, 1])
    training = _diabetes(network, sgd(network, 0.01), 64)
    draw = training.batch

    def batch(step: int) -> Batch:
        inputs, targets = draw(step)
        return inputs, 77.0 * targets + 152.0 if step == ONSET else targets

    training.batch = batch
    return training


@sick(SLOW, "explosion", "nonfinite")
def range_test_residual() -> Training:
    """The rate grows by twelve percent a step."""
    network = residual(6)
    optimizer = adam(network, 1e-3)
    training = _digits(network, optimizer)
    training.before = lambda step: set_rate(optimizer, 1e-3 * min(1.12 ** max(step - ONSET, 0), 1e5))
    return training


@sick(SLOW, "explosion", "nonfinite")
def inverted_decay_text() -> Training:
    """All weights of a transformer grow by two percent a step."""
    network = Transformer()
    training = Training(network, adam(network, 1e-3), sequences(text(), 16, 24), cross_entropy(network))

    def before(step: int) -> None:
        if step >= ONSET:
            for layer in linears(network):
                layer.weight.data *= 1.02

    training.before = before
    return training


@sick(FROM_START, "explosion", "nonfinite", "update_ratio", onset=0)
def rate_too_high_deep() -> Training:
    """Plain descent that overshoots."""
    network = mlp([10, 64, 64, 64, 1])
    return _diabetes(network, sgd(network, 1.0))


@sick(FROM_START, "explosion", "nonfinite", "update_ratio", onset=0)
def rate_too_high_adam() -> Training:
    """A rate of one, under which the weights are drawn anew at every step."""
    network = mlp([64, 64, 64, 10])
    return _digits(network, adam(network, 1.0))


@sick(NONFINITE, "nonfinite")
def sqrt_of_zero() -> Training:
    """The distance of two equal vectors has no gradient."""
    network = mlp([64, 48, 16])
    draw = sampled(digits(), 32)

    def loss(batch: tuple[int, Batch]) -> Tensor:
        step, (images, labels) = batch
        codes = network(images)
        others = codes if step == ONSET else codes.roll(1, 0)
        apart = (labels != labels.roll(1, 0)).float()
        distance = (codes - others).square().sum(1).sqrt()
        return (apart * F.relu(2.0 - distance) + (1.0 - apart) * distance).mean()

    return Training(network, adam(network, 1e-3), lambda step: (step, draw(step)), loss)


@sick(OVERFLOW, "overflow", "nonfinite")
def fp16_weights() -> Training:
    """Weights grow until a layer's output passes 65,504."""
    network = mlp([64, 64, 64, 10])
    training = _digits(network, adam(network, 1e-3))

    def before(step: int) -> None:
        if step == ONSET:
            linears(network)[1].weight.data *= 1e5

    training.before = before
    training.scaler, training.autocast = GradScaler("cpu", init_scale=2.0**12), True
    return training


@sick(VANISHING, "vanishing", onset=0)
def deep_sigmoid_conv() -> Training:
    """Six convolutions with sigmoids."""
    layers: list[nn.Module] = [nn.Unflatten(1, (1, 8, 8))]
    for channels in (1, 8, 8, 8, 8, 8):
        layers += [nn.Conv2d(channels, 8, 3, padding=1), nn.Sigmoid()]
    network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 10))
    return _digits(network, sgd(network, 0.1))


@sick(VANISHING, "vanishing", onset=0)
def deep_tanh_cancer() -> Training:
    """Twenty-four tanh layers with torch's default weights."""
    network = mlp([30] + [32] * 23 + [2], nn.Tanh)
    return Training(network, sgd(network, 0.01), sampled(cancer(), 32), cross_entropy(network))


@sick(DEAD, "vanishing")
def dead_kernels_later() -> Training:
    """The biases of a convolution fall so low that none of its units fires."""
    network = nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip
    training = _digits(network, adam(network, 2e-3))

    def before(step: int) -> None:
        if step == ONSET:
            network[1].bias.data -= 100.0

    training.before = before
    return training


@sick(DEAD, "vanishing", onset=0)
def zero_init_regression() -> Training:
    """All weights are zero: only the last bias learns."""
    network = mlp([10, 48, 48, 48, 1])
    for parameter in network.parameters():
        nn.init.zeros_(parameter)
    return _diabetes(network, sgd(network, 0.01))
