"""Trainings that learn, some of them looking odd while they do."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.nn import functional as F

from benchmarks.detection.trainings.base import STEPS, Training, healthy
from benchmarks.detection.trainings.data import Batch, cancer, diabetes, digits, sampled, sequences, text, words
from benchmarks.detection.trainings.networks import (
    ConvBlock,
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


def _digits(network: nn.Module, optimizer: torch.optim.Optimizer, size: int = 64) -> Training:
    return Training(network, optimizer, sampled(digits(), size), cross_entropy(network))


@healthy
def mlp_adam() -> Training:
    """Digits, Adam."""
    network = mlp([64, 64, 64, 10])
    return _digits(network, adam(network, 1e-3))


@healthy
def mlp_momentum() -> Training:
    """Cell samples, SGD with momentum."""
    network = mlp([30, 64, 64, 64, 2])
    return Training(network, sgd(network, 0.05), sampled(cancer(), 32), cross_entropy(network))


@healthy
def conv_sgd() -> Training:
    """Convolutions with BatchNorm."""
    network = conv_net()
    return _digits(network, sgd(network, 0.05), 32)


@healthy
def conv_residual() -> Training:
    """Residual convolutions with BatchNorm."""
    stem = nn.Sequential(nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 8, 3, padding=1))
    network = nn.Sequential(stem, *(ConvBlock(8) for _ in range(3)), nn.AvgPool2d(4), nn.Flatten(), nn.Linear(32, 10))
    return _digits(network, adam(network, 2e-3), 32)


@healthy
def residual_adamw() -> Training:
    """Eight residual blocks with LayerNorm."""
    network = residual(8)
    return _digits(network, adam(network, 1e-3))


@healthy
def lstm_text() -> Training:
    """Next character."""
    network = LanguageModel()
    return Training(network, adam(network, 5e-3), sequences(text(), 16, 24), cross_entropy(network))


@healthy
def transformer_warmup() -> Training:
    """Next character, with a warm-up of 60 steps."""
    network = Transformer()
    optimizer = adam(network, 1e-5)
    training = Training(network, optimizer, sequences(text(), 16, 24), cross_entropy(network))
    training.before = lambda step: set_rate(optimizer, 3e-3 * min(1.0, (step + 1) / 60))
    return training


@healthy
def transformer_cosine() -> Training:
    """Next word, hashed to 96 numbers; short warm-up, then a cosine."""
    network = Transformer(depth=3)
    optimizer = adam(network, 2e-3)
    training = Training(network, optimizer, sequences(words(), 16, 24), lambda batch: _words_loss(network, batch))
    training.before = lambda step: set_rate(
        optimizer, 2e-3 * min(1.0, (step + 1) / 20) * 0.5 * (1 + math.cos(math.pi * step / STEPS))
    )
    return training


def _words_loss(network: nn.Module, batch: Batch) -> Tensor:
    inputs, targets = (tokens % 96 for tokens in batch)
    return F.cross_entropy(network(inputs).flatten(0, -2), targets.flatten())


@healthy
def gan() -> Training:
    """The generator's side; the discriminator trains before each of its steps."""
    generator = mlp([16, 48, 48, 64])
    critic = nn.Sequential(nn.Linear(64, 48), nn.LeakyReLU(0.2), nn.Linear(48, 48), nn.LeakyReLU(0.2), nn.Linear(48, 1))
    its_optimizer = torch.optim.Adam(critic.parameters(), 1e-3, betas=(0.5, 0.9))
    images = sampled(digits(), 64)

    def before(step: int) -> None:
        fake = generator(torch.randn(64, 16)).detach()
        its_optimizer.zero_grad()
        (F.softplus(-critic(images(step)[0])).mean() + F.softplus(critic(fake)).mean()).backward()
        its_optimizer.step()

    return Training(
        generator,
        torch.optim.Adam(generator.parameters(), 1e-3, betas=(0.5, 0.9)),
        lambda _: torch.randn(64, 16),
        lambda noise: F.softplus(-critic(generator(noise))).mean(),
        before=before,
    )


@healthy
def autoencoder() -> Training:
    """Digits through eight numbers."""
    network = mlp([64, 48, 24, 8, 24, 48, 64], nn.Tanh)
    images = sampled(digits(), 64)
    return Training(network, adam(network, 2e-3), lambda step: (images(step)[0],) * 2, squared_error(network))


