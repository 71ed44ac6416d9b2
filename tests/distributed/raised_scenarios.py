"""Training steps under DDP that end in an exception on some ranks: what each rank makes of it, as plain data."""

from __future__ import annotations

import json
import os
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import raisers
import torch
from fsdp1 import CPUStrategy
from lightning_package import (
    Callback,
    DDPStrategy,
    EarlyStopping,
    LightningEnvironment,
    LightningModule,
    ModelParallelStrategy,
    Trainer,
)
from ranks import _free_port
from torch import Tensor, distributed, multiprocessing, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.utils.data import DataLoader

from lightning_gradguard import GradGuard
from lightning_gradguard.trainer import rank_messages

NUM_BATCHES, BAD_BATCH, ROW = 5, 2, 3

UNTOUCHED = ("worker", "lost GPU", *raisers.NO_FAILURES)
"""Exceptions that NaN is not the reason of, though there is some, or not known to be."""

_SECONDS_TO_END = 100.0
"""The process group alone would wait for two minutes."""


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


class ManualAnomalous(Anomalous):
    """Torch's own detector raises, around a backward pass that the user calls."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.automatic_optimization = False

    def training_step(self, batch: Tensor, batch_idx: int) -> None:  # type: ignore[override]
        """One step."""
        optimizer = self.optimizers()
        optimizer.zero_grad()
        with torch.autograd.detect_anomaly(check_nan=True):
            self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()


class Logged(Raising):
    """Its loss, which bears NaN, is what the Trainer stops by."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Mean square."""
        loss = self.net(batch).square().mean()
        self.log("loss", loss, on_step=False, on_epoch=True)
        return loss


class Unreadable(list[Tensor]):
    """A batch that holds NaN can't be read."""

    def __getitem__(self, index: Any) -> Any:
        """A batch."""
        batch = super().__getitem__(index)
        if bool(batch.isnan().any()):
            raise ValueError(f"NaN in batch {index}")
        return batch


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


def _trainer(guard: GradGuard, root: str, *, callbacks: Sequence[Callback] = (), **settings: Any) -> Trainer:
    return Trainer(
        accelerator="cpu",
        devices=distributed.get_world_size(),
        plugins=[LightningEnvironment()],
        callbacks=[guard, *callbacks],
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=root,
        **{"strategy": _ddp(), "max_epochs": 1} | settings,
    )


_plain_loader = partial(DataLoader, batch_size=None)


def fit(
    root: str,
    *,
    bad: bool,
    guard: GradGuard | None = None,
    module: Any = None,
    loader: Callable[[list[Tensor]], Any] = _plain_loader,
    **settings: Any,
) -> dict[str, Any]:
    """Train, and say what came of it."""
    guard, module, error = guard or GradGuard(), module or Raising(), None
    trainer = _trainer(guard, root, **settings)
    begun = time.monotonic()
    try:
        trainer.fit(module, loader(_batches(bad=bad)))
    except BaseException as caught:  # noqa: BLE001 - it is the finding
        error = caught
    return {
        "seconds": time.monotonic() - begun,
        "steps": trainer.global_step,
        "skipped": guard.num_skipped,
        "alerts": [
            [it.kind, it.step, it.batch_idx, it.rank, it.culprit and it.culprit.rank, it.message] for it in guard.alerts
        ],
        "rows": [list(it.culprit.samples or it.culprit.probable_samples or ()) for it in guard.alerts if it.culprit],
        "error": None if error is None else type(error).__name__,
        "words": str(error),
        "raised_in": None if error is None else traceback.extract_tb(error.__traceback__)[-1].name,
        "notes": getattr(error, "__notes__", []),
        "weights": sum(float(it.double().sum()) for it in module.parameters()),
        "buffers_are_finite": all(bool(it.isfinite().all()) for it in module.buffers()),
    }


def all_raise(root: str) -> dict[str, Any]:
    """The same on each rank: fits that go on, and some that end."""
    rank_messages.SECONDS_TO_RAISE = 20.0
    return {
        "torch": fit(root, bad=True),
        "accumulated": fit(root, bad=True, accumulate_grad_batches=2),
        "backward": fit(root, bad=True, module=Anomalous(), detect_anomaly=True),
        "top": fit(root, bad=True, module=Anomalous(is_at_top=True), detect_anomaly=True),
        "own": fit(root, bad=True, module=Raising(own=True)),
        **_other_ends(root),
        "healthy": fit(root, bad=False),
    }


def _untouched() -> dict[str, dict[str, Any]]:
    """Where they are raised."""
    cells: dict[str, dict[str, Any]] = {
        "worker": {"loader": lambda batches: _plain_loader(Unreadable(batches), num_workers=1)},
        "lost GPU": {"module": raisers.Raising(raisers.lost_gpu)},
        **{name: {"module": raisers.Raising(end)} for name, end in raisers.NO_FAILURES.items()},
    }
    return {name: {"guard": GradGuard(skip_exceptions="all"), **cells[name]} for name in UNTOUCHED}


def _other_ends(root: str) -> dict[str, Any]:
    """The same on each rank: torch's detector, a Trainer that stops by its loss, ends that NaN is not the reason of."""
    rank_messages.SECONDS_TO_RAISE = 1000.0  # for which nobody may have to wait
    stopping = partial(EarlyStopping, "loss", check_finite=True, check_on_train_epoch_end=True)
    cells: dict[str, dict[str, Any]] = {
        "detect_anomaly": {"module": ManualAnomalous()},
        "detect_anomaly, top": {"module": ManualAnomalous(is_at_top=True)},
        "check_finite": {"module": Logged(), "callbacks": [stopping()], "max_epochs": 3},
        "check_finite, alone": {
            "module": Logged(),
            "callbacks": [stopping()],
            "max_epochs": 3,
            "bad": distributed.get_rank() == 1,
        },
        **_untouched(),
    }
    return {name: fit(f"{root}/{name}", **{"bad": True} | cell) for name, cell in cells.items()}


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


def ends_alone(bad_rank: int, cells: Sequence[str], folder: Path) -> dict[str, list[dict[str, Any]]]:
    """What each rank makes of an exception on one of them, by cell."""
    ports = {cell: _free_port() for cell in cells}
    multiprocessing.spawn(_each_alone, (bad_rank, ports, str(folder)), nprocs=2)
    return {cell: [json.loads((folder / cell / str(rank)).read_text()) for rank in (0, 1)] for cell in cells}


def _each_alone(rank: int, bad_rank: int, ports: dict[str, int], folder: str) -> None:
    """One cell after the other: each in a process of its own, forked, since one that is spawned imports torch again."""
    for cell, port in ports.items():
        place = Path(folder) / cell
        place.mkdir(exist_ok=True)
        process = multiprocessing.get_context("fork").Process(target=_alone, args=(rank, bad_rank, port, str(place), cell))
        process.start()
        process.join(_SECONDS_TO_END)
        if process.exitcode is None:
            process.kill()
            raise TimeoutError(f"rank {rank} has not come to an end in {cell!r}")


def _alone(rank: int, bad_rank: int, port: int, folder: str, cell: str) -> None:
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
        "detect_anomaly": {"module": ManualAnomalous()},
        **_untouched(),
    }
    found = fit(folder, bad=rank == bad_rank, **cells[cell])
    (Path(folder) / str(rank)).write_text(json.dumps(found))
    os._exit(0)
