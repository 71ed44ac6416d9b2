"""Training steps under DDP that end in an exception on some ranks: what each rank makes of it, as plain data."""

from __future__ import annotations

import json
import os
import time
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import raisers
import torch
from fsdp1 import CPUStrategy
from lightning_package import DDPStrategy, LightningEnvironment, LightningModule, ModelParallelStrategy, Trainer
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.utils.data import DataLoader

from lightning_gradguard import GradGuard
from lightning_gradguard.trainer import rank_messages

NUM_BATCHES, BAD_BATCH, ROW = 5, 2, 3


class Raising(LightningModule):
    """Outputs are the mean of a normal distribution, which torch refuses to be NaN."""

    def __init__(
        self, *, gathers: bool = False, own: bool = False, is_root: bool = False, is_unrelated: bool = False
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2))
        self.gathers = gathers
        self.own = own
        self.is_root = is_root
        self.is_unrelated = is_unrelated

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Negative log-likelihood of zeros."""
        if self.is_unrelated and batch_idx == BAD_BATCH:
            raise KeyError("mask")
        h = self.net(batch)
        if self.gathers:
            h = h + 0.01 * self.all_gather(h.nan_to_num()).mean()
        if self.own and bool(h.isnan().any()):
            raise ValueError("it is NaN, says the user")
        if self.is_root:  # whose slope at 0 is infinite
            return (self.net(batch.nan_to_num()) * batch.isfinite().all(1, keepdim=True)).square().sqrt().mean()
        return -torch.distributions.Normal(h, 1.0).log_prob(torch.zeros_like(h)).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """With momentum."""
        return torch.optim.Adam(self.parameters(), lr=0.01)


class Sharded(Raising):
    """Its net is spread over the ranks."""

    def __init__(self, mode: str, **settings: Any) -> None:
        super().__init__(**settings)
        self.mode = mode

    def configure_model(self) -> None:
        """By DTensors."""
        if self.mode == "tp":
            parallelize_module(self.net, self.device_mesh["tensor_parallel"], {"3": ColwiseParallel()})
        else:
            fully_shard(self.net[0], mesh=self.device_mesh["data_parallel"])
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])


class Anomalous(Raising):
    """Its gradient is NaN below the first layer, or above all layers; a detector raises in the backward pass.

    Args:
        is_at_top: whether no parameter has a gradient by then.
    """

    def __init__(self, *, is_at_top: bool = False) -> None:
        super().__init__()
        self.is_at_top = is_at_top

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """The root of 0 has no finite slope."""
        h = self.net[0](batch.nan_to_num())
        if self.is_at_top:
            return (self.net[1:](h) * batch[:, 1:2]).mean()
        is_whole = batch.isfinite().all(1, keepdim=True)
        return self.net[1:]((h * is_whole).square().sqrt()).mean()


class Partial(Raising):
    """One of its layers takes no part in a step."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.unused = nn.Linear(2, 2)


def _batches(*, bad: bool) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1 + distributed.get_rank())
    batches = [torch.randn(8, 6, generator=generator) for _ in range(NUM_BATCHES)]
    if bad:
        batches[BAD_BATCH][ROW, 1] = torch.nan
    return batches


def _ddp(**settings: Any) -> DDPStrategy:
    return DDPStrategy(process_group_backend="gloo", **settings)


def _model_parallel(data: int = 1, tensor: int = 1) -> ModelParallelStrategy:
    return ModelParallelStrategy(data_parallel_size=data, tensor_parallel_size=tensor, process_group_backend="gloo")


def _trainer(guard: GradGuard, root: str, **settings: Any) -> Trainer:
    return Trainer(
        accelerator="cpu",
        devices=distributed.get_world_size(),
        plugins=[LightningEnvironment()],
        callbacks=[guard],
        max_epochs=1,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=root,
        **{"strategy": _ddp()} | settings,
    )


