"""The networks whose steps are timed; each returns its loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

NUM_CLASSES = 1000
STAGES = ((64, 3), (128, 4), (256, 6), (512, 3))
EXPANSION = 4


@dataclass(frozen=True)
class GptSize:
    """Of a GPT.

    Attributes:
        width: of the residual stream.
        depth: blocks.
        heads: of each attention.
        length: tokens of a sequence.
        vocabulary: GPT-2's, rounded up to a multiple of 128.
    """

    width: int
    depth: int
    heads: int
    length: int = 1024
    vocabulary: int = 50304


class Block(nn.Module):
    """Causal attention and an MLP, each behind a norm and beside the residual stream."""

    def __init__(self, size: GptSize) -> None:
        super().__init__()
        self.heads = size.heads
        self.norms = nn.ModuleList(nn.LayerNorm(size.width) for _ in range(2))
        self.qkv = nn.Linear(size.width, 3 * size.width)
        self.projection = nn.Linear(size.width, size.width)
        self.mlp = nn.Sequential(nn.Linear(size.width, 4 * size.width), nn.GELU(), nn.Linear(4 * size.width, size.width))

    def forward(self, hidden: Tensor) -> Tensor:
        """[batch, length, width] to the same."""
        query, key, value = self.qkv(self.norms[0](hidden)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        hidden = hidden + self.projection(attended.transpose(1, 2).flatten(2))
        return hidden + self.mlp(self.norms[1](hidden))


class GPT(nn.Module):
    """GPT-2's layout; head and embedding are tied."""

    def __init__(self, size: GptSize) -> None:
        super().__init__()
        self.embedding = nn.Embedding(size.vocabulary, size.width)
        self.positions = nn.Embedding(size.length, size.width)
        self.blocks = nn.Sequential(*(Block(size) for _ in range(size.depth)))
        self.norm = nn.LayerNorm(size.width)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Cross entropy of the next token; tokens [batch, length + 1]."""
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        hidden = self.embedding(inputs) + self.positions.weight[: inputs.shape[1]]
        logits = F.linear(self.norm(self.blocks(hidden)), self.embedding.weight)
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


class Bottleneck(nn.Module):
    """Three convolutions with batch normalisation beside a residual path."""

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        after = width * EXPANSION
        self.path = nn.Sequential(
            *(nn.Conv2d(before, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)),
            *(nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)),
            *(nn.Conv2d(width, after, 1, bias=False), nn.BatchNorm2d(after)),
        )
        keeps_shape = stride == 1 and before == after
        shortcut = (nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))
        self.shortcut = nn.Identity() if keeps_shape else nn.Sequential(*shortcut)

    def forward(self, images: Tensor) -> Tensor:
        """[batch, channels, height, width], halved where the stride is 2."""
        return F.relu(self.path(images) + self.shortcut(images))


class ResNet50(nn.Module):
    """As in He et al., Deep Residual Learning for Image Recognition, arXiv 1512.03385, with the stride in the 3 x 3."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(inplace=True)]
        layers.append(nn.MaxPool2d(3, 2, 1))
        before = 64
        for stage, (width, depth) in enumerate(STAGES):
            for index in range(depth):
                layers.append(Bottleneck(before, width, 2 if stage and not index else 1))
                before = width * EXPANSION
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(before, NUM_CLASSES)

    def forward(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Cross entropy of the class."""
        images, targets = batch
        return F.cross_entropy(self.head(self.features(images).mean((2, 3))), targets)


@dataclass(frozen=True)
class Training:
    """One row of the table.

    Attributes:
        title: what it is.
        network: makes it.
        batch: makes a batch on a device.
        optimizer: makes it.
        precision: the Trainer's.
    """

    title: str
    network: Callable[[], nn.Module]
    batch: Callable[[torch.device], Tensor | tuple[Tensor, Tensor]]
    optimizer: Callable[[nn.Module], torch.optim.Optimizer]
    precision: str


def fused_adamw(network: nn.Module) -> torch.optim.Optimizer:
    """For the transformers."""
    return torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True)


def fused_sgd(network: nn.Module) -> torch.optim.Optimizer:
    """For the ResNet."""
    return torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4, fused=True)


def _gpt(title: str, size: GptSize, batch_size: int) -> Training:
    def batch(device: torch.device) -> Tensor:
        return torch.randint(size.vocabulary, (batch_size, size.length + 1), device=device)

    # bf16-true: under bf16-mixed the Trainer refuses its own clipping with a fused optimizer.
    return Training(title, lambda: GPT(size), batch, fused_adamw, "bf16-true")


def _images(batch_size: int, side: int) -> Callable[[torch.device], tuple[Tensor, Tensor]]:
    return lambda device: (
        torch.randn(batch_size, 3, side, side, device=device),
        torch.randint(NUM_CLASSES, (batch_size,), device=device),
    )


TRAININGS = (
    _gpt("GPT, 124 M parameters, 8 x 1,024 tokens, bf16, fused AdamW", GptSize(768, 12, 12), batch_size=8),
    _gpt("GPT, 1.0 B parameters, 2 x 1,024 tokens, bf16, fused AdamW", GptSize(2048, 18, 16), batch_size=2),
    Training("ResNet-50, 64 images of 224 x 224, fp32 (TF32), fused SGD", ResNet50, _images(64, 224), fused_sgd, "32-true"),
)
DRY_TRAININGS = (
    _gpt("GPT, tiny", GptSize(32, 2, 2, length=16, vocabulary=64), batch_size=2),
    Training("ResNet-50, 2 images of 32 x 32", ResNet50, _images(2, 32), fused_sgd, "32-true"),
)
