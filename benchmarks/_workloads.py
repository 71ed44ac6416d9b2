"""The networks that are trained; each returns its loss."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

VOCABULARY = 256
SEQUENCE_LENGTH = 64
BATCH_SIZE = 2
WIDTH, DEPTH, HEADS = 384, 6, 6
MLP_WIDTH, MLP_DEPTH, MLP_BATCH_SIZE = 64, 200, 64
CONV_CHANNELS, CONV_BATCH_SIZE, IMAGE_SIZE = (32, 64, 128), 16, 32
NUM_CLASSES = 10
NUM_BATCHES = 16
TABLE_COLUMNS, SERIES_COLUMNS, SMALL_BATCH_SIZE = 32, 8, 64
SERIES_LENGTH, DEEPAR_LENGTH = 24, 48
MANY = 10_000


class GPT(nn.Module):
    """A causal transformer of 10.7 M parameters in 76 tensors; head and embedding are tied."""

    def __init__(self, depth: int = DEPTH) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.positions = nn.Embedding(SEQUENCE_LENGTH, WIDTH)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(WIDTH, HEADS, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(WIDTH)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(SEQUENCE_LENGTH), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Cross entropy of the next token."""
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        hidden = self.embedding(inputs) + self.positions.weight
        for block in self.blocks:
            hidden = block(hidden, src_mask=self.mask, is_causal=True)
        logits = F.linear(self.norm(hidden), self.embedding.weight)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


