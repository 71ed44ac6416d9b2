"""Ten ordinary trainings, one class each: what people do all day, in miniature."""

from __future__ import annotations

import math
from typing import Any

import torch
from lightning_package import LightningModule
from torch import Tensor, nn
from torch.nn import functional
from toys import Batches

STEPS = 80


def _labelled(shape: tuple[int, ...], classes: int = 3, batch_size: int = 16) -> Batches:
    """Noisy prototypes, one a class."""
    generator = torch.Generator().manual_seed(2)
    prototypes = torch.randn(classes, *shape, generator=generator)
    labels = torch.randint(classes, (STEPS, batch_size), generator=generator)
    inputs = prototypes[labels] + 0.7 * torch.randn(STEPS, batch_size, *shape, generator=generator)
    return Batches(list(zip(inputs, labels, strict=True)))


def _sequences(length: int = 12, batch_size: int = 16) -> Batches:
    """Arithmetic sequences modulo 7, so that the next element can be learned."""
    generator = torch.Generator().manual_seed(3)
    starts = torch.randint(7, (STEPS, batch_size, 1), generator=generator)
    strides = torch.randint(1, 3, (STEPS, batch_size, 1), generator=generator)
    return Batches(list((starts + strides * torch.arange(length)) % 7))


class Classifier(LightningModule):
    """Cross-entropy on labelled batches; subclasses say which network and which optimizer."""

    net: nn.Module
    trainer_settings: dict[str, Any] = {}  # noqa: RUF012

    @staticmethod
    def data() -> Batches:
        """Vectors of three classes."""
        return _labelled((10,))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return functional.cross_entropy(self.net(x), y)

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=3e-3)


class Mlp(Classifier):
    """MLP, Adam."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 3))


class ConvNet(Classifier):
    """Convolutions with BatchNorm, SGD with momentum and a cosine schedule."""

    def __init__(self) -> None:
        super().__init__()
        blocks = [nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2)]
        blocks += [nn.Conv2d(6, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1)]
        self.net = nn.Sequential(*blocks, nn.Flatten(), nn.Linear(8, 3))

    @staticmethod
    def data() -> Batches:
        return _labelled((1, 8, 8))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.inside = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inside(x)


class ResidualNet(Classifier):
    """Six residual blocks, AdamW."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(10, 24), *(_Block(24) for _ in range(6)), nn.Linear(24, 3))

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-3, weight_decay=0.01)


class Lstm(LightningModule):
    """Next-token prediction with an LSTM, Adam."""

    trainer_settings: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 12)
        self.lstm = nn.LSTM(12, 24, batch_first=True)
        self.head = nn.Linear(24, 7)

    @staticmethod
    def data() -> Batches:
        return _sequences()

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.lstm(self.embed(tokens))[0])

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return functional.cross_entropy(self(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=5e-3)


class Transformer(Lstm):
    """Two pre-norm encoder layers with a causal mask, AdamW, linear warm-up."""

    def __init__(self) -> None:
        LightningModule.__init__(self)
        self.embed = nn.Embedding(7, 16)
        self.positions = nn.Parameter(0.02 * torch.randn(12, 16))
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(16, 7)

    def forward(self, tokens: Tensor) -> Tensor:
        length = tokens.shape[1]
        mask = torch.full((length, length), -math.inf).triu(1)
        return self.head(self.encoder(self.embed(tokens) + self.positions[:length], mask=mask))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=3e-3, betas=(0.9, 0.98))
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 20))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Autoencoder(LightningModule):
    """Autoencoder with a narrow middle, mean squared error, RMSprop."""

    trainer_settings: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 3))
        self.decoder = nn.Sequential(nn.Linear(3, 16), nn.ReLU(), nn.Linear(16, 20))

    @staticmethod
    def data() -> Batches:
        return _labelled((20,))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, _ = batch
        return functional.mse_loss(self.decoder(self.encoder(x)), x)

    def configure_optimizers(self) -> Any:
        return torch.optim.RMSprop(self.parameters(), lr=1e-3)


class Gan(LightningModule):
    """Generator and discriminator in manual optimization, two Adams."""

    trainer_settings: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(4, 24), nn.ReLU(), nn.Linear(24, 10))
        self.discriminator = nn.Sequential(nn.Linear(10, 24), nn.LeakyReLU(0.2), nn.Linear(24, 1))

    @staticmethod
    def data() -> Batches:
        return _labelled((10,))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        real, _ = batch
        for_generator, for_discriminator = self.optimizers()
        noise = torch.randn(real.shape[0], 4)
        ones, zeros = torch.ones(real.shape[0], 1), torch.zeros(real.shape[0], 1)

        self.toggle_optimizer(for_generator)
        loss = functional.binary_cross_entropy_with_logits(self.discriminator(self.generator(noise)), ones)
        for_generator.zero_grad()
        self.manual_backward(loss)
        for_generator.step()
        self.untoggle_optimizer(for_generator)

        self.toggle_optimizer(for_discriminator)
        fake = self.generator(noise).detach()
        loss = functional.binary_cross_entropy_with_logits(self.discriminator(real), ones)
        loss = loss + functional.binary_cross_entropy_with_logits(self.discriminator(fake), zeros)
        for_discriminator.zero_grad()
        self.manual_backward(loss)
        for_discriminator.step()
        self.untoggle_optimizer(for_discriminator)

    def configure_optimizers(self) -> Any:
        parts = (self.generator, self.discriminator)
        return [torch.optim.Adam(part.parameters(), lr=1e-3, betas=(0.5, 0.999)) for part in parts]


class FineTuning(Mlp):
    """A frozen body under a new head, Adam over all parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.net[:4].requires_grad_(requires_grad=False)


class Accumulating(Mlp):
    """Windows of four micro-batches, three epochs."""

    trainer_settings = {"accumulate_grad_batches": 4, "max_epochs": 3}  # noqa: RUF012


class SummedRegression(LightningModule):
    """Regression with the loss summed over the batch, SGD: gradient norms in the hundreds."""

    trainer_settings: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(10, 24), nn.Tanh(), nn.Linear(24, 1))

    @staticmethod
    def data() -> Batches:
        return Batches([(x, 3.0 * x.sum(1, keepdim=True).sin() + 5.0) for x, _ in _labelled((10,))])

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return functional.mse_loss(self.net(x), y, reduction="sum")

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=2e-4, momentum=0.9)


TRAININGS = (
    Mlp,
    ConvNet,
    ResidualNet,
    Lstm,
    Transformer,
    Autoencoder,
    Gan,
    FineTuning,
    Accumulating,
    SummedRegression,
)