@healthy
def finetune_frozen() -> Training:
    """The first layers of a trained network stay as they are."""
    network = mlp([64, 64, 64, 64, 10])
    _train(network, 150)
    for layer in linears(network)[:2]:
        layer.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], 3e-4)
    return _digits(network, optimizer, 32)


@healthy
def large_batch() -> Training:
    """More than half of the data in each batch."""
    network = mlp([64, 64, 64, 10])
    return _digits(network, sgd(network, 0.1), 1_024)


@healthy
def small_batch() -> Training:
    """Four images in each batch."""
    network = mlp([64, 64, 64, 10])
    return _digits(network, adam(network, 1e-3), 4)


@healthy
def high_rate() -> Training:
    """High, but it learns."""
    network = mlp([64, 64, 64, 10])
    return _digits(network, adam(network, 2e-2), 32)


@healthy
def summed_loss() -> Training:
    """Gradients in the thousands."""
    network = mlp([10, 64, 64, 1])
    return Training(
        network,
        adam(network, 2e-3),
        sampled(diabetes(), 128),
        lambda batch: 100 * F.mse_loss(network(batch[0]), batch[1], reduction="sum"),
    )


@healthy
def heavy_tail() -> Training:
    """Targets with Cauchy noise, under a loss that is made for them."""
    network = mlp([10, 64, 64, 1])
    draw = sampled(diabetes(), 64)

    def batch(step: int) -> Batch:
        inputs, targets = draw(step)
        return inputs, targets + torch.empty_like(targets).cauchy_(0, 0.3)

    return Training(network, adam(network, 2e-3), batch, lambda batch: F.huber_loss(network(batch[0]), batch[1]))


@healthy
def mixed_precision() -> Training:
    """The scale starts too high and is found by overflows."""
    network = mlp([64, 64, 64, 10])
    training = _digits(network, adam(network, 1e-3))
    training.scaler = GradScaler("cpu", init_scale=2.0**22, growth_interval=60)
    training.autocast = True
    return training


@healthy
def label_noise() -> Training:
    """A third of the labels is random."""
    network = mlp([64, 64, 64, 10])
    draw = sampled(digits(), 32)

    def batch(step: int) -> Batch:
        inputs, targets = draw(step)
        return inputs, torch.where(torch.rand(len(targets)) < 0.3, torch.randint(10, targets.shape), targets)

    return Training(network, adam(network, 2e-3), batch, cross_entropy(network))


@healthy
def curriculum() -> Training:
    """Two digits first, then all ten."""
    network = mlp([64, 64, 64, 10])
    inputs, targets = digits()
    easy = sampled((inputs[targets < 2], targets[targets < 2]), 32)
    everything = sampled(digits(), 32)
    return Training(
        network,
        adam(network, 1e-3),
        lambda step: easy(step) if step < 60 else everything(step),
        cross_entropy(network),
    )


@healthy
def embedding_sparse() -> Training:
    """Each batch touches a few of 2,000 words."""
    network = nn.Sequential(nn.EmbeddingBag(2_000, 24), nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 50))

    def loss(batch: Batch) -> Tensor:
        return F.cross_entropy(network(batch[0]), batch[1][:, -1] % 50)

    return Training(network, adam(network, 1e-2), sequences(words(), 64, 4), loss)


@healthy
def lr_restarts() -> Training:
    """Cosine decay that starts again every hundred steps, from a high rate."""
    network = mlp([64, 64, 64, 10])
    optimizer = sgd(network, 0.2)
    training = _digits(network, optimizer, 32)
    training.before = lambda step: set_rate(optimizer, 0.2 * 0.5 * (1 + math.cos(math.pi * (step % 100) / 100)) + 1e-4)
    return training


@healthy
def deep_tanh() -> Training:
    """Ten layers, initialised as they should be."""
    network = mlp([64] + [40] * 9 + [10], nn.Tanh)
    for layer in linears(network):
        nn.init.xavier_normal_(layer.weight, nn.init.calculate_gain("tanh"))
    return _digits(network, adam(network, 1e-3))


