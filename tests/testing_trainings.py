"""Trainings that `test_testing_kills.py` kills; other processes import them."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_gradguard import GradGuard

FAULTS, NUM_BATCHES = (20, 41, 77), 120


class Net(LightningModule):
    """Small; NaN in some batches."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        loss = (self.net(batch) - batch.sum(1, keepdim=True)).square().mean()
        return loss * torch.nan if batch_idx in FAULTS else loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


class Batches:
    """Numbered; goes on where a checkpoint was made."""

    position, first = 0, 0

    def __len__(self) -> int:
        return NUM_BATCHES

    def __iter__(self) -> Iterator[torch.Tensor]:
        first, self.first = self.first, 0
        for index in range(first, NUM_BATCHES):
            self.position = index + 1
            yield torch.randn(8, 6, generator=torch.Generator().manual_seed(index))

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.first = state["position"]


def with_a_trainer(folder: Path) -> dict[str, Any]:
    """Saves every ten steps, and goes on from there."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    guard = GradGuard(clip=1.0, max_replays=1)
    saving = ModelCheckpoint(folder, every_n_train_steps=10, save_last=True)
    settings = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(max_epochs=1, callbacks=[guard, saving], default_root_dir=folder, **settings)
    model = Net()
    last = folder / "last.ckpt"
    trainer.fit(model, Batches(), ckpt_path=last if last.exists() else None)
    return {"weights": model.state_dict(), "guard": guard.state_dict(), "steps": trainer.global_step}


def forgetful(folder: Path) -> int:
    """Counts how often it was begun, and takes a while."""
    path = folder / "begun.json"
    number = json.loads(path.read_text()) + 1 if path.exists() else 1
    path.write_text(json.dumps(number))
    for _ in range(200):
        torch.randn(200, 200) @ torch.randn(200, 200)
    return number


def failing(folder: Path) -> None:
    """Ends with an error."""
    raise SystemExit(3)


def instant(folder: Path) -> int:
    """Is over at once."""
    return 1
