"""Rollbacks on each of several ranks: one training a mode, with a NaN loss on one rank."""

from __future__ import annotations

import hashlib
import json
import traceback
from pathlib import Path
from typing import Any

import torch
from lightning_package import Checkpoint, LightningEnvironment, Trainer
from scenarios import Student, _batches, _strategy, _whole
from torch import Tensor, distributed
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, Dataset

from lightning_gradguard import GradGuard, Rollback

NUM_BATCHES = 8


class Digests(Checkpoint):
    """After each batch a digest of the whole weights, and one of what this rank holds of the optimizer's state."""

    def __init__(self) -> None:
        self.weights: list[str] = []
        self.states: list[str] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.weights.append(_digest(_whole(parameter.detach()) for parameter in pl_module.parameters()))
        states = trainer.optimizers[0].state
        values = (value for parameter in pl_module.parameters() for value in states[parameter].values())
        self.states.append(_digest(value.to_local() if isinstance(value, DTensor) else value for value in values))


def _digest(tensors: Any) -> str:
    return hashlib.sha256(b"".join(tensor.contiguous().numpy().tobytes() for tensor in tensors)).hexdigest()


def rolled_back(mode: str, directory: Path | None, *, is_writable: bool = True) -> dict[str, Any]:
    """A training in which batch 4 is bad on rank 1; snapshots after batches 1 and 3, of which the first is confirmed."""
    torch.manual_seed(0)
    rollback = Rollback(every_n_steps=2, confirm_steps=1, skip_batches=1, directory=directory)
    guard, digests = GradGuard(nonfinite="rollback", rollback=rollback), Digests()
    if not is_writable and distributed.get_rank() == 0:
        directory.write_text("a file where the folder should be")
    trainer = _trainer(mode, guard, digests)
    module = Student(mode, spoil="loss")
    trainer.fit(module, DataLoader(_batches(mode, NUM_BATCHES), batch_size=None))
    found = {
        "weights": digests.weights,
        "states": digests.states,
        "alerts": [[alert.kind, alert.action.value] for alert in guard.alerts],
        "global_step": trainer.global_step,
    }
    if directory is not None and is_writable:
        found["resumed"] = _resumed(mode, rollback)
        found["files"] = sorted(path.name for path in directory.iterdir())
    return found


def _resumed(mode: str, rollback: Rollback) -> str:
    """The state that a new run begins with from the latest snapshot."""
    digests: list[str] = []

    class Begins(Checkpoint):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            digests.append(_digest(_whole(parameter.detach()) for parameter in pl_module.parameters()))

    guard = GradGuard(nonfinite="rollback", rollback=rollback)
    trainer = _trainer(mode, guard, Begins(), max_epochs=2)
    trainer.fit(Student(mode), DataLoader(_batches(mode, NUM_BATCHES), batch_size=None), ckpt_path=rollback.latest())
    return digests[0]


class Numbers(Dataset):
    """Each sample is its number."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> Tensor:
        return torch.full((6,), float(index))


def quarantined(folder: Path) -> dict[str, Any]:
    """Three epochs of a training in which sample 5 makes a NaN, on whichever rank it comes."""
    seen: list[list[int]] = []

    class Sees(Student):
        def training_step(self, batch, batch_idx):
            seen.append(batch[:, 0].int().tolist())
            return super().training_step(batch, batch_idx) * (torch.nan if 5 in seen[-1] else 1.0)

    guard = GradGuard(quarantine="skip", max_replays=0)
    trainer = _trainer("ddp", guard, max_epochs=3, root=folder, use_distributed_sampler=True)
    torch.manual_seed(0)
    trainer.fit(Sees("ddp"), DataLoader(Numbers(), batch_size=2, shuffle=True))
    lines = (folder / "gradguard" / "quarantine.jsonl").read_text().splitlines()
    return {"seen": seen, "lines": [json.loads(line) for line in lines], "num_skipped": guard.num_skipped}


def _trainer(
    mode: str, *callbacks: Any, max_epochs: int = 1, root: Path | str = "/tmp", use_distributed_sampler: bool = False
) -> Trainer:
    return Trainer(
        accelerator="cpu",
        devices=2,
        strategy=_strategy(mode),
        plugins=[LightningEnvironment()],
        callbacks=list(callbacks),
        max_epochs=max_epochs,
        use_distributed_sampler=use_distributed_sampler,
        logger=False,
        enable_checkpointing=any(isinstance(callback, Checkpoint) for callback in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=root,
    )


def play(folder: str) -> dict[str, Any]:
    """All of them; where one fails, its traceback."""
    found = {}
    try:
        found["quarantine"] = quarantined(Path(folder))
    except Exception:  # noqa: BLE001
        found["quarantine"] = {"error": traceback.format_exc()}
    for name in ("ddp-memory", "ddp-disk", "ddp-refused", "fsdp2-memory", "fsdp2-disk", "tp-memory"):
        mode, medium = name.split("-")
        try:
            directory = None if medium == "memory" else Path(folder) / name
            found[name] = rolled_back(mode, directory, is_writable=medium != "refused")
        except Exception:  # noqa: BLE001 - it is the finding, and the others go on
            found[name] = {"error": traceback.format_exc()}
    return found
