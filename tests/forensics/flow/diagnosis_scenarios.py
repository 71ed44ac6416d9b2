"""What happens on each rank: plain data back."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from test_investigation import QUIET
from torch import nn

from lightning_gradguard import GradGuard

NUM_BATCHES, BAD_BATCH, BAD_RANK, BAD_ROW = 30, 25, 1, 3


class Regression(LightningModule):
    """A small one."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))

    def training_step(self, batch, batch_idx):
        x, y = batch
        return nn.functional.mse_loss(self.net(x), y)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3, momentum=0.9)


def _batches(rank):
    for index in range(NUM_BATCHES):
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(100 * rank + index))
        y = x.sum(1, keepdim=True)
        if index == BAD_BATCH and rank == BAD_RANK:
            y[BAD_ROW] += 1000.0
        yield x, y


def play():
    """One sample of one rank is in another unit."""
    rank = torch.distributed.get_rank()
    guard = GradGuard(explosion="skip")
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            max_epochs=1,
            accelerator="cpu",
            devices=2,
            strategy=DDPStrategy(cluster_environment=LightningEnvironment()),
            callbacks=[guard],
            default_root_dir=folder,
            use_distributed_sampler=False,
            **QUIET,
        )
        trainer.fit(Regression(), torch.utils.data.DataLoader(list(_batches(rank)), batch_size=None))
        bundles = sorted(path.name for path in Path(trainer.log_dir).rglob("*.bundle.pt"))
        torch.distributed.barrier()
    culprit = guard.alerts[0].culprit
    return {"culprit": [culprit.cause, list(culprit.samples), culprit.rank], "alerts": len(guard.alerts), "bundles": bundles}
