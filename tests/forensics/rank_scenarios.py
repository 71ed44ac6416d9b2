"""What happens on each rank: plain data back."""

from __future__ import annotations

import tempfile

import torch
import zoo
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from test_investigation import QUIET, Fails
from test_no_trace import Replays
from torch.distributed.fsdp import fully_shard

from lightning_gradguard import GradGuard

BAD_BATCH, BAD_RANK = 2, 1


class Spread(Fails):
    """Fails on one rank."""

    def __init__(self, mode):
        super().__init__()
        self.mode = mode

    def configure_model(self):
        if self.mode == "fsdp2":
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch, batch_idx):
        if self.mode == "gathers":
            self.all_gather(batch[0].sum())
        return super().training_step(batch, batch_idx)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def _batches(rank, bad):
    for index in range(5):
        x = torch.randn(zoo.BATCH, zoo.WIDTH, generator=torch.Generator().manual_seed(10 * rank + index))
        if bad and index == BAD_BATCH and rank == BAD_RANK:
            x[3] = 0.0
        yield x, torch.ones(zoo.BATCH, 1)


def _fit(mode, guard, rank, *, bad, **settings):
    torch.manual_seed(rank)
    module = Spread(mode)
    for number, parameter in enumerate(module.parameters()):
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(number))
    where = LightningEnvironment()
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1) if mode == "fsdp2" else DDPStrategy()
    strategy.cluster_environment = where
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            max_epochs=1,
            accelerator="cpu",
            devices=2,
            strategy=strategy,
            callbacks=[guard],
            default_root_dir=folder,
            use_distributed_sampler=False,
            **QUIET,
            **settings,
        )
        trainer.fit(module, torch.utils.data.DataLoader(list(_batches(rank, bad)), batch_size=None))
    return [getattr(it, "_local_tensor", it).tolist() for it in module.state_dict().values()]


def play():
    """All scenarios on this rank."""
    rank = torch.distributed.get_rank()
    found = {}
    for mode in ("ddp", "gathers", "fsdp2"):
        guard = GradGuard()
        weights = _fit(mode, guard, rank, bad=True)
        without = _fit(mode, GradGuard(max_replays=0), rank, bad=True)
        alert = guard.alerts[0]
        culprit = alert.culprit
        found[mode] = {
            "culprit": culprit and [culprit.phase, culprit.module, culprit.op, culprit.samples, culprit.rank],
            "reproduced": culprit and [culprit.reproduced, culprit.error],
            "message": alert.message,
            "leaves_no_trace": weights == without,
        }
    guard = Replays()
    found["torture"] = {
        "leaves_no_trace": _fit("ddp", guard, rank, bad=False) == _fit("ddp", GradGuard(max_replays=0), rank, bad=False),
        "number": len(guard.outcomes),
    }
    return found
