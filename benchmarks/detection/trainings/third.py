"""A third set of unseen trainings, written before the last change of a detector, to judge that change by once."""

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
    conv_net,
    cross_entropy,
    linears,
    mlp,
    set_rate,
    sgd,
    squared_error,
)
from benchmarks.detection.trainings.nonfinite import NONFINITE, OVERFLOW
from benchmarks.detection.trainings.vanishing import DEAD, VANISHING


def _digits(network: nn.Module, optimizer: torch.optim.Optimizer, size: int = 32) -> Training:
    return Training(network, optimizer, sampled(digits(), size), cross_entropy(network))


def _text(network: nn.Module, optimizer: torch.optim.Optimizer) -> Training:
    return Training(network, optimizer, sequences(text(), 16, 24), cross_entropy(network))


def _multiply_gradients(network: nn.Module, factor: float) -> None:
    for parameter in network.parameters():
        if parameter.grad is not None:
            parameter.grad *= factor


@healthy
def nesterov_conv() -> Training:
    """Nesterov's momentum, and a rate that goes up and down once."""
    network = conv_net()
    optimizer = torch.optim.SGD(network.parameters(), 0.02, momentum=0.9, nesterov=True)
    training = _digits(network, optimizer)
    training.before = lambda step: set_rate(optimizer, 0.1 * min(step + 1, 301 - step) / 150)
    return training


@healthy
def modular_sum() -> Training:
    """Addition modulo 29 from large weights, with weight decay: the norm falls for long, and rises late."""
    size = 29
    network = nn.Sequential(nn.Embedding(size, 24), nn.Flatten(), nn.Linear(48, 128), nn.ReLU(), nn.Linear(128, size))
    for parameter in network.parameters():
        parameter.data *= 2.0
    first, second = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    pairs, sums = torch.stack([first.flatten(), second.flatten()], dim=1), (first + second).flatten() % size
    chosen = torch.randperm(len(pairs))[: len(pairs) * 6 // 10]
    batch = (pairs[chosen], sums[chosen])
    return Training(network, adam(network, 5e-3, weight_decay=1.0), lambda _: batch, cross_entropy(network))


@healthy
def plain_rnn_text() -> Training:
    """A recurrent net without gates, at a small rate."""
    network = LanguageModel(nn.RNN)
    return _text(network, adam(network, 2e-3))


@healthy
def distilled() -> Training:
    """A small network learns what a fixed larger one says of digits."""
    teacher, network = mlp([64, 128, 10]), mlp([64, 32, 10])
    for parameter in teacher.parameters():
        parameter.data *= 3.0

    def loss(batch: Batch) -> Tensor:
        with torch.no_grad():
            wanted = F.softmax(teacher(batch[0]), -1)
        return F.kl_div(F.log_softmax(network(batch[0]), -1), wanted, reduction="batchmean")

    return Training(network, adam(network, 2e-3), sampled(digits(), 32), loss)


@healthy
def hinge() -> Training:
    """A margin loss, whose gradient is exactly zero on a batch that is right."""
    network = mlp([30, 32, 2])
    training = Training(network, sgd(network, 0.02), sampled(cancer(), 8), cross_entropy(network))
    training.loss = lambda batch: F.multi_margin_loss(network(batch[0]), batch[1])
    return training


@healthy
def pairs_of_samples() -> Training:
    """Two samples a step."""
    network = mlp([10, 48, 1])
    return Training(network, adam(network, 1e-3), sampled(diabetes(), 2), squared_error(network))


@healthy
def adadelta_digits() -> Training:
    """Adadelta, whose steps begin tiny and grow."""
    network = mlp([64, 64, 10])
    return _digits(network, torch.optim.Adadelta(network.parameters(), 1.0))


@healthy
def nadam_text() -> Training:
    """NAdam on a transformer."""
    network = Transformer()
    return _text(network, torch.optim.NAdam(network.parameters(), 2e-3))


@healthy
def sign_descent() -> Training:
    """Each element moves by the same small step."""
    network = mlp([64, 64, 10])
    optimizer = sgd(network, 1e-3, momentum=0.0)
    training = _digits(network, optimizer)

    def after(step: int) -> None:
        for parameter in network.parameters():
            if parameter.grad is not None:
                parameter.grad.sign_()

    training.after = after
    return training


@healthy
def penalty_sets_in() -> Training:
    """The weight of a penalty rises from nothing to one over 200 steps, as the divergence of a variational autoencoder."""
    encoder, decoder = nn.Linear(64, 16), nn.Linear(8, 64)
    network = nn.ModuleList([encoder, decoder])
    weight = [0.0]

    def loss(batch: Batch) -> Tensor:
        mean, log_variance = encoder(batch[0]).chunk(2, -1)
        code = mean + torch.randn_like(mean) * (0.5 * log_variance).exp()
        divergence = 0.5 * (mean.square() + log_variance.exp() - log_variance - 1.0).sum(-1).mean()
        return F.mse_loss(decoder(code), batch[0], reduction="sum") / len(batch[0]) + weight[0] * divergence

    training = Training(network, adam(network, 3e-3), sampled(digits(), 32), loss)

    def before(step: int) -> None:
        weight[0] = min(step / 200, 1.0)

    training.before = before
    return training


@healthy
def side_branch_never_used() -> Training:
    """Two branches of which a fixed gate lets through one."""

    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gates = nn.Buffer(torch.tensor([1.0, 0.0]))
            self.stem, self.branches, self.head = (
                nn.Linear(64, 48), nn.ModuleList([mlp([48, 48, 48]), mlp([48, 48, 48])]), nn.Linear(48, 10),
            )  # fmt: skip

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.stem(x))
            return self.head(sum(gate * branch(x) for gate, branch in zip(self.gates, self.branches, strict=True)))

    network = Gated()
    return _digits(network, adam(network, 1e-3))


