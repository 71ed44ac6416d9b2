"""Trainings with snapshots on disk and rollbacks, killed at random points and resumed.

Run by `test_rollback_kill.py` as `python kill_script.py FOLDER NUM_KILLS`: one forked process a training, and one for each
that goes on after a kill. Half of the kills come at a random time, half at a random call inside the code that takes
snapshots and goes back. What came of each stands in `results.json`.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning_package import LightningModule, Trainer
from torch import nn

from lightning_gradguard import GradGuard, Rollback

NUM_BATCHES, FAULTS = 60, (18, 43)
SEEN: list[str] = []
"""Calls from the code of snapshots and rollbacks so far."""
INSIDE = ("snapshot_storage.py", "run_state.py", "recovery/recovery.py", "ring.py", "host.py")


class Model(LightningModule):
    """With random numbers, running statistics and a scheduler, so that whatever is not restored shows."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Tanh(), nn.Linear(8, 1))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = (self.net(batch) - batch.sum(1, keepdim=True)).square().mean()
        return loss * torch.nan if batch_idx in FAULTS else loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.98), "interval": "step"}]


class Loader:
    """Numbered batches; goes on where a checkpoint was made."""

    position, first = 0, 0

    def __len__(self) -> int:
        return NUM_BATCHES

    def __iter__(self) -> Any:
        first, self.first = self.first, 0
        for index in range(first, NUM_BATCHES):
            self.position = index + 1
            yield torch.randn(8, 6, generator=torch.Generator().manual_seed(index))

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.first = state["position"]


def train(folder: Path) -> None:
    """Begin, or go on from the latest snapshot."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rollback = Rollback(every_n_steps=5, confirm_steps=2, skip_batches=2, directory=folder / "kept")
    latest = rollback.latest()
    begun_at = None if latest is None else torch.load(latest, weights_only=True)["global_step"]
    guard = GradGuard(nonfinite="rollback", rollback=rollback)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[guard],
    )
    model = Model()
    trainer.fit(model, Loader(), ckpt_path=latest)
    values = [value.hex() for tensor in model.state_dict().values() for value in tensor.float().flatten().tolist()]
    text = json.dumps({"weights": values, "global_step": trainer.global_step, "begun_at": begun_at})
    (folder / "result.json").write_text(text)


def kill_inside(num_calls: int) -> None:
    """End this process, as a power cut does, at so many calls from the code of snapshots and rollbacks."""

    def count(frame: Any, event: str, _: Any) -> None:
        if event in ("call", "c_call", "c_return") and frame.f_code.co_filename.endswith(INSIDE):
            SEEN.append(event)
            if len(SEEN) == num_calls:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.setprofile(count)


def fork(folder: Path, *, calls: int | None = None, seconds: float | None = None) -> int:
    """Exit code of a training in a process of its own; negative: the signal that ended it."""
    if (child := os.fork()) == 0:
        if calls is not None:
            kill_inside(calls)
        train(folder)
        sys.setprofile(None)
        (folder / "calls.json").write_text(json.dumps(len(SEEN)))
        os._exit(0)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main(root: Path, num_kills: int) -> None:
    """All of them."""
    whole = root / "whole"
    whole.mkdir()
    fork(whole, calls=-1)
    (root / "timed").mkdir()
    start = time.perf_counter()
    fork(root / "timed")
    took = time.perf_counter() - start
    expected, num_calls = json.loads((whole / "result.json").read_text()), json.loads((whole / "calls.json").read_text())
    chance, results = random.Random(0), []
    for number in range(num_kills):
        folder = root / str(number)
        inside, share, code = number % 2 == 0, chance.uniform(0.02, 0.98), 0
        while code == 0:  # on a busy machine a run may be over before its time has come
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            code = fork(folder, calls=max(int(share * num_calls), 1)) if inside else fork(folder, seconds=share * took)
            share /= 2
        names = sorted(path.name for path in (folder / "kept").glob("*")) if (folder / "kept").exists() else []
        for path in (folder / "kept").glob("*.ckpt*"):
            if path.suffix != ".part":
                torch.load(path, weights_only=True)  # raises where a file is not whole
        latest = Rollback(directory=folder / "kept").latest()
        code_after = fork(folder)
        found = json.loads((folder / "result.json").read_text())
        results.append(
            {
                "inside": inside,
                "killed": code == -signal.SIGKILL,
                "names": names,
                "latest": latest and latest.name,
                "code_after": code_after,
                "same": found["weights"] == expected["weights"] and found["global_step"] == expected["global_step"],
                "begun_at": found["begun_at"],
            }
        )
    (root / "results.json").write_text(json.dumps({"results": results, "num_calls": num_calls, "seconds": took}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
