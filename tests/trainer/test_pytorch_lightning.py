"""The callback in a `pytorch_lightning.Trainer`, whose classes are not those of `lightning`."""

from __future__ import annotations

import math

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader

from lightning_gradguard import GradGuard, GradientError, GradientWarning

pytestmark = pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")


class Model(pl.LightningModule):
    """A line, with one spoiled batch."""

    def __init__(self) -> None:
        super().__init__()
        self.line = torch.nn.Linear(4, 1)

    def training_step(self, batch, batch_idx):
        """Predict the sum."""
        loss = (self.line(batch) - batch.sum(1, keepdim=True)).square().mean()
        return loss * math.nan if batch_idx == 5 else loss

    def configure_optimizers(self):
        """Any."""
        return torch.optim.Adam(self.parameters(), lr=0.1)

    def train_dataloader(self):
        """Twelve batches."""
        return DataLoader(torch.randn(96, 4), batch_size=8)


def _trainer(root, guard, **settings) -> pl.Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False, "logger": False}
    callbacks = [guard, *settings.pop("callbacks", [])]
    settings = {**quiet, "accelerator": "cpu", "max_epochs": 1, "log_every_n_steps": 1, **settings}
    return pl.Trainer(callbacks=callbacks, default_root_dir=root, **settings)


def test_pytorch_lightning_trainer_is_guarded_and_logs_to_tensorboard(tmp_path):
    """Its TensorBoardLogger is recognised as one."""
    guard, logger = GradGuard(clip=0.5, histogram_every_n_steps=4), TensorBoardLogger(tmp_path)
    with pytest.warns(GradientWarning, match="Nonfinite at step 5"):
        _trainer(tmp_path, guard, logger=logger).fit(Model())
    assert (guard.num_steps, guard.num_skipped) == (12, 1)
    assert guard.num_clipped > 0
    tags = EventAccumulator(logger.log_dir).Reload().Tags()
    assert {"gradguard/global_norm", "gradguard/clip_coef"} <= set(tags["scalars"])
    assert "gradients/line.weight" in tags["histograms"]


def test_pytorch_lightning_trainer_stops(tmp_path):
    """With `stop`, by itself."""
    guard = GradGuard(nonfinite="stop")
    with pytest.warns(GradientWarning, match="training stops"):
        _trainer(tmp_path, guard).fit(Model())
    assert (guard.num_steps, guard.stopped_by.step) == (6, 5)


def test_pytorch_lightning_trainer_lets_the_error_through(tmp_path):
    """With `raise`."""
    with pytest.warns(GradientWarning, match="ends with an error"), pytest.raises(GradientError, match="Nonfinite"):
        _trainer(tmp_path, GradGuard(nonfinite="raise")).fit(Model())


def test_pytorch_lightning_checkpoint_restores_the_guard(tmp_path):
    """And its own ModelCheckpoint comes behind the guard, so that it saves what was decided."""
    checkpoint = ModelCheckpoint(tmp_path, every_n_train_steps=8, filename="at")
    with pytest.warns(GradientWarning, match="Nonfinite"):
        _trainer(tmp_path, GradGuard(), enable_checkpointing=True, callbacks=[checkpoint]).fit(Model())
    state = torch.load(checkpoint.best_model_path, weights_only=True)["callbacks"]["GradGuard"]
    assert state["guards"][0]["totals"]["num_steps"] == 8


def test_pytorch_lightning_checkpoint_of_damaged_weights_is_refused(tmp_path):
    """And the last good file stays."""

    class Damaged(Model):
        def training_step(self, batch, batch_idx):
            return self.line(batch).square().mean()

        def on_train_batch_end(self, outputs, batch, batch_idx):
            if batch_idx == 8:
                self.line.weight.data.fill_(math.nan)

    checkpoint = ModelCheckpoint(tmp_path, every_n_train_steps=4, filename="{step}")
    guard = GradGuard()
    with pytest.warns(GradientWarning):
        _trainer(tmp_path, guard, enable_checkpointing=True, callbacks=[checkpoint]).fit(Damaged())
    assert "checkpoint" in [alert.kind for alert in guard.alerts]
    assert torch.load(checkpoint.best_model_path, weights_only=True)["state_dict"]["line.weight"].isfinite().all()
    assert [path.name for path in tmp_path.glob("*.ckpt")] == ["step=8.ckpt"]


@pytest.mark.parametrize("max_replays", [0, 3])
def test_pytorch_lightning_replay_logs_and_prints_nothing(tmp_path, capsys, max_replays):
    """Means over the epoch are those of a run without replays, and each line comes once."""

    class Inner(pl.LightningModule):
        def note(self):
            self.print("seen")

    class Logging(Model):
        def __init__(self):
            super().__init__()
            self.inner = Inner()

        def training_step(self, batch, batch_idx):
            self.log("count", 1.0, on_step=False, on_epoch=True, reduce_fx="sum", batch_size=8)
            if batch_idx == 5:
                self.inner.trainer = self.trainer
                self.inner.note()
            return super().training_step(batch, batch_idx)

    guard = GradGuard(max_replays=max_replays)
    trainer = _trainer(tmp_path, guard)
    with pytest.warns(GradientWarning, match="Nonfinite at step 5"):
        trainer.fit(Logging())
    assert trainer.callback_metrics["count"] == 12
    assert capsys.readouterr().out.count("seen") == 1
    assert (guard.alerts[0].culprit is None) == (max_replays == 0)
