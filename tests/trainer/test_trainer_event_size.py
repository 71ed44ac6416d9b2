"""How much a training writes at the defaults."""

from __future__ import annotations

import torch
from lightning_package import LightningModule, TensorBoardLogger, Trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader

from lightning_gradguard import GradGuard

NUM_LAYERS = 74


class Deep(LightningModule):
    """149 tensors in the nested modules of a transformer's names."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer = nn.ModuleDict({"h": nn.ModuleList(nn.Linear(8, 8) for _ in range(NUM_LAYERS))})
        self.scale = nn.Parameter(torch.ones(8))

    def training_step(self, batch, batch_idx):
        x = batch
        for layer in self.transformer["h"]:
            x = x + 0.1 * torch.tanh(layer(x))
        return functional.mse_loss(x * self.scale, batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-2)


def test_thousand_steps_of_149_tensors_take_150_kilobytes(tmp_path):
    """All histograms are in the tab's own data; the standard panel has the first two or three."""
    model = Deep()
    assert len(list(model.parameters())) == 149
    trainer = Trainer(
        max_steps=1000,
        accelerator="cpu",
        logger=TensorBoardLogger(tmp_path, name="", version=""),
        callbacks=[GradGuard(vanishing=None)],
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.fit(model, DataLoader(torch.randn(1000, 2, 8), batch_size=None))
    (file,) = tmp_path.glob("events*")
    assert file.stat().st_size <= 150_000
    events = EventAccumulator(str(tmp_path), {"tensors": 0, "histograms": 0}).Reload()
    assert [event.step for event in events.Histograms("gradients/scale")][:2] == [99, 199]
    bins = [tag for tag in events.Tags()["tensors"] if tag.startswith("gradguard_tab/") and "/bins/" in tag]
    assert sum(len(events.Tensors(tag)) for tag in bins) == 10