def fit(root: str, *, bad: bool, guard: GradGuard | None = None, module: Any = None, **settings: Any) -> dict[str, Any]:
    """Train, and say what came of it."""
    guard, module, error = guard or GradGuard(), module or Raising(), None
    trainer = _trainer(guard, root, **settings)
    try:
        trainer.fit(module, DataLoader(_batches(bad=bad), batch_size=None))
    except Exception as caught:  # noqa: BLE001 - it is the finding
        error = caught
    return {
        "steps": trainer.global_step,
        "skipped": guard.num_skipped,
        "alerts": [
            [it.kind, it.step, it.batch_idx, it.rank, it.culprit and it.culprit.rank, it.message] for it in guard.alerts
        ],
        "rows": [list(it.culprit.samples or it.culprit.probable_samples or ()) for it in guard.alerts if it.culprit],
        "error": None if error is None else type(error).__name__,
        "notes": getattr(error, "__notes__", []),
        "weights": sum(float(it.double().sum()) for it in module.parameters()),
        "buffers_are_finite": all(bool(it.isfinite().all()) for it in module.buffers()),
    }


def all_raise(root: str) -> dict[str, Any]:
    """The same on each rank: fits that go on, and one that ends."""
    rank_messages.SECONDS_TO_RAISE = 20.0
    return {
        "torch": fit(root, bad=True),
        "accumulated": fit(root, bad=True, accumulate_grad_batches=2),
        "backward": fit(root, bad=True, module=Anomalous(), detect_anomaly=True),
        "top": fit(root, bad=True, module=Anomalous(is_at_top=True), detect_anomaly=True),
        "own": fit(root, bad=True, module=Raising(own=True)),
        "healthy": fit(root, bad=False),
    }


def elsewhere(root: str) -> dict[str, Any]:
    """The same on each rank, where nobody can run a step alone as it is."""
    rank_messages.SECONDS_TO_RAISE = 20.0
    cells: dict[str, dict[str, Any]] = {
        "unused": {"module": Partial(), "strategy": _ddp(find_unused_parameters=True)},
        "unused, backward": {
            "module": Partial(is_root=True),
            "strategy": _ddp(find_unused_parameters=True),
            "detect_anomaly": True,
        },
        "static": {"module": Raising(), "strategy": _ddp(static_graph=True)},
        "fsdp2": {"module": Sharded("fsdp2"), "strategy": _model_parallel(data=2)},
        "fsdp2, own": {"module": Sharded("fsdp2", own=True), "strategy": _model_parallel(data=2)},
        "fsdp2, backward": {
            "module": Sharded("fsdp2", is_root=True),
            "strategy": _model_parallel(data=2),
            "detect_anomaly": True,
        },
        "fsdp2, unrelated": {"module": Sharded("fsdp2", is_unrelated=True), "strategy": _model_parallel(data=2)},
        "tp": {"module": Sharded("tp"), "strategy": _model_parallel(tensor=2)},
        "fsdp1": {"module": Raising(), "strategy": CPUStrategy(process_group_backend="gloo")},
    }
    return {name: fit(f"{root}/{name}", bad=True, **cell) for name, cell in cells.items()}


def every_kind(root: str) -> dict[str, Any]:
    """The same on each rank: each kind of step that does not bear NaN."""
    rank_messages.SECONDS_TO_RAISE = 20.0
    ends = {**raisers.BY_TORCH, **raisers.BY_OTHERS}
    return {name: fit(f"{root}/{name}", bad=True, module=raisers.Raising(end)) for name, end in ends.items()}


def alone(rank: int, bad_rank: int, port: int, folder: str, cell: str) -> None:
    """One rank raises; a process of its own, which ends as a user's does."""
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank}
    os.environ |= {name: str(value) for name, value in place.items()} | {"NODE_RANK": "0"}
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    distributed.init_process_group("gloo", timeout=timedelta(seconds=120))
    rank_messages.SECONDS_TO_RAISE = 1.0
    cells: dict[str, dict[str, Any]] = {
        "forward": {},
        "gathers": {"module": Raising(gathers=True)},
        "backward": {"module": Anomalous(), "detect_anomaly": True},
        "fsdp2": {"module": Sharded("fsdp2"), "strategy": _model_parallel(data=2)},
    }
    begun = time.monotonic()
    found = fit(folder, bad=rank == bad_rank, **cells[cell])
    found["seconds"] = time.monotonic() - begun
    (Path(folder) / str(rank)).write_text(json.dumps(found))
    os._exit(0)
