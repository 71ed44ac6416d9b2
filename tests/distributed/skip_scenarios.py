"""What a skipped step leaves behind on each rank: everything that the forward pass can change, compared bit for bit."""

from __future__ import annotations

import itertools
import math
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from lightning_package import DDPStrategy, LightningEnvironment, LightningModule, ModelParallelStrategy, Trainer
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from lightning_gradguard import Explosion, GradGuard

FEATURES, BATCH, LATE = 4, 8, 1
SHORT = Explosion("skip", warmup_steps=6)


class Marked(LightningModule):
    """A regression whose forward pass leaves its mark in buffers of each kind, and in two frozen teachers.

    Args:
        bad: batches that are spoiled, and how: "nan" in the gradients, "loss" in the loss, "scale" for inputs times 1e4.
        bad_rank: the rank on which they are.
        is_sharded: whether by FSDP2.
    """

    _ddp_params_and_buffers_to_ignore = ("nested", "sparse", "expanded")  # DDP can't send these

    def __init__(self, bad: dict[int, str], bad_rank: int = 1, *, is_sharded: bool = False) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(FEATURES)
        self.body = nn.Linear(FEATURES, 2)
        self.teacher = nn.Linear(FEATURES, 2).requires_grad_(False)
        self.other = nn.Linear(FEATURES, 2).requires_grad_(False)
        self.register_buffer("center", torch.zeros(FEATURES))
        self.register_buffer("sparse", torch.eye(2).to_sparse())
        self.register_buffer("nested", torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged))
        self.register_buffer("expanded", torch.ones(1).expand(3))
        self.share = nn.Module()
        self.share.register_buffer("seen", self.norm.running_mean)
        self.bad, self.bad_rank, self.is_sharded = bad, bad_rank, is_sharded
        self.after: list[dict[str, Any]] = []

    def configure_model(self) -> None:
        """Shard where asked for."""
        if self.is_sharded and not isinstance(self.body.weight, DTensor):
            for part in (self.body, self.teacher, self.other):
                fully_shard(part, mesh=self.device_mesh["data_parallel"], reshard_after_forward=True)

    @torch.no_grad()
    def _leave_marks(self, x: Tensor, batch_idx: int) -> None:
        self.center = 0.9 * self.center + x.mean(0)
        self.sparse = (1.5 * self.sparse).coalesce()
        self.nested = 0.9 * self.nested
        self.expanded[0] += x.mean()
        if batch_idx == LATE:
            self.register_buffer("late", torch.zeros(2))
        if batch_idx > LATE:
            self.late += x.sum()
        for old, other, new in zip(self.teacher.parameters(), self.other.parameters(), self.body.parameters(), strict=True):
            old.lerp_(new, 0.1)
            other.data.mul_(0.9).add_(0.1 * new.data)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Mean squared error, spoiled where asked for."""
        fault = self.bad.get(batch_idx) if self.global_rank == self.bad_rank else None
        x = 1e4 * batch if fault == "scale" else batch
        self._leave_marks(x, batch_idx)
        loss = nn.functional.mse_loss(self.body(self.norm(x)), x.sum(1, keepdim=True) + self.teacher(x) + self.other(x))
        return {"nan": loss * math.nan, "loss": loss + math.nan}.get(fault, loss)

    def configure_optimizers(self) -> Any:
        """With a schedule that Lightning steps."""
        optimizer = torch.optim.AdamW(self.body.parameters(), lr=0.01)
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9), "interval": "step"}]

    def on_train_start(self) -> None:
        """Keep all of it."""
        self._note()

    def on_train_batch_end(self, *_: Any) -> None:
        """Keep all of it."""
        self._note()

    def _note(self) -> None:
        state = self.trainer.optimizers[0].state_dict()["state"]
        values = {**dict(self.named_parameters()), **dict(self.named_buffers(remove_duplicate=False))}
        for number, entries in state.items():
            values |= {f"{number}.{name}": value for name, value in entries.items()}
        self.after.append({name: _plain(value) for name, value in values.items()})


def _plain(value: Tensor) -> Tensor:
    value = value.detach()
    if isinstance(value, DTensor):
        value = value.to_local()
    if value.is_nested:
        value = value.values()
    return value.to_dense().clone() if value.is_sparse else value.clone()


def _changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> list[str]:
    """Names of what is not the same to the bit."""
    names = sorted({*before, *after})
    return [n for n in names if n not in before or n not in after or not torch.equal(before[n], after[n])]


def skipped(
    mode: str, bad: dict[int, str], *, bad_rank: int = 1, num_batches: int = 8, accumulate: int = 1, **arguments: Any
) -> dict[str, Any]:
    """Names of all that each batch has changed on this rank, and the learning rate after it."""
    torch.manual_seed(0)
    module = Marked(bad, bad_rank, is_sharded=mode == "fsdp2")
    guard = GradGuard(**arguments)
    strategy = (
        ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo")
        if mode == "fsdp2"
        else DDPStrategy(process_group_backend="gloo")
    )
    trainer = Trainer(
        accelerator="cpu",
        devices=distributed.get_world_size(),
        strategy=strategy,
        plugins=[LightningEnvironment()],
        callbacks=[guard],
        max_epochs=1,
        accumulate_grad_batches=accumulate,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tempfile.gettempdir(),
    )
    generator = torch.Generator().manual_seed(1 + distributed.get_rank())
    batches = [torch.randn(BATCH, FEATURES, generator=generator) for _ in range(num_batches)]
    trainer.fit(module, DataLoader(batches, batch_size=None))
    ends = module.after[::accumulate]
    return {
        "num_skipped": guard.num_skipped,
        "changed": [_changed(one, two) for one, two in itertools.pairwise(ends)],
        "rate": trainer.optimizers[0].param_groups[0]["lr"],
    }


SKIPS: dict[str, Callable[[], Any]] = {
    "skip-ddp": lambda: skipped("ddp", {4: "nan"}),
    "skip-ddp-first": lambda: skipped("ddp", {0: "loss"}, bad_rank=0, num_batches=3),
    "skip-fsdp2": lambda: skipped("fsdp2", {4: "nan"}),
    "skip-ddp-window": lambda: skipped("ddp", {20: "scale"}, num_batches=24, accumulate=2, explosion=SHORT),
    "skip-fsdp2-window": lambda: skipped("fsdp2", {41: "scale"}, num_batches=48, accumulate=4, explosion=SHORT),
}
