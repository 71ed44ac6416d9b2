"""Makes what a release leaves on disk, for `test_released_states.py`: `python tests/states/make.py FOLDER`.

Run it once, with the release in question on the path, and never again for it. A folder's name says which it is;
`before_0_1_0` is of commit f9eb5ae. It holds the states of `GradGuard` in checkpoints of a small training, by configuration,
with what its guard was about to do; a snapshot, a bundle, and the lines of both files.
"""

from __future__ import annotations

import copy
import shutil
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader

from lightning_gradguard import AGC, AdaGC, AutoClip, Explosion, GradGuard, Rollback, UpdateRatio, ZClip

NUM_BATCHES, FAULT = 48, 20

CONFIGURATIONS: dict[str, Any] = {
    "default": GradGuard,
    "norm": lambda: GradGuard(clip=1.0, explosion="skip"),
    "agc": lambda: GradGuard(clip=AGC()),
    "autoclip": lambda: GradGuard(clip=AutoClip()),
    "zclip": lambda: GradGuard(clip=ZClip()),
    "adagc": lambda: GradGuard(clip=AdaGC(warmup_steps=8)),
    "grouped": lambda: GradGuard(clip={"net.0.*": AutoClip(), "*": 1.0}),
    "update_ratio": lambda: GradGuard(detectors=[UpdateRatio()]),
    "max_norm": lambda: GradGuard(explosion=Explosion("warn", max_norm=100.0)),
    "quarantine": lambda: GradGuard(quarantine="list"),
}


class Model(LightningModule):
    """Small; NaN in one batch."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = (self.net(batch) - batch.sum(1, keepdim=True)).square().mean()
        return loss * torch.nan if batch_idx == FAULT else loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.01)


class Keep(Callback):
    """Keeps the guard's state as a checkpoint at the end of training would hold it."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        (guard,) = (callback for callback in trainer.callbacks if isinstance(callback, GradGuard))
        self.state = copy.deepcopy(guard.state_dict())


def fit(folder: Path, guard: GradGuard) -> dict[str, Any]:
    """One epoch; the state."""
    keep = Keep()
    data = torch.randn(NUM_BATCHES * 4, 4, generator=torch.Generator().manual_seed(1))
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[guard, keep],
    )
    trainer.fit(Model(), DataLoader(data, batch_size=4))
    return keep.state


def next_limit(guard: GradGuard) -> float:
    """The norm that the step after the last may not exceed; private, and so differs from release to release."""
    (judge,) = (each._judge for each in guard._guards.values())
    return min(detector.limit() for detector in judge._detectors)


def main(folder: Path) -> None:
    """All of them."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    states = {}
    for name, make in CONFIGURATIONS.items():
        with tempfile.TemporaryDirectory() as root:
            guard = make()
            states[name] = {"state": fit(Path(root), guard), "limit": next_limit(guard)}
            if name == "quarantine":
                for path in (Path(root) / "gradguard").iterdir():
                    shutil.copy(path, folder / path.name)
    with tempfile.TemporaryDirectory() as root:
        rollback = Rollback(every_n_steps=10, confirm_steps=5, directory=Path(root) / "kept")
        guard = GradGuard(nonfinite="rollback", rollback=rollback)
        states["rollback"] = {"state": fit(Path(root), guard), "limit": next_limit(guard)}
        shutil.copy(rollback.latest(), folder / "snapshot.ckpt")
    torch.save(states, folder / "states.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