@sick(SUDDEN, "explosion")
def summed_once() -> Training:
    """The loss of one batch is summed instead of averaged."""
    network = Transformer()
    training = _text(network, adam(network, 1e-3))
    mean = training.loss
    is_bad = [False]

    def before(step: int) -> None:
        is_bad[0] = step == ONSET

    training.before = before
    training.loss = lambda batch: mean(batch) * (batch[1].numel() if is_bad[0] else 1)
    return training


@sick(SUDDEN, "explosion")
def raw_targets() -> Training:
    """The targets of one batch were not standardised."""
    network = mlp([10, 64, 64, 1])
    draw = sampled(diabetes(), 32)

    def batch(step: int) -> Batch:
        inputs, targets = draw(step)
        return inputs, targets * 77.0 + 152.0 if step == ONSET else targets

    return Training(network, adam(network, 1e-3), batch, squared_error(network))


@sick(SUDDEN, "explosion", "nonfinite")
def corrupted_matrix() -> Training:
    """A matrix in the middle of a plain net becomes 200 times as large."""
    network = mlp([64, 64, 64, 64, 10])
    training = _digits(network, adam(network, 1e-3))

    def before(step: int) -> None:
        if step == ONSET:
            linears(network)[1].weight.data *= 200.0

    training.before = before
    return training


@sick(SLOW, "explosion", "nonfinite")
def range_test_conv() -> Training:
    """The rate grows by eight percent a step; there is no normalisation to hold it."""
    network = nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip
    optimizer = adam(network, 2e-3)
    training = _digits(network, optimizer)
    training.before = lambda step: set_rate(optimizer, 2e-3 * min(1.08 ** max(step - ONSET, 0), 1e5))
    return training


@sick(SLOW, "explosion", "nonfinite")
def ascent_autoencoder() -> Training:
    """The sign of the rate is wrong from one step on."""
    network = mlp([64, 32, 8, 32, 64])
    training = Training(network, sgd(network, 0.2), sampled(digits(), 32), cross_entropy(network))
    training.loss = lambda batch: F.mse_loss(network(batch[0]), batch[0])

    def after(step: int) -> None:
        if step >= ONSET:
            _multiply_gradients(network, -1.0)

    training.after = after
    return training


@sick(SLOW, "explosion")
def growth_at_a_tiny_rate() -> Training:
    """The gradients of a transformer grow by 15 percent a step while a tiny rate keeps the loss where it is."""
    network = Transformer()
    optimizer = sgd(network, 0.05, momentum=0.0)
    training = _text(network, optimizer)
    training.before = lambda step: set_rate(optimizer, 1e-12 if step >= 60 else 0.05)
    training.after = lambda step: _multiply_gradients(network, 1.15 ** min(max(step - ONSET, 0), 70))
    return training


@sick(FROM_START, "explosion", "nonfinite", "update_ratio", onset=0)
def rate_too_high_tanh() -> Training:
    """A plain net that saturates at a thousand times its rate."""
    network = mlp([64, 64, 64, 10], nn.Tanh)
    return _digits(network, adam(network, 1.0))


@sick(FROM_START, "explosion", "nonfinite", "update_ratio", onset=0)
def rate_too_high_rnn() -> Training:
    """A recurrent net at a thousand times its rate."""
    network = LanguageModel(nn.GRU)
    return _text(network, adam(network, 3.0))


@sick(NONFINITE, "nonfinite")
def missing_target() -> Training:
    """One target is NaN, as a table has it where nothing was measured."""
    network = mlp([10, 48, 1])
    draw = sampled(diabetes(), 32)

    def batch(step: int) -> Batch:
        inputs, targets = draw(step)
        if step == ONSET:
            targets[3] = torch.nan
        return inputs, targets

    return Training(network, adam(network, 1e-3), batch, squared_error(network))


@sick(OVERFLOW, "overflow", "nonfinite")
def fp16_inputs_too_large() -> Training:
    """From one step on the inputs pass what fp16 can hold."""
    network = mlp([64, 64, 64, 10])
    training = _digits(network, adam(network, 1e-3))
    draw = training.batch
    training.batch = lambda step: scaled(draw(step), 1e7 if step >= ONSET else 1.0)
    training.scaler, training.autocast = GradScaler("cpu", init_scale=2.0**10), True
    return training


@sick(VANISHING, "vanishing", onset=0)
def deep_softsign() -> Training:
    """Twelve layers with small weights."""
    network = mlp([64] + [40] * 11 + [10], nn.Softsign)
    for layer in linears(network):
        layer.weight.data *= 0.6
    return _digits(network, sgd(network, 0.05))


@sick(DEAD, "vanishing")
def gate_closes() -> Training:
    """The gate of a branch that has learned is shut from one step on."""

    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.branch, self.head = nn.Linear(64, 48), mlp([48, 48, 48]), nn.Linear(48, 10)
            self.gate = nn.Buffer(torch.tensor(1.0))

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.stem(x))
            return self.head(x + self.gate * self.branch(x))

    network = Gated()
    training = _digits(network, adam(network, 1e-3))

    def before(step: int) -> None:
        if step == ONSET:
            network.gate.fill_(0.0)

    training.before = before
    return training


@sick(DEAD, "vanishing")
def dead_recurrent_input() -> Training:
    """The embedding of a language model is wiped out on its way in from one step on."""

    class Wiped(LanguageModel):
        gain = 1.0

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(self.rnn(self.gain * self.embed(tokens))[0])

    network = Wiped()
    training = _text(network, adam(network, 3e-3))

    def before(step: int) -> None:
        network.gain = 0.0 if step >= ONSET else 1.0

    training.before = before
    return training
