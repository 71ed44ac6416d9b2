"""A second set of unseen trainings, written before the last change of a detector, to judge that change by once."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.nn import functional as F

from benchmarks.detection.trainings.base import ONSET, Training, healthy, sick
from benchmarks.detection.trainings.data import Batch, cancer, diabetes, digits, sampled, scaled, sequences, text
from benchmarks.detection.trainings.explosions import FROM_START, SLOW, SUDDEN
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
from benchmarks.detection.trainings.nonfinite import NONFINITE, OVERFLOW
from benchmarks.detection.trainings.vanishing import DEAD, VANISHING


def _digits(network: nn.Module, optimizer: torch.optim.Optimizer, size: int = 32) -> Training:
    return Training(network, optimizer, sampled(digits(), size), cross_entropy(network))


@healthy
def rmsprop_digits() -> Training:
    """RMSprop, whose first steps are long."""
    network = mlp([64, 96, 10])
    return _digits(network, torch.optim.RMSprop(network.parameters(), 3e-3))


@healthy
def adagrad_digits() -> Training:
    """Adagrad at a high rate: it begins with long steps and settles."""
    network = mlp([64, 64, 64, 10])
    return _digits(network, torch.optim.Adagrad(network.parameters(), 0.05))


@healthy
def single_samples() -> Training:
    """One sample a step."""
    network = mlp([30, 32, 2])
    return Training(network, sgd(network, 3e-3), sampled(cancer(), 1), cross_entropy(network))


@healthy
def huber_outliers() -> Training:
    """Targets with a heavy tail, and a loss that forgives them."""
    network = mlp([10, 48, 48, 1])
    draw = sampled(diabetes(), 32)

    def loss(batch: Batch) -> Tensor:
        noise = torch.distributions.StudentT(2.0).sample(batch[1].shape)
        return F.huber_loss(network(batch[0]), batch[1] + 0.5 * noise)

    return Training(network, adam(network, 1e-3), draw, loss)


@healthy
def frozen_then_trained() -> Training:
    """The body is let go at step 150."""
    network = mlp([64, 64, 64, 10])
    body = list(network.parameters())[:4]
    for parameter in body:
        parameter.requires_grad_(False)
    optimizer = adam(network, 1e-3)

    def before(step: int) -> None:
        if step == ONSET:
            for parameter in body:
                parameter.requires_grad_(True)

    training = _digits(network, optimizer)
    training.before = before
    return training


@healthy
def unused_branch() -> Training:
    """A branch whose output is multiplied by zero."""

    class Branched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.branch = mlp([64, 64, 64, 10]), mlp([64, 10])

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x) + 0.0 * self.branch(x)

    network = Branched()
    return _digits(network, adam(network, 1e-3))


@healthy
def long_warmup() -> Training:
    """A transformer whose rate climbs for all 300 steps."""
    network = Transformer()
    optimizer = adam(network, 1e-5)
    training = Training(network, optimizer, sequences(text(), 16, 24), cross_entropy(network))
    training.before = lambda step: set_rate(optimizer, 1e-5 * (step + 1))
    return training


@sick(SUDDEN, "explosion", "nonfinite", onset=ONSET + 1)
def rate_jump_text() -> Training:
    """The rate of a transformer is three hundred times too high from one step on."""
    network = Transformer()
    optimizer = adam(network, 1e-3)
    training = Training(network, optimizer, sequences(text(), 16, 24), cross_entropy(network))
    training.before = lambda step: set_rate(optimizer, 0.3 if step >= ONSET else 1e-3)
    return training


@sick(SUDDEN, "explosion")
def unscaled_inputs() -> Training:
    """One batch was not divided by its range."""
    network = mlp([10, 64, 64, 1])
    draw = sampled(diabetes(), 32)
    training = Training(network, adam(network, 1e-3), draw, squared_error(network))
    training.batch = lambda step: scaled(draw(step), 30.0 if step == ONSET else 1.0)
    return training


@sick(SUDDEN, "explosion")
def spike_in_noise() -> Training:
    """A hundredfold step between noisy ones, of one sample each."""
    network = mlp([30, 32, 2])
    training = Training(network, sgd(network, 1e-3), sampled(cancer(), 1), cross_entropy(network))

    def after(step: int) -> None:
        if step == ONSET:
            scale = 30.0 / sum(float(p.grad.norm() ** 2) for p in network.parameters() if p.grad is not None) ** 0.5
            for parameter in network.parameters():
                if parameter.grad is not None:
                    parameter.grad *= scale

    training.after = after
    return training


def _growing(rate: float) -> Training:
    """Converged, at a rate of zero; the gradients grow by a factor a step, and nothing else moves."""
    network = mlp([64, 64, 10])
    optimizer = sgd(network, 0.05, momentum=0.0)
    training = _digits(network, optimizer)
    training.before = lambda step: set_rate(optimizer, 0.0 if step >= 100 else 0.05)

    def after(step: int) -> None:
        for parameter in network.parameters():
            if parameter.grad is not None:
                parameter.grad *= rate ** min(max(step - ONSET, 0), 60)

    training.after = after
    return training


@sick(SLOW, "explosion")
def growth_with_a_flat_loss() -> Training:
    """A quarter more at each step."""
    return _growing(1.25)


@sick(SLOW, "explosion")
def slow_growth_with_a_flat_loss() -> Training:
    """Eight percent more at each step."""
    return _growing(1.08)


@sick(SLOW, "explosion", "nonfinite")
def range_test_gru() -> Training:
    """The rate grows by a tenth a step."""
    network = LanguageModel(nn.GRU)
    optimizer = adam(network, 3e-3)
    training = Training(network, optimizer, sequences(text(), 16, 30), cross_entropy(network))
    training.before = lambda step: set_rate(optimizer, 3e-3 * min(1.1 ** max(step - ONSET, 0), 1e5))
    return training


@sick(FROM_START, "explosion", "nonfinite", "update_ratio", onset=0)
def rate_too_high_text() -> Training:
    """A transformer at a thousand times its rate."""
    network = Transformer()
    return Training(network, adam(network, 1.0), sequences(text(), 16, 24), cross_entropy(network))


@sick(FROM_START, "explosion", "nonfinite", "update_ratio", onset=0)
def rate_too_high_residual() -> Training:
    """Residual blocks at a rate at which they diverge."""
    network = residual(4)
    return _digits(network, sgd(network, 0.2))


@sick(NONFINITE, "nonfinite")
def division_by_zero() -> Training:
    """A batch without variance is standardised."""
    network = mlp([30, 48, 2])
    draw = sampled(cancer(), 32)

    def batch(step: int) -> Batch:
        inputs, labels = draw(step)
        inputs = inputs[:1].repeat(32, 1) if step == ONSET else inputs
        return (inputs - inputs.mean(0)) / inputs.std(0), labels

    return Training(network, adam(network, 1e-3), batch, cross_entropy(network))


@sick(OVERFLOW, "overflow", "nonfinite")
def fp16_never_fits() -> Training:
    """The gradients pass 65,504 at any scale from one step on."""
    network = mlp([64, 64, 64, 10])
    training = _digits(network, adam(network, 1e-3))

    def after(step: int) -> None:
        if step >= ONSET:
            for parameter in network.parameters():
                if parameter.grad is not None:
                    parameter.grad *= torch.inf

    training.after = after
    training.scaler, training.autocast = GradScaler("cpu", init_scale=2.0**12), True
    return training


@sick(VANISHING, "vanishing", onset=0)
def deep_sigmoid_text() -> Training:
    """Eight layers of sigmoids over one embedded character."""
    network = nn.Sequential(nn.Embedding(96, 32), mlp([32] * 9 + [96], nn.Sigmoid))
    return Training(network, sgd(network, 0.1), sequences(text(), 16, 8), cross_entropy(network))


@sick(DEAD, "vanishing")
def fp16_underflow_for_good() -> Training:
    """All gradients are zero from one step on, while the loss is not."""
    network = mlp([64, 64, 64, 10])
    training = _digits(network, adam(network, 1e-3))

    def after(step: int) -> None:
        if step >= ONSET:
            for parameter in network.parameters():
                if parameter.grad is not None:
                    parameter.grad *= 0.0

    training.after = after
    return training


@sick(DEAD, "vanishing")
def dead_block_later() -> Training:
    """A layer's biases fall so low that no unit fires."""
    network = mlp([30, 48, 48, 48, 2])
    training = Training(network, adam(network, 1e-3), sampled(cancer(), 32), cross_entropy(network))

    def before(step: int) -> None:
        if step == ONSET:
            linears(network)[1].bias.data -= 1000.0

    training.before = before
    return training
