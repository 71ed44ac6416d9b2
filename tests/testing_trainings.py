"""Trainings that `test_testing_kills.py` kills; other processes import them."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from trainer.toys import Net, ResumableBatches, make_batches

from lightning_gradguard import GradGuard

FAULTS = {20: "nan", 41: "nan", 77: "nan"}


def with_a_trainer(folder: Path) -> dict[str, Any]:
    """Saves every ten steps, and goes on from there."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    guard = GradGuard(clip=1.0, max_replays=1)
    saving = ModelCheckpoint(folder, every_n_train_steps=10, save_last=True)
    settings = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(max_epochs=1, callbacks=[guard, saving], default_root_dir=folder, **settings)
    model = Net(FAULTS)
    last = folder / "last.ckpt"
    batches = ResumableBatches(make_batches(120).batches)
    trainer.fit(model, batches, ckpt_path=last if last.exists() else None)
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
