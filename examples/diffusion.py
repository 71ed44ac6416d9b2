"""A small diffusion model whose loss divides by zero at one of a hundred noise levels.

The schedule begins without any noise, and the loss is weighted by the root of signal over noise. Only batches that draw
level 0 are damaged, and only by some rows; the guard names the division and the rows, and skips those steps. Run
`python examples/diffusion.py`: some seconds.
"""

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_gradguard import GradGuard, NonFinite

NUM_LEVELS = 100


class Denoiser(LightningModule):
    """Predicts the noise in a point of the plane.

    Args:
        least_noise: share of noise at level 0.
    """

    def __init__(self, least_noise: float = 0.0) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU(), nn.Linear(128, 2))
        self.register_buffer("share_of_noise", torch.linspace(least_noise, 0.99, NUM_LEVELS))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        (points,) = batch
        level = torch.randint(0, NUM_LEVELS, (len(points),))
        share = self.share_of_noise[level]
        noise = torch.randn_like(points)
        noisy = (1 - share).sqrt()[:, None] * points + share.sqrt()[:, None] * noise
        predicted = self.net(torch.cat([noisy, level[:, None] / NUM_LEVELS], dim=1))
        weights = ((1 - share) / share).sqrt()
        return (weights * (predicted - noise).square().mean(1)).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def main(least_noise: float = 0.0, num_steps: int = 400) -> GradGuard:
    """Train on two half moons."""
    seed_everything(0)
    angle = torch.pi * torch.rand(32 * num_steps)
    is_upper = torch.rand_like(angle) < 0.5
    moons = torch.stack([angle.cos() + ~is_upper, torch.where(is_upper, angle.sin(), 0.5 - angle.sin())], dim=1)
    guard = GradGuard(clip=1.0, nonfinite=NonFinite("skip", stop_after=None))
    trainer = Trainer(max_epochs=1, accelerator="cpu", callbacks=[guard], enable_checkpointing=False, logger=False)
    trainer.fit(Denoiser(least_noise), DataLoader(TensorDataset(moons), batch_size=32))
    print(f"least noise {least_noise}: {guard.num_steps} steps, {guard.num_skipped} skipped")
    return guard


if __name__ == "__main__":
    main()
    main(least_noise=1e-3)
