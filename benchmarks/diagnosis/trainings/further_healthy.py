"""Healthy trainings of kinds that no detection benchmark has; an alert is forced on each, and nothing is its cause."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.detection.trainings.base import Kind, Training
from benchmarks.detection.trainings.data import Batch, cancer, diabetes, digits, sampled, sequences, text
from benchmarks.detection.trainings.networks import LanguageModel, Transformer, adam, cross_entropy, mlp, sgd
from benchmarks.diagnosis.trainings.base import FURTHER_HEALTHY, Build


def healthy(build: Build) -> Build:
    """Register a training in which nothing is wrong."""
    FURTHER_HEALTHY[build.__name__] = Kind(build.__name__, build)
    return build


@healthy
def denoiser() -> Training:
    """Noise of all sizes, from batch to batch: gradients differ by far."""
    network = mlp([65, 96, 96, 64], nn.SiLU)

    def batch(step: int) -> Batch:
        clean = digits()[0][torch.randint(0, 1797, (32,))]
        level = torch.rand(1).expand(32, 1) ** 2
        noise = torch.randn_like(clean)
        return torch.cat([clean + 3 * level * noise, level], 1), noise

    return Training(network, adam(network, 1e-3), batch, lambda batch: F.mse_loss(network(batch[0]), batch[1]))


@healthy
def tied_autoencoder() -> Training:
    """The decoder is the encoder's weight, turned."""
    layer = nn.Linear(64, 24)

    def loss(batch: Batch) -> Tensor:
        return F.mse_loss(torch.sigmoid(layer(batch[0])) @ layer.weight, batch[0])

    return Training(layer, adam(layer, 3e-3), sampled(digits(), 32), loss)


@healthy
def siamese() -> Training:
    """Two views through one network, and a margin."""
    network = mlp([64, 64, 16])

    def loss(batch: Batch) -> Tensor:
        left, right = network(batch[0]), network(batch[0].roll(1, 0))
        same = (batch[1] == batch[1].roll(1, 0)).float()
        apart = F.pairwise_distance(left, right)
        return (same * apart.square() + (1 - same) * F.relu(1 - apart).square()).mean()

    return Training(network, adam(network, 1e-3), sampled(digits(), 32), loss)


@healthy
def two_losses_of_different_size() -> Training:
    """One of two heads counts a ten thousandth."""
    body, first, second = mlp([30, 32, 32]), nn.Linear(32, 2), nn.Linear(32, 30)
    network = nn.ModuleDict({"body": body, "first": first, "second": second})

    def loss(batch: Batch) -> Tensor:
        hidden = torch.relu(body(batch[0]))
        return F.cross_entropy(first(hidden), batch[1]) + 1e-4 * F.mse_loss(second(hidden), batch[0])

    return Training(network, adam(network, 1e-3), sampled(cancer(), 32), loss)


@healthy
def critic_of_a_moving_target() -> Training:
    """A value network that follows a slow copy of itself."""
    network, slow = mlp([10, 48, 1]), mlp([10, 48, 1])
    slow.load_state_dict(network.state_dict())
    slow.requires_grad_(requires_grad=False)

    def before(_: int) -> None:
        with torch.no_grad():
            for mine, other in zip(slow.parameters(), network.parameters(), strict=True):
                mine.lerp_(other, 0.05)

    def loss(batch: Batch) -> Tensor:
        target = batch[1] + 0.9 * slow(batch[0].roll(1, 0))
        return F.smooth_l1_loss(network(batch[0]), target)

    return Training(network, adam(network, 1e-3), sampled(diabetes(), 32), loss, before=before)


@healthy
def last_character_of_a_gru() -> Training:
    """Only the last character counts, and the sequences are short."""
    network = LanguageModel(nn.GRU)

    def loss(batch: Batch) -> Tensor:
        return F.cross_entropy(network(batch[0])[:, -1], batch[1][:, -1])

    return Training(network, adam(network, 2e-3), sequences(text(), 32, 12), loss)


@healthy
def transformer_with_dropped_tokens() -> Training:
    """Some tokens are replaced at random, and plain SGD."""
    network = Transformer()
    draw = sequences(text(), 16, 24)

    def batch(step: int) -> Batch:
        inputs, targets = draw(step)
        return torch.where(torch.rand(inputs.shape) < 0.15, torch.zeros_like(inputs), inputs), targets

    return Training(network, sgd(network, 0.05), batch, cross_entropy(network))


@healthy
def quantiles() -> Training:
    """A pinball loss, whose slope does not become smaller as the error does."""
    network = mlp([10, 48, 48, 3])
    levels = torch.tensor([0.1, 0.5, 0.9])

    def loss(batch: Batch) -> Tensor:
        error = batch[1] - network(batch[0])
        return torch.maximum(levels * error, (levels - 1) * error).mean()

    return Training(network, adam(network, 1e-3), sampled(diabetes(), 48), loss)