@healthy
def multi_task() -> Training:
    """Two heads that take turns; the one at rest has a gradient of zero."""
    trunk, heads = mlp([64, 48, 48]), nn.ModuleList([nn.Linear(48, 10), nn.Linear(48, 2)])
    network = nn.ModuleDict({"trunk": trunk, "heads": heads})
    draw = sampled(digits(), 32)

    def loss(batch: tuple[int, Batch]) -> Tensor:
        step, (inputs, targets) = batch
        hidden = torch.relu(trunk(inputs))
        first = F.cross_entropy(heads[0](hidden), targets)
        second = F.cross_entropy(heads[1](hidden), targets % 2)
        return first * (step % 8 < 6) + second * (step % 8 >= 6)

    return Training(network, adam(network, 1e-3), lambda step: (step, draw(step)), loss)


@healthy
def converged() -> Training:
    """Goes on long after there is nothing left to learn: gradients small and noisy."""
    network = mlp([64, 64, 64, 10])
    _train(network, 400, rate=5e-3)
    return _digits(network, adam(network, 1e-4), 32)


@healthy
def late_start() -> Training:
    """A plateau first; then the norm climbs tenfold as it starts to learn."""
    network = mlp([64] + [48] * 4 + [10], nn.Tanh)
    for layer in linears(network):
        layer.weight.data *= 0.6
    return _digits(network, sgd(network, 0.02), 64)


@healthy
def late_relu() -> Training:
    """Ten layers that start to learn late; then all norms climb, some layers' faster than others'."""
    network = mlp([64] * 10 + [10])
    return _digits(network, torch.optim.Adam(network.parameters(), 1e-3), 32)


@healthy
def zero_branches() -> Training:
    """Residual blocks whose last layers begin at zero, so that no gradient reaches what lies before them at first."""
    network = residual(6)
    for block in network[1:-1]:
        nn.init.zeros_(linears(block)[-1].weight)
    return _digits(network, adam(network, 1e-3), 32)


@healthy
def zero_kernels() -> Training:
    """All weights begin at zero, but biases and BatchNorm don't: it learns all the same."""
    network = conv_net()
    for module in network.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            nn.init.zeros_(module.weight)
    return _digits(network, adam(network, 1e-3), 32)


@healthy
def policy_gradient() -> Training:
    """A bandit whose context is a digit."""
    network = mlp([64, 48, 10], nn.Tanh)

    def loss(batch: Batch) -> Tensor:
        chosen = torch.distributions.Categorical(logits=network(batch[0]))
        action = chosen.sample()
        reward = (action == batch[1]).float() * 5 - 0.5
        return -(reward * chosen.log_prob(action)).mean()

    return Training(network, adam(network, 3e-3), sampled(digits(), 32), loss)


@healthy
def mixture_of_experts() -> Training:
    """Two of four experts for each image."""
    gate, experts = nn.Linear(64, 4), nn.ModuleList(mlp([64, 24, 10]) for _ in range(4))
    network = nn.ModuleDict({"gate": gate, "experts": experts})

    def loss(batch: Batch) -> Tensor:
        scores = gate(batch[0])
        kept = scores.topk(2).indices
        weights = F.softmax(scores.masked_fill(torch.ones_like(scores).scatter(1, kept, 0.0).bool(), -torch.inf), 1)
        outputs = torch.stack([expert(batch[0]) for expert in experts], 1)
        balance = 4 * (F.softmax(scores, 1).mean(0) ** 2).sum()
        return F.cross_entropy((weights[:, :, None] * outputs).sum(1), batch[1]) + 0.1 * balance

    return Training(network, adam(network, 2e-3), sampled(digits(), 32), loss)


@healthy
def rare_class() -> Training:
    """One class in thirty samples; a batch that has one pulls hard."""
    network = mlp([64, 64, 64, 2])
    inputs, targets = digits()
    is_rare = (targets == 8) & (torch.arange(len(targets)) % 3 == 0)
    keep = is_rare | (targets != 8)
    return Training(network, adam(network, 1e-3), sampled((inputs[keep], is_rare[keep].long()), 24), cross_entropy(network))


def _train(network: nn.Module, steps: int, rate: float = 3e-3) -> None:
    """Ahead of the training that counts."""
    optimizer, draw, loss = adam(network, rate), sampled(digits(), 128), cross_entropy(network)
    for step in range(steps):
        optimizer.zero_grad()
        loss(draw(step)).backward()
        optimizer.step()