class MLP(nn.Module):
    """200 layers and a head: 402 small tensors. Residual, or no gradient would reach the first layer."""

    def __init__(self, depth: int = MLP_DEPTH) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(MLP_WIDTH, MLP_WIDTH) for _ in range(depth))
        self.head = nn.Linear(MLP_WIDTH, NUM_CLASSES)

    def forward(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Cross entropy of the class."""
        hidden, targets = batch
        for layer in self.layers:
            hidden = hidden + layer(hidden).tanh() / len(self.layers) ** 0.5
        return F.cross_entropy(self.head(hidden), targets)


class ConvNet(nn.Module):
    """Three stages of four convolutions with batch normalisation, on small images."""

    def __init__(self, convolutions: int = 4) -> None:
        super().__init__()
        stages: list[nn.Module] = []
        before = 3
        for channels in CONV_CHANNELS:
            for _ in range(convolutions):
                stages += [nn.Conv2d(before, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()]
                before = channels
            stages.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*stages)
        self.head = nn.Linear(before, NUM_CLASSES)

    def forward(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Cross entropy of the class."""
        images, targets = batch
        return F.cross_entropy(self.head(self.features(images).mean((2, 3))), targets)


class SmallMLP(nn.Module):
    """Three layers on a table of 32 columns: the least that anyone trains."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(TABLE_COLUMNS, MLP_WIDTH),
            nn.ReLU(),
            nn.Linear(MLP_WIDTH, MLP_WIDTH),
            nn.ReLU(),
            nn.Linear(MLP_WIDTH, NUM_CLASSES),
        )

    def forward(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Cross entropy of the class."""
        rows, targets = batch
        return F.cross_entropy(self.net(rows), targets)


class LSTM(nn.Module):
    """Two layers of 64 units and a head, on series of 24 steps."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(SERIES_COLUMNS, MLP_WIDTH, num_layers=2, batch_first=True)
        self.head = nn.Linear(MLP_WIDTH, 1)

    def forward(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Squared error of the value after the series."""
        series, targets = batch
        return F.mse_loss(self.head(self.lstm(series)[0][:, -1]).squeeze(-1), targets)


class DeepAR(nn.Module):
    """An LSTM that gives mean and scale of each next value, as DeepAR does, on series of 48 steps.

    D. Salinas et al., "DeepAR: Probabilistic forecasting with autoregressive recurrent networks", arXiv:1704.04110, 2017.
    """

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(SERIES_COLUMNS, MLP_WIDTH, num_layers=2, batch_first=True, dropout=0.1)
        self.mean, self.scale = nn.Linear(MLP_WIDTH, 1), nn.Linear(MLP_WIDTH, 1)

    def forward(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Negative log likelihood of all values under normal distributions."""
        series, targets = batch
        hidden = self.lstm(series)[0]
        forecast = torch.distributions.Normal(self.mean(hidden), F.softplus(self.scale(hidden)) + 1e-3)
        return -forecast.log_prob(targets.unsqueeze(-1)).mean()


class HuggingFaceGPT2(nn.Module):
    """GPT-2 as the transformers package builds it, with random weights."""

    def __init__(self, depth: int = DEPTH) -> None:
        super().__init__()
        from transformers import GPT2Config, GPT2LMHeadModel  # optional, and slow to import

        config = GPT2Config(
            vocab_size=VOCABULARY,
            n_positions=SEQUENCE_LENGTH + 1,
            n_embd=WIDTH,
            n_layer=depth,
            n_head=HEADS,
            use_cache=False,
        )
        self.transformer = GPT2LMHeadModel(config)

    def forward(self, tokens: Tensor) -> Tensor:
        """Cross entropy of the next token."""
        return self.transformer(input_ids=tokens, labels=tokens).loss


class ManyTensors(nn.Module):
    """The mean of 10,000 matrices of 32 x 32, which costs as little as a network of so many tensors can."""

    def __init__(self, number: int = MANY) -> None:
        super().__init__()
        self.matrices = nn.ParameterList(torch.randn(TABLE_COLUMNS, TABLE_COLUMNS) for _ in range(number))

    def forward(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Cross entropy of the class."""
        rows, targets = batch
        return F.cross_entropy(rows @ torch.stack([*self.matrices]).mean(0), targets)


@dataclass(frozen=True)
class Workload:
    """A network and its data.

    Attributes:
        title: what it is.
        model: makes it, at full size or, given True, at the smallest.
        batch: makes a batch.
        needs: package that has to be installed; None: nothing.
    """

    title: str
    model: Callable[[bool], nn.Module]
    batch: Callable[[], Tensor | tuple[Tensor, Tensor]]
    needs: str | None = None

    @property
    def missing(self) -> str | None:
        """What keeps it from running here, as a text; None: nothing."""
        if self.needs is None or importlib.util.find_spec(self.needs):
            return None
        return f"the package {self.needs} is not installed"

    def batches(self) -> list[Tensor | tuple[Tensor, Tensor]]:
        """Some batches of random data; to no end can they be learned, so gradients stay alive."""
        return [self.batch() for _ in range(NUM_BATCHES)]


def _tokens() -> Tensor:
    return torch.randint(VOCABULARY, (BATCH_SIZE, SEQUENCE_LENGTH + 1))


def _labelled(*shape: int) -> tuple[Tensor, Tensor]:
    return torch.randn(*shape), torch.randint(NUM_CLASSES, shape[:1])


def _series() -> tuple[Tensor, Tensor]:
    return torch.randn(SMALL_BATCH_SIZE, SERIES_LENGTH, SERIES_COLUMNS), torch.randn(SMALL_BATCH_SIZE)


def _long_series() -> tuple[Tensor, Tensor]:
    return torch.randn(SMALL_BATCH_SIZE, DEEPAR_LENGTH, SERIES_COLUMNS), torch.randn(SMALL_BATCH_SIZE, DEEPAR_LENGTH)


WORKLOADS = {
    "mlp3": Workload("MLP of three layers", lambda quick: SmallMLP(), lambda: _labelled(SMALL_BATCH_SIZE, TABLE_COLUMNS)),
    "lstm": Workload("LSTM", lambda quick: LSTM(), _series),
    "deepar": Workload("DeepAR", lambda quick: DeepAR(), _long_series),
    "smallconv": Workload(
        "small conv net",
        lambda quick: ConvNet(1),
        lambda: _labelled(CONV_BATCH_SIZE, 3, IMAGE_SIZE, IMAGE_SIZE),
    ),
    "gpt": Workload("GPT", lambda quick: GPT(1 if quick else DEPTH), _tokens),
    "mlp": Workload("MLP-200", lambda quick: MLP(4 if quick else MLP_DEPTH), lambda: _labelled(MLP_BATCH_SIZE, MLP_WIDTH)),
    "conv": Workload(
        "conv net",
        lambda quick: ConvNet(1 if quick else 4),
        lambda: _labelled(CONV_BATCH_SIZE, 3, IMAGE_SIZE, IMAGE_SIZE),
    ),
    "many": Workload(
        "many tensors",
        lambda quick: ManyTensors(100 if quick else MANY),
        lambda: _labelled(SMALL_BATCH_SIZE, TABLE_COLUMNS),
    ),
    "huggingface": Workload(
        "Hugging Face GPT-2", lambda quick: HuggingFaceGPT2(1 if quick else DEPTH), _tokens, needs="transformers"
    ),
}


def describe(model: nn.Module) -> str:
    """Its size, for a title."""
    parameters = list(model.parameters())
    return f"{sum(parameter.numel() for parameter in parameters) / 1e6:.1f} M parameters in {len(parameters)} tensors"


def adamw(model: nn.Module, kind: str) -> torch.optim.AdamW:
    """AdamW, "fused" or "foreach"."""
    return torch.optim.AdamW(model.parameters(), lr=1e-4, **{kind: True})
