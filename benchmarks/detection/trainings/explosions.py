"""Trainings whose gradients grow too large: at once, slowly, or from the first step on."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.detection.trainings.base import ONSET, Training, sick
from benchmarks.detection.trainings.data import Batch, diabetes, digits, sampled, scaled, sequences, text, words
from benchmarks.detection.trainings.networks import (
    LanguageModel,
    Transformer,
    adam,
    cross_entropy,
    linears,
    mlp,
    residual,
    set_rate,
    sgd,
    squared_error,
)

SUDDEN, SLOW, FROM_START = "explosion, sudden", "explosion, slow", "explosion, from step 0"


def _digits(network: nn.Module, optimizer: torch.optim.Optimizer, size: int = 32) -> Training:
    return Training(network, optimizer, sampled(digits(), size), cross_entropy(network))


def _diabetes(network: nn.Module, optimizer: torch.optim.Optimizer, size: int = 32) -> Training:
    return Training(network, optimizer, sampled(diabetes(), size), squared_error(network))


@sick(SUDDEN, "explosion", "nonfinite", onset=ONSET + 1)
def lr_jump() -> Training:
    """The rate is 300 times too high for five steps; the first gradient to feel it is the next one."""
    network = mlp([10, 64, 64, 64, 1])
    optimizer = sgd(network, 0.01)
    training = _diabetes(network, optimizer)
    training.before = lambda step: set_rate(optimizer, 3.0 if ONSET <= step < ONSET + 5 else 0.01)
    return training


@sick(SUDDEN, "explosion")
def bad_batch() -> Training:
    """One batch whose inputs were not divided by 255, on a network with BatchNorm nowhere."""
    network = mlp([64, 64, 64, 10])
    training = _digits(network, adam(network, 1e-3))
    draw = training.batch
    training.batch = lambda step: scaled(draw(step), 255.0 if step == ONSET else 1.0)
    return training


@sick(SUDDEN, "explosion")
def outlier_label() -> Training:
    """One target of one batch is a hundred standard deviations off."""
    network = mlp([10, 64, 64, 1])
    training = _diabetes(network, adam(network, 2e-3), 64)
    draw = training.batch

    def batch(step: int) -> Batch:
        inputs, targets = draw(step)
        if step == ONSET:
            targets = targets.clone()
            targets[3] += 100.0
        return inputs, targets

    training.batch = batch
    return training


@sick(SUDDEN, "explosion")
def data_scale_shift() -> Training:
    """From one step on the inputs come in another unit."""
    network = mlp([64, 64, 64, 10])
    training = _digits(network, sgd(network, 0.02))
    draw = training.batch
    training.batch = lambda step: scaled(draw(step), 60.0 if step >= ONSET else 1.0)
    return training


@sick(SUDDEN, "explosion")
def weight_corruption() -> Training:
    """A bit flips in one weight."""
    network = mlp([64, 64, 64, 10])
    training = _digits(network, adam(network, 1e-3))

    def before(step: int) -> None:
        if step == ONSET:
            linears(network)[1].weight.data[3, 7] = 1e4

    training.before = before
    return training


def _spike(training: Training, parameter: nn.Parameter, factor: float) -> Training:
    def after(step: int) -> None:
        if step == ONSET and parameter.grad is not None:
            parameter.grad *= factor

    training.after = after
    return training


@sick(SUDDEN, "explosion")
def one_layer_spike() -> Training:
    """Fifty times the usual gradient in one layer that carries a small part of the norm."""
    network = mlp([64, 64, 64, 64, 10])
    return _spike(_digits(network, adam(network, 1e-3)), linears(network)[1].bias, 50.0)


@sick(SUDDEN, "explosion")
def one_attention_spike() -> Training:
    """Sixty times the usual gradient in the attention of one block."""
    network = Transformer()
    training = Training(network, adam(network, 3e-3), sequences(text(), 16, 24), cross_entropy(network))
    return _spike(training, network.body.layers[1].self_attn.in_proj_weight, 60.0)


@sick(SUDDEN, "explosion")
def embedding_blowup() -> Training:
    """The vectors of the most frequent words are a thousand times too long from one step on."""
    network = nn.Sequential(nn.EmbeddingBag(2_000, 24), nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 50))

    def loss(batch: Batch) -> Tensor:
        return F.cross_entropy(network(batch[0]), batch[1][:, -1] % 50)

    def before(step: int) -> None:
        if step == ONSET:
            network[0].weight.data[:5] *= 1e3

    return Training(network, adam(network, 1e-3), sequences(words(), 64, 4), loss, before=before)


@sick(SLOW, "explosion", "nonfinite")
def slow_divergence() -> Training:
    """The rate grows by a tenth a step, as in a range test that nobody ends."""
    network = mlp([10, 64, 64, 1])
    optimizer = sgd(network, 0.02)
    training = _diabetes(network, optimizer, 64)
    training.before = lambda step: set_rate(optimizer, min(0.3 * 1.1 ** (step - ONSET), 10.0) if step >= ONSET else 0.02)
    return training


def _growing(training: Training, rate: float, factor: float) -> Training:
    """The rate grows by a factor a step, up to a hundred thousand times, as in a range test that nobody ends."""

    def before(step: int) -> None:
        set_rate(training.optimizer, rate * min(factor ** max(step - ONSET, 0), 1e5))

    training.before = before
    return training


@sick(SLOW, "explosion", "nonfinite")
def range_test_adam() -> Training:
    """A tenth a step, from a good rate."""
    network = mlp([64, 64, 64, 10])
    return _growing(_digits(network, adam(network, 1e-2)), 1e-2, 1.1)


@sick(SLOW, "explosion", "nonfinite")
def range_test_sgd() -> Training:
    """A tenth a step, from a good rate."""
    network = mlp([10, 64, 64, 64, 1])
    return _growing(_diabetes(network, sgd(network, 0.02)), 0.02, 1.1)


@sick(SLOW, "explosion", "nonfinite")
def range_test_transformer() -> Training:
    """A twelfth a step, from a good rate."""
    network = Transformer()
    training = Training(network, adam(network, 3e-3), sequences(text(), 16, 24), cross_entropy(network))
    return _growing(training, 3e-3, 1.08)


@sick(SLOW, "explosion", "nonfinite")
def inverted_decay() -> Training:
    """All weights grow by one and a half percent a step, as where a sign is wrong in a decay."""
    network = mlp([64, 64, 64, 64, 10])
    training = _digits(network, adam(network, 1e-3))

    def before(step: int) -> None:
        if step >= ONSET:
            for layer in linears(network):
                layer.weight.data *= 1.015

    training.before = before
    return training


@sick(SLOW, "explosion")
def slow_layer_growth() -> Training:
    """The gradient of one layer grows by a third a step."""
    network = mlp([64, 64, 64, 64, 10])
    training = _digits(network, adam(network, 1e-3))
    weight = linears(network)[2].weight

    def after(step: int) -> None:
        if step >= ONSET and weight.grad is not None:
            weight.grad *= 1.33 ** min(step - ONSET + 1, 60)

    training.after = after
    return training


@sick(SLOW, "explosion", "nonfinite")
def exploding_rnn() -> Training:
    """The recurrent weights grow by four percent a step, past the point where each step in time amplifies."""
    network = LanguageModel(nn.RNN, nonlinearity="relu")
    training = Training(network, sgd(network, 0.05), sequences(text(), 16, 32), cross_entropy(network))

    def before(step: int) -> None:
        if step >= ONSET:
            network.rnn.weight_hh_l0.data *= 1.04

    training.before = before
    return training


@sick(SLOW, "explosion")
def adam_epsilon() -> Training:
    """Adam's second moment has forgotten what a gradient is when the hard data comes; it divides by almost nothing."""
    network = mlp([64, 64, 64, 10])
    optimizer = adam(network, 1e-2, betas=(0.9, 0.9999), eps=1e-16)
    inputs, targets = digits()
    easy = sampled((inputs[targets < 1], targets[targets < 1]), 32)
    draw = sampled(digits(), 32)
    return Training(network, optimizer, lambda step: easy(step) if step < ONSET else draw(step), cross_entropy(network))


