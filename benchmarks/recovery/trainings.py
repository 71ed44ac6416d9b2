"""Small trainings, and faults that end them: which batches, which steps, what happens there."""

from __future__ import annotations

import math
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

BATCH_SIZE, EPOCH, NUM_EPOCHS = 32, 250, 4
NUM_STEPS = EPOCH * NUM_EPOCHS


@dataclass(frozen=True)
class Network:
    """What is trained.

    Attributes:
        make: the network.
        draw: inputs and targets of so many samples.
        loss: of outputs and targets.
        optimizer: of its parameters.
    """

    make: Callable[[], nn.Module]
    draw: Callable[[int, torch.Generator], tuple[Tensor, Tensor]]
    loss: Callable[[Tensor, Tensor], Tensor]
    optimizer: Callable[[Any], torch.optim.Optimizer]


class Pooled(nn.Module):
    """A recurrent or attending network over a sequence, and a number from its mean."""

    def __init__(self, body: nn.Module, width: int) -> None:
        super().__init__()
        self.body = body
        self.head = nn.Linear(width, 1)

    def forward(self, inputs: Tensor) -> Tensor:
        """From [batch, time, features] to [batch, 1]."""
        outputs = self.body(inputs)
        outputs = outputs[0] if isinstance(outputs, tuple) else outputs
        return self.head(outputs.mean(1))


def _regression(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    inputs = torch.randn(count, 16, generator=generator)
    wave = torch.sin(inputs[:, :4]).sum(1, keepdim=True)
    return inputs, wave + 0.5 * torch.randn(count, 1, generator=generator)


def _classes(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    centers = 1.2 * torch.randn(10, 20, generator=torch.Generator().manual_seed(7)) / math.sqrt(2)
    targets = torch.randint(10, (count,), generator=generator)
    return centers[targets] + torch.randn(count, 20, generator=generator), targets


def _sequences(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    inputs = torch.randn(count, 10, 8, generator=generator)
    targets = inputs[:, :, 0].relu().mean(1, keepdim=True) + inputs[:, :, 1].mean(1, keepdim=True)
    return inputs, targets + 0.3 * torch.randn(count, 1, generator=generator)


NETWORKS = {
    "MLP, AdamW": Network(
        lambda: nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1)),
        _regression,
        F.mse_loss,
        lambda parameters: torch.optim.AdamW(parameters, lr=3e-3),
    ),
    "classifier, SGD": Network(
        lambda: nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)),
        _classes,
        F.cross_entropy,
        lambda parameters: torch.optim.SGD(parameters, lr=0.03, momentum=0.9),
    ),
    "RNN, Adam": Network(
        lambda: Pooled(nn.RNN(8, 24, batch_first=True), 24),
        _sequences,
        F.mse_loss,
        lambda parameters: torch.optim.Adam(parameters, lr=3e-3),
    ),
    "transformer, AdamW": Network(
        lambda: Pooled(nn.Sequential(nn.Linear(8, 16), nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True)), 16),
        _sequences,
        F.mse_loss,
        lambda parameters: torch.optim.AdamW(parameters, lr=2e-3),
    ),
}


@dataclass(frozen=True)
class Fault:
    """What goes wrong.

    Attributes:
        title: in a few words.
        first: step at which it begins, of `NUM_STEPS`; None: a sample that comes once an epoch.
        length: batches that it takes.
        spoil: what happens to the inputs there.
        scale: by how much targets are multiplied there, or inputs where targets are classes.
        rate: by how much learning rates are multiplied there.
        in_half: whether training is in fp16.
    """

    title: str
    first: int | None
    length: int = 1
    spoil: Callable[[Tensor], Tensor] = lambda inputs: inputs
    scale: float = 1.0
    rate: float = 1.0
    in_half: bool = False


FAULTS = {
    "rate": Fault("learning rate times 300 for 8 steps", first=620, length=8, rate=300.0),
    "rate-long": Fault("learning rate times 1,000 for 25 steps", first=430, length=25, rate=1000.0),
    "scaled": Fault("5 batches of data in the wrong unit, times 10,000", first=150, length=5, scale=1e4),
    "nan": Fault("20 batches with a NaN", first=520, length=20, spoil=lambda inputs: inputs * torch.nan),
    "half": Fault(
        "fp16: 40 batches that overflow, so that the scale collapses",
        first=130,
        length=40,
        spoil=lambda inputs: inputs * 1e6,
        in_half=True,
    ),
    "sample": Fault("one sample of the data set is NaN", first=None, spoil=lambda inputs: inputs * torch.nan),
}


class Samples(Dataset):
    """One epoch's samples, one of them spoiled perhaps."""

    def __init__(self, network: Network, fault: Fault | None, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.inputs, self.targets = network.draw(BATCH_SIZE * EPOCH, generator)
        if fault is not None and fault.first is None:
            self.inputs[1234] = fault.spoil(self.inputs[1234])

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.inputs[index], self.targets[index]


class Training(LightningModule):
    """A network, its optimizer, a cosine schedule over the whole training, and the fault."""

    def __init__(self, network: Network, fault: Fault | None) -> None:
        super().__init__()
        self.net = network.make()
        self.network = network
        self.fault = fault

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The loss."""
        inputs, targets = batch
        if self._is_now(batch_idx):
            inputs = self.fault.spoil(inputs)
            if targets.is_floating_point():
                targets = targets * self.fault.scale
            else:
                inputs = inputs * self.fault.scale
        return self.network.loss(self.net(inputs), targets)

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        """With another learning rate where that is the fault."""
        factor = self.fault.rate if self._is_now(batch_idx) else 1.0
        for group in optimizer.param_groups:
            group["lr"] *= factor
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        for group in optimizer.param_groups:
            group["lr"] /= factor

    def configure_optimizers(self) -> Any:
        """With the schedule."""
        optimizer = self.network.optimizer(self.parameters())
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, NUM_STEPS)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    def _is_now(self, batch_idx: int) -> bool:
        if self.fault is None or self.fault.first is None:
            return False
        return 0 <= self.current_epoch * EPOCH + batch_idx - self.fault.first < self.fault.length


def final_loss(network: Network, fault: Fault | None, callbacks: list[Callback], *, seed: int, in_half: bool) -> float:
    """Train, and give the loss on samples that were not trained on; infinite where it is not finite."""
    torch.manual_seed(seed)
    settings: dict[str, Any] = {}
    if in_half:
        settings["plugins"] = [MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu"))]
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = Trainer(
            accelerator="cpu",
            max_epochs=NUM_EPOCHS,
            callbacks=callbacks,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
            **settings,
        )
        training = Training(network, fault)
        trainer.fit(training, DataLoader(Samples(network, fault, seed), batch_size=BATCH_SIZE, shuffle=True))
    inputs, targets = network.draw(4096, torch.Generator().manual_seed(10_000))
    training.eval()
    with torch.no_grad():
        loss = float(network.loss(training.net(inputs), targets))
    return loss if math.isfinite(loss) else math.inf
