"""Networks of ordinary makes, in miniature."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

VOCABULARY = 96


def mlp(sizes: Sequence[int], activation: Callable[[], nn.Module] = nn.ReLU) -> nn.Sequential:
    """Linear layers with an activation between them."""
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), activation()]
    return nn.Sequential(*layers[:-1])


def conv_net() -> nn.Sequential:
    """Two convolutions with BatchNorm."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(2),
        nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip


class Block(nn.Module):
    """A residual block; `norm` comes before its two layers."""

    def __init__(self, width: int, norm: Callable[[int], nn.Module] = nn.LayerNorm) -> None:
        super().__init__()
        self.inside = nn.Sequential(norm(width), nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inside(x)


def residual(depth: int, width: int = 32, norm: Callable[[int], nn.Module] = nn.LayerNorm) -> nn.Sequential:
    """Residual blocks between an input and an output layer, for the digits."""
    return nn.Sequential(nn.Linear(64, width), *(Block(width, norm) for _ in range(depth)), nn.Linear(width, 10))


class ConvBlock(nn.Module):
    """A residual block of convolutions with BatchNorm."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.inside = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.inside(x))


class LanguageModel(nn.Module):
    """Next character by a recurrent net."""

    def __init__(self, kind: type[nn.RNNBase] = nn.LSTM, width: int = 32, **settings: Any) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 16)
        self.rnn = kind(16, width, batch_first=True, **settings)
        self.head = nn.Linear(width, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.rnn(self.embed(tokens))[0])


class Transformer(nn.Module):
    """Next character by a causal transformer."""

    def __init__(self, depth: int = 2, width: int = 32, length: int = 24, vocabulary: int = VOCABULARY) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.position = nn.Parameter(0.02 * torch.randn(length, width))
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, 0.0, batch_first=True, norm_first=True)
        self.body = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.head = nn.Linear(width, vocabulary)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(length))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.body(self.embed(tokens) + self.position, mask=self.mask, is_causal=True))


def cross_entropy(network: nn.Module) -> Callable[[tuple[Tensor, Tensor]], Tensor]:
    """Mean over all positions."""
    return lambda batch: F.cross_entropy(network(batch[0]).flatten(0, -2), batch[1].flatten())


def squared_error(network: nn.Module) -> Callable[[tuple[Tensor, Tensor]], Tensor]:
    """Mean squared error."""
    return lambda batch: F.mse_loss(network(batch[0]), batch[1])


def adam(network: nn.Module, rate: float, **settings: Any) -> Optimizer:
    """AdamW."""
    return torch.optim.AdamW(network.parameters(), rate, **settings)


def sgd(network: nn.Module, rate: float, momentum: float = 0.9) -> Optimizer:
    """SGD with momentum."""
    return torch.optim.SGD(network.parameters(), rate, momentum=momentum)


def set_rate(optimizer: Optimizer, rate: float) -> None:
    """Change the learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def linears(network: nn.Module) -> list[nn.Linear]:
    """Its linear layers, in order."""
    return [module for module in network.modules() if isinstance(module, nn.Linear)]