@sick(FROM_START, "explosion", "nonfinite", onset=0)
def rate_too_high() -> Training:
    """It doubles its error at every step, until NaN."""
    network = mlp([10, 64, 64, 1])
    return _diabetes(network, sgd(network, 1.5))


@sick(FROM_START, "explosion", "nonfinite", onset=0)
def bad_init_large() -> Training:
    """Eight layers with weights five times too large."""
    network = mlp([10] + [64] * 7 + [1])
    for layer in linears(network):
        nn.init.normal_(layer.weight, std=0.8)
    return _diabetes(network, adam(network, 1e-3))


@sick(FROM_START, "explosion", "nonfinite", onset=0)
def missing_normalisation() -> Training:
    """Twenty-four residual blocks whose sum nothing keeps in bounds."""
    network = residual(24, 32, norm=lambda _: nn.Identity())
    for layer in linears(network):
        nn.init.kaiming_normal_(layer.weight)
    return _digits(network, sgd(network, 1e-3))


@sick(FROM_START, "explosion", "nonfinite", onset=0)
def unstable_rnn() -> Training:
    """Recurrent weights that amplify from the start, at a rate that would suit others."""
    network = LanguageModel(nn.RNN, nonlinearity="relu")
    network.rnn.weight_hh_l0.data = 1.3 * torch.eye(32)
    return Training(network, sgd(network, 0.01), sequences(text(), 16, 40), cross_entropy(network))
