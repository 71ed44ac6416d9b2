"""Trains the runs that the browser looks at: a real Trainer with GradGuard, so that the tab sees what people have.

Run as `python real_runs.py FOLDER`.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from lightning_gradguard import GradGuard, Rollback

NAN_STEPS = (60, 61)
GAN_FAULT = 40


class Classifier(LightningModule):
    """A small net, healthy."""

    def __init__(self, num_layers: int = 2, width: int = 16) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8 if index == 0 else width, width) for index in range(num_layers))
        self.head = nn.Linear(width, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.relu(layer(x)) + (x if x.shape[-1] == layer.out_features else 0.0)
        return self.head(x)

    def training_step(self, batch, batch_idx):
        loss = functional.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class Partial(Classifier):
    """One layer without gradients, one whose gradient is exactly zero."""

    def __init__(self) -> None:
        super().__init__(num_layers=4)
        self.layers[1].requires_grad_(requires_grad=False)
        self.unused = nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + 0.0 * self.unused(x)


class Vanishing(Classifier):
    """Sigmoids one after another: each takes at least three quarters of the gradient."""

    def __init__(self) -> None:
        super().__init__(num_layers=10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.sigmoid(layer(x))
        return self.head(x)


class Damaged(Classifier):
    """The logarithm of a probability that reaches zero, in one row of two batches."""

    def training_step(self, batch, batch_idx):
        logits = self(batch[0])[:, 0]
        if self.global_step in NAN_STEPS:
            logits = torch.where(torch.arange(len(logits)) == 3, logits - 200.0, logits)
        p = torch.sigmoid(logits)
        loss = -(p.log() * batch[1]).mean()
        self.log("train_loss", loss)
        return loss


class Gan(LightningModule):
    """Two optimizers; the second one's loss jumps once."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator, self.critic = nn.Linear(4, 8), nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1))

    def training_step(self, batch, batch_idx):
        x, of_generator, of_critic = batch[0], *self.optimizers()
        made = self.generator(torch.randn(len(x), 4))
        of_generator.zero_grad()
        self.manual_backward(functional.softplus(-self.critic(made)).mean())
        of_generator.step()
        of_critic.zero_grad()
        loss = functional.softplus(self.critic(made.detach())).mean() + functional.softplus(-self.critic(x)).mean()
        self.manual_backward(loss * (1e5 if self.global_step // 2 == GAN_FAULT else 1.0))
        of_critic.step()

    def configure_optimizers(self):
        return [torch.optim.Adam(part.parameters(), 1e-3) for part in (self.generator, self.critic)]


def fit(
    folder: Path, name: str, module: LightningModule, guard: GradGuard, steps: int, *, interval: int = 5, **more
) -> None:
    """Train it."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, 8, generator=generator)
    data = DataLoader(TensorDataset(x, (x[:, 0] > 0).long()), 16)
    ckpt_path = more.pop("ckpt_path", None)
    trainer = Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=TensorBoardLogger(str(folder), name=name, version=""),
        log_every_n_steps=interval,
        callbacks=[guard, *more.pop("callbacks", [])],
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=more.pop("enable_checkpointing", False),
    )
    trainer.fit(module, data, ckpt_path=ckpt_path)


def main(folder: Path) -> None:
    """All of them."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    seed_everything(0, verbose=False)
    rollback = GradGuard(
        clip=1.0, nonfinite="rollback", rollback=Rollback(every_n_steps=25, confirm_steps=5, skip_batches=2)
    )
    fit(folder, "damaged", Damaged(), rollback, 120)
    fit(folder, "gan", Gan(), GradGuard(explosion="skip"), 140)
    fit(folder, "partial", Partial(), GradGuard(histogram_every_n_steps=20), 60)
    fit(folder, "vanishing", Vanishing(), GradGuard(), 40)
    for layers in (2, 4, 7, 12):  # 9 to 39 rows of the flow
        guard = GradGuard(explosion=None if layers < 12 else "warn", nonfinite="skip")
        fit(folder, f"rows{layers}", Damaged(layers), guard, 70)
    saving = ModelCheckpoint(dirpath=folder / "checkpoints", every_n_train_steps=20, save_top_k=-1)
    fit(folder, "resumed", Classifier(), GradGuard(clip=1.0), 30, callbacks=[saving], enable_checkpointing=True)
    saved = str(next((folder / "checkpoints").glob("*step=20.ckpt")))
    fit(folder, "resumed", Classifier(), GradGuard(clip=1.0), 60, ckpt_path=saved)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
