"""Trainings that save every few steps, told how to begin and whether to be killed in the middle.

Run by `test_resume_kill.py` as `python resume_script.py FOLDER whole|killed|resumed`: one forked process for each clipper,
which writes its decisions into its own folder.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning_package import Callback, LightningModule, MixedPrecision, ModelCheckpoint, Trainer
from torch.utils.data import DataLoader, Dataset

from lightning_gradguard import (
    AGC,
    AdaGC,
    AutoClip,
    ClipNorm,
    ClipParameterNorm,
    ClipValue,
    Explosion,
    GradGuard,
    NonFinite,
    Overflow,
    Record,
    Vanishing,
    ZClip,
)

CLIPPERS = {
    "none": lambda: None,
    "norm": lambda: ClipNorm(1.0),
    "value": lambda: ClipValue(0.05),
    "parameter_norm": lambda: ClipParameterNorm(0.5),
    "agc": AGC,
    "autoclip": AutoClip,
    "zclip": ZClip,
    "adagc": lambda: AdaGC(warmup_steps=20),
    "scaler": lambda: ClipNorm(1.0),  # in fp16, whose scale is far too large at first
}
NUM_BATCHES, SAVE_EVERY, KILL_AFTER = 60, 5, 43


class Numbered(Dataset):
    """A batch is a function of its number, so that it does not matter where a run begins."""

    def __len__(self) -> int:
        return NUM_BATCHES

    def __getitem__(self, index: int) -> torch.Tensor:
        batch = torch.randn(8, 6, generator=torch.Generator().manual_seed(index))
        spoiled = {20: 1e4, 39: 1e4, 40: 1e4, 46: float("nan"), 50: 1e4, 51: 1e4}  # 40 batches are saved
        return batch * spoiled.get(index, 1.0)


class Model(LightningModule):
    """Two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        """Predict the sum."""
        return (self.net(batch) - batch.sum(1, keepdim=True)).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """With state of its own."""
        return torch.optim.AdamW(self.parameters(), lr=0.01)


class Killed(Callback):
    """Ends the process as a power cut does."""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """In the middle of the epoch, and between two checkpoints."""
        if batch_idx == KILL_AFTER:
            os.kill(os.getpid(), signal.SIGKILL)


def main(folder: Path, clipper: str, mode: str) -> None:
    """Train."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    lines: list[Any] = []

    def note(record: Record) -> None:
        verdicts = [[verdict.kind, repr(verdict.value), repr(verdict.limit)] for verdict in record.verdicts]
        decision = [
            record.decision.skip,
            list(record.decision.alerting),
            [str(action) for action in record.decision.actions],
        ]
        limits = [record.clip_coef.hex(), record.clipped_norm.hex(), float(record.explosion_limit).hex()]
        lines.append([record.position.step, record.measurement.global_norm.hex(), verdicts, decision, limits])

    guard = GradGuard(
        clip=CLIPPERS[clipper](),
        nonfinite=NonFinite("skip", cooldown=3),
        explosion=Explosion("skip", patience=2, cooldown=12, adapt_after=3),
        vanishing=Vanishing("warn", cooldown=7),
        overflow=Overflow("warn", max_in_a_row=1, cooldown=2),
        sinks=[note],
    )
    checkpoint = ModelCheckpoint(folder, every_n_train_steps=SAVE_EVERY, save_last=True, filename="step-{step}")
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**22)
    trainer = Trainer(
        accelerator="cpu",
        plugins=[MixedPrecision("16-mixed", "cpu", scaler=scaler)] if clipper == "scaler" else [],
        max_epochs=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[guard, checkpoint, *([Killed()] if mode == "killed" else [])],
    )
    model = Model()
    trainer.fit(model, Loader(), ckpt_path=folder / "last.ckpt" if mode == "resumed" else None)
    weights = [value.hex() for parameter in model.parameters() for value in parameter.detach().flatten().tolist()]
    text = json.dumps({"decisions": lines, "weights": weights, "num_skipped": guard.num_skipped})
    (folder / f"{mode}.json").write_text(text)


class Loader:
    """Gives out the batches one by one, and goes on where a checkpoint was made."""

    def __init__(self) -> None:
        self.loader = DataLoader(Numbered(), batch_size=None)
        self.position, self.first = 0, 0

    def __len__(self) -> int:
        return NUM_BATCHES

    def __iter__(self) -> Any:
        first, self.first = self.first, 0
        for index in range(first, NUM_BATCHES):
            self.position = index + 1
            yield self.loader.dataset[index]

    def state_dict(self) -> dict[str, int]:
        """How many batches were given out."""
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Begin there."""
        self.first = state["position"]


def fork(folder: Path, mode: str) -> dict[str, int]:
    """Exit code of each clipper's process; negative: the signal that ended it."""
    codes = {}
    for clipper in CLIPPERS:
        (folder / clipper).mkdir(exist_ok=True)
        if (child := os.fork()) == 0:
            main(folder / clipper, clipper, mode)
            os._exit(0)
        codes[clipper] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return codes


if __name__ == "__main__":
    (Path(sys.argv[1]) / "codes.json").write_text(json.dumps(fork(Path(sys.argv[1]), sys.argv[2])))
