"""Modules that are awkward to replay: they keep state, draw random numbers, optimize by themselves."""

from __future__ import annotations

import random

import numpy as np
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

BATCH, WIDTH = 8, 6


class Zoo(LightningModule):
    """A regression; what it logs and how often it was called are part of its state."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.history: list[float] = []
        self.seen = {"rows": 0}
        self.build()

    def build(self) -> None:
        self.net = nn.Sequential(nn.Linear(WIDTH, 12), nn.Tanh(), nn.Dropout(0.3), nn.Linear(12, 1))

    def predict(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = F.mse_loss(self.predict(x), y)
        self.calls += 1
        self.history.append(float(loss))
        self.seen["rows"] += len(x)
        self.log("loss", loss)
        self.logger.log_metrics({"calls": self.calls}) if self.logger else None
        return loss

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9), "interval": "step"}]


class Metric(nn.Module):
    """A running metric that is no buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.total, self.values = torch.zeros(()), []

    def forward(self, value: Tensor) -> Tensor:
        self.total += value.detach().sum()
        self.values.append(value.detach().mean())
        return value


class ConvNet(Zoo):
    """BatchNorm, dropout and a metric."""

    def build(self):
        self.conv, self.norm = nn.Conv1d(1, 4, 3), nn.BatchNorm1d(4)
        self.drop, self.head, self.metric = nn.Dropout(0.4), nn.Linear(16, 1), Metric()

    def predict(self, x):
        return self.metric(self.head(self.drop(torch.relu(self.norm(self.conv(x[:, None]))).flatten(1))))


class Dice(Zoo):
    """Random numbers of its own, and python's and numpy's: they are put back, but not known from before the step."""

    def build(self):
        super().build()
        self.dice = random.Random(1)
        self.generator = torch.Generator().manual_seed(3)
        self.arrays = np.zeros(2)

    def predict(self, x):
        noise = torch.randn(1, generator=self.generator) * self.dice.random() + random.random() * np.random.rand()  # noqa: NPY002
        self.arrays += 1
        return self.net(x) + noise


class Spectral(Zoo):
    """Power iteration changes buffers in each forward pass."""

    def build(self):
        self.net = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(WIDTH, 12)), nn.ReLU(), nn.Linear(12, 1))


class Carried(Zoo):
    """A recurrent net that goes on from its last hidden state."""

    def build(self):
        self.cell, self.head, self.hidden = nn.GRUCell(WIDTH, 5), nn.Linear(5, 1), torch.zeros(BATCH, 5)

    def predict(self, x):
        self.hidden = self.cell(x, self.hidden.detach())
        return self.head(self.hidden)


class InPlace(Zoo):
    """Changes the batch."""

    def predict(self, x):
        x.mul_(0.5).add_(0.1)
        return self.net(x)


class Checkpointed(Zoo):
    """Dropout inside a recomputed part."""

    def predict(self, x):
        return checkpoint(self.net, x, use_reentrant=False)


class WithLbfgs(Zoo):
    """Several evaluations a step."""

    def build(self):
        self.net = nn.Sequential(nn.Linear(WIDTH, 4), nn.Tanh(), nn.Dropout(0.1), nn.Linear(4, 1))

    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=4)


class Gan(Zoo):
    """Two optimizers, toggled, with schedulers, stepped by hand."""

    def build(self):
        self.automatic_optimization = False
        self.generator, self.critic = nn.Linear(2, WIDTH), nn.Sequential(nn.Linear(WIDTH, 8), nn.ReLU(), nn.Linear(8, 1))

    def training_step(self, batch, batch_idx):
        x, _ = batch
        self.calls += 1
        first, second = self.optimizers()
        self.toggle_optimizer(first)
        loss = -self.critic(self.generator(torch.randn(len(x), 2))).mean()
        self.log("generator", loss)
        first.zero_grad()
        self.manual_backward(loss)
        first.step()
        self.untoggle_optimizer(first)
        for _ in range(2):
            self.toggle_optimizer(second)
            fake = self.generator(torch.randn(len(x), 2)).detach()
            loss = self.critic(fake).mean() - self.critic(x).mean()
            second.zero_grad()
            self.manual_backward(loss)
            self.clip_gradients(second, 0.5, "norm")
            second.step()
            self.untoggle_optimizer(second)
        with torch.no_grad():
            for parameter in self.critic.parameters():
                parameter.clamp_(-0.3, 0.3)
        for scheduler in self.lr_schedulers():
            scheduler.step()

    def configure_optimizers(self):
        optimizers = [torch.optim.Adam(part.parameters(), lr=0.01) for part in (self.generator, self.critic)]
        return optimizers, [torch.optim.lr_scheduler.StepLR(optimizer, 3) for optimizer in optimizers]


class ManualAccumulation(Zoo):
    """Steps by hand at every third batch."""

    def build(self):
        super().build()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        optimizer = self.optimizers()
        self.manual_backward(loss / 3)
        if batch_idx % 3 == 2:
            optimizer.step()
            optimizer.zero_grad()
