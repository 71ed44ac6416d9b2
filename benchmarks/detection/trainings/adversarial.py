"""Two trainings that rules were made for, so they are tuning material: a generator that has lost, and a rare branch."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.detection.trainings.base import Training, healthy, sick
from benchmarks.detection.trainings.data import digits, sampled
from benchmarks.detection.trainings.networks import adam, mlp
from benchmarks.detection.trainings.vanishing import DEAD


@sick(DEAD, "vanishing", onset=20)
def discriminator_wins() -> Training:
    """The generator of a GAN with the saturating loss; the discriminator takes five steps at ten times its rate."""
    generator = mlp([16, 48, 48, 64])
    critic = nn.Sequential(nn.Linear(64, 48), nn.LeakyReLU(0.2), nn.Linear(48, 48), nn.LeakyReLU(0.2), nn.Linear(48, 1))
    its_optimizer = torch.optim.Adam(critic.parameters(), 1e-2, betas=(0.5, 0.9))
    images = sampled(digits(), 64)

    def before(step: int) -> None:
        for _ in range(5):
            fake = generator(torch.randn(64, 16)).detach()
            its_optimizer.zero_grad()
            (F.softplus(-critic(images(step)[0])).mean() + F.softplus(critic(fake)).mean()).backward()
            its_optimizer.step()

    return Training(
        generator,
        torch.optim.Adam(generator.parameters(), 1e-3, betas=(0.5, 0.9)),
        lambda _: torch.randn(64, 16),
        lambda noise: -F.softplus(critic(generator(noise))).mean(),
        before=before,
    )


class _WithRareBranch(nn.Module):
    """A second body for what one batch in twenty holds."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.rare, self.head = mlp([64, 48, 48]), mlp([64, 48, 48]), nn.Linear(48, 10)

    def forward(self, inputs: torch.Tensor, *, is_rare: bool) -> torch.Tensor:
        hidden = F.relu(self.body(inputs) + (1.0 if is_rare else 0.0) * self.rare(inputs))
        logits: torch.Tensor = self.head(hidden)
        return logits


@healthy
def rare_branch() -> Training:
    """A branch whose output counts in one batch of twenty, so that its gradient is zero in the others."""
    network, batch = _WithRareBranch(), sampled(digits(), 32)
    return Training(
        network,
        adam(network, 1e-3),
        lambda step: (*batch(step), bool(torch.rand(()) < 0.05)),
        lambda it: F.cross_entropy(network(it[0], is_rare=it[2]), it[1]),
    )
