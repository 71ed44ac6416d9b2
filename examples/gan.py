"""A GAN on a ring of points, whose generator stops learning: the discriminator wins, and the loss passes nothing back.

With the generator's loss of the first GANs, log(1 - D(G(z))), a discriminator that is sure has no gradient for the
generator. The guard says which of the two optimizers it is, and that it is the loss. With -log(D(G(z))) it has one. Run
`python examples/gan.py`: some seconds.
"""

import math

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.nn.functional import logsigmoid
from torch.utils.data import DataLoader, TensorDataset

from lightning_gradguard import GradGuard, Vanishing


def mlp(num_in: int, num_out: int) -> nn.Sequential:
    """Two hidden layers."""
    return nn.Sequential(nn.Linear(num_in, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, num_out))


class Gan(LightningModule):
    """Two networks, two optimizers.

    Args:
        saturating: whether the generator's loss is log(1 - D(G(z))) instead of -log(D(G(z))).
    """

    def __init__(self, *, saturating: bool) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator, self.discriminator = mlp(8, 2), mlp(2, 1)
        self.saturating = saturating

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        for_generator, for_discriminator = self.optimizers()
        real = batch[0]

        fake = self.generator(torch.randn(len(real), 8)).detach()
        loss = -logsigmoid(self.discriminator(real)).mean() - logsigmoid(-self.discriminator(fake)).mean()
        for_discriminator.zero_grad()
        self.manual_backward(loss)
        for_discriminator.step()

        logits = self.discriminator(self.generator(torch.randn(len(real), 8)))
        loss = logsigmoid(-logits).mean() if self.saturating else -logsigmoid(logits).mean()
        for_generator.zero_grad()
        self.manual_backward(loss)
        for_generator.step()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        generator = torch.optim.Adam(self.generator.parameters(), lr=1e-4)
        return [generator, torch.optim.Adam(self.discriminator.parameters(), lr=2e-2)]


def main(*, saturating: bool, num_steps: int = 150) -> GradGuard:
    """Train on a ring of radius 3."""
    seed_everything(0)
    angle = 2 * math.pi * torch.rand(64 * num_steps)
    ring = 3 * torch.stack([angle.cos(), angle.sin()], dim=1)
    # Of a generator less than a millionth is nothing; by default it would have to be 1e-12. Norms of a GAN go up and down.
    guard = GradGuard(explosion=None, vanishing=Vanishing("warn", min_norm=1e-6))
    trainer = Trainer(max_epochs=1, accelerator="cpu", callbacks=[guard], enable_checkpointing=False, logger=False)
    trainer.fit(Gan(saturating=saturating), DataLoader(TensorDataset(ring), batch_size=64))
    name = "log(1 - D)" if saturating else "-log(D)"
    norm = guard.last.measurement.global_norm
    print(f"{name}: {guard.num_steps} steps, alerts: {len(guard.alerts)}, last norm {norm:.1e}")
    return guard


if __name__ == "__main__":
    main(saturating=True)
    main(saturating=False)
