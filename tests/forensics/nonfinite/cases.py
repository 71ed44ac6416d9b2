"""Labelled failures: a training step each whose gradients or loss are not finite, and healthy controls.

The true culprit's line carries `# <<`, in the case's class or in the one named by `at`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

BATCH, WIDTH = 8, 16
INF, NAN = float("inf"), float("nan")
CASES: list[Case] = []


@dataclass(frozen=True)
class Case:
    """A step, and the truth about it.

    Attributes:
        make: the module.
        phase: "data", "weights", "forward", "backward", or "none" for a control.
        module: path of the culprit, batch leaf, or name of the weight; with a final "*" only its beginning.
        ops: accepted operators, separated by blanks; "any" for whichever.
        rows: bad samples; None where it is not single ones, and anything may be said.
        at: whose source holds the culprit's line; None: the module's own.
    """

    make: type[Base]
    phase: str
    module: str
    ops: str
    rows: list[int] | None
    at: type | None

    @property
    def lines(self) -> list[tuple[str, int]]:
        """File and number of the lines that may be named; empty where any may."""
        source, start = inspect.getsourcelines(self.at or self.make)
        file = inspect.getfile(self.at or self.make)
        return [(file, start + offset) for offset, line in enumerate(source) if line.rstrip().endswith("# <<")]


def case(
    phase: str,
    module: str = "",
    ops: str = "",
    rows: list[int] | None = None,
    at: type | None = None,
) -> Callable[[type[Base]], type[Base]]:
    """Register a class as a case."""

    def register(make: type[Base]) -> type[Base]:
        CASES.append(Case(make, phase, module, ops, rows, at))
        return make

    return register


class Wrapped(nn.Module):
    """A function as a module, so that it has a path."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any) -> Tensor:
        return self.function(*args)


class Base(LightningModule):
    """An encoder, whatever the case adds, and a linear classifier."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.enc = nn.Sequential(nn.Linear(WIDTH, 32), nn.ReLU(), nn.Linear(32, WIDTH))
        self.out = nn.Linear(WIDTH, 4)
        self.culprit: nn.Module = nn.Identity()
        self.add()

    def add(self) -> None:
        """What the case adds."""

    def batch(self) -> Any:
        """Its batch."""
        generator = torch.Generator().manual_seed(1)
        return {
            "x": torch.randn(BATCH, WIDTH, generator=generator),
            "y": torch.randint(0, 4, (BATCH,), generator=generator),
        }

    def middle(self, hidden: Tensor, batch: Any) -> Tensor:
        """Between encoder and classifier."""
        return self.culprit(hidden)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch)

    def loss(self, batch: Any) -> Tensor:
        """Of the batch."""
        return F.cross_entropy(self.out(self.middle(self.enc(batch["x"]), batch)), batch["y"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def one_row(row: int, value: float, other: float) -> Tensor:
    """[BATCH, 1]: `value` in one row, `other` in the rest."""
    made = torch.full((BATCH, 1), other)
    made[row] = value
    return made


@case("forward", "culprit", "log")
class LogOfZero(Base):
    def add(self):
        self.culprit = Wrapped(lambda h: torch.log(torch.relu(h)))  # <<


@case("forward", "culprit", "exp", [5])
class ExpOverflow(Base):
    def add(self):
        self.culprit = Wrapped(lambda h: torch.log(1 + torch.exp(h)))  # <<

    def batch(self):
        batch = super().batch()
        batch["x"][5] *= 3000
        return batch


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, hidden, keep):
        q, k, v = self.qkv(hidden).chunk(3, -1)
        scores = q @ k.transpose(1, 2) / WIDTH**0.5
        scores = scores.masked_fill(~keep[:, None, :], -INF)
        return torch.softmax(scores, -1) @ v  # <<


@case("none")
class MaskedAttentionIsHealthy(Base):
    """Sequences of five, the last two padded."""

    def __init__(self):
        super().__init__()
        self.attn = Attention()

    def batch(self):
        batch = super().batch()
        batch["x"] = torch.randn(BATCH, 5, WIDTH, generator=torch.Generator().manual_seed(2))
        batch["keep"] = torch.ones(BATCH, 5, dtype=torch.bool)
        batch["keep"][:, 3:] = False
        return batch

    def middle(self, hidden, batch):
        return self.attn(hidden, batch["keep"]).mean(1)


Sequences = MaskedAttentionIsHealthy


@case("forward", "attn", "_softmax softmax", [1], at=Attention)
class AttentionAllMasked(Sequences):
    def batch(self):
        batch = super().batch()
        batch["keep"][1] = False
        return batch


@case("forward", "", "nll_loss_forward cross_entropy")
class AllTargetsIgnored(Base):
    """The loss is NaN, and every gradient is finite."""

    def batch(self):
        batch = super().batch()
        batch["y"][:] = -100
        return batch

    def loss(self, batch):
        return F.cross_entropy(self.out(self.enc(batch["x"])), batch["y"])  # <<


@case("forward", "enc.2", "addmm mm linear")
class HalfPrecisionOverflow(Base):
    def add(self):
        with torch.no_grad():
            self.enc[0].weight.mul_(2e3)
            self.enc[2].weight.mul_(2e3)

    def loss(self, batch):
        with torch.autocast("cpu", torch.float16):
            return F.cross_entropy(self.out(self.enc(batch["x"])), batch["y"])  # <<


@case("forward", "culprit", "div")
class StandardisedByZero(Base):
    def add(self):
        self.culprit = Wrapped(lambda h: (h - h.mean(0)) / h.var(0).sqrt())  # <<

    def middle(self, hidden, batch):
        hidden = hidden.clone()
        hidden[:, 0] = 1.0
        return self.culprit(hidden)


@case("forward", "", "log mul")
class DivergenceOfZeroProbability(Base):
    def loss(self, batch):
        p = F.one_hot(batch["y"], 4).float()
        q = self.out(self.enc(batch["x"])).softmax(1)
        return (p * (p / q).log()).sum(1).mean()  # <<


@case("forward", "", "pow mul mse_loss", [4])
class SquareOverflow(Base):
    def batch(self):
        batch = super().batch()
        batch["x"][4] *= 1e21
        return batch

    def loss(self, batch):
        return ((self.out(self.enc(batch["x"])) - 1.0) ** 2).mean()  # <<


@case("forward", "", "log mul")
class LogOfSoftmaxUnderflow(Base):
    def loss(self, batch):
        logits = self.out(self.enc(batch["x"])) * 3e3
        return -(F.one_hot(batch["y"], 4) * torch.log(torch.softmax(logits, 1))).sum(1).mean()  # <<


@case("forward", "pool", "div", [2])
class MeanOverNothing(Sequences):
    def add(self):
        self.pool = Wrapped(lambda h, keep: (h * keep[..., None]).sum(1) / keep.sum(1, keepdim=True))  # <<

    def batch(self):
        batch = super().batch()
        batch["keep"][2] = False
        return batch

    def middle(self, hidden, batch):
        return self.pool(hidden, batch["keep"].float())


@case("forward", "", "_ctc_loss ctc_loss", [3])
class TargetTooLongForCtc(Base):
    def batch(self):
        batch = super().batch()
        batch["x"] = torch.randn(BATCH, 6, WIDTH, generator=torch.Generator().manual_seed(3))
        batch["lengths"] = torch.full((BATCH,), 2)
        batch["lengths"][3] = 6
        batch["t"] = torch.tensor([2, 1, 2, 1, 2, 1]).repeat(BATCH, 1)
        batch["t"][3] = 1
        return batch

    def loss(self, batch):
        log_probs = self.out(self.enc(batch["x"])).log_softmax(-1).transpose(0, 1)
        return F.ctc_loss(log_probs, batch["t"], torch.full((BATCH,), 6), batch["lengths"])  # <<


@case("data", "batch['x']", rows=[5])
class SampleOfNaN(Base):
    def add(self):
        self.culprit = nn.BatchNorm1d(WIDTH)

    def batch(self):
        batch = super().batch()
        batch["x"][5, 2] = NAN
        return batch


@case("weights", "enc.2.weight")
class WeightOfNaN(Base):
    def add(self):
        self.culprit = nn.LayerNorm(WIDTH)
        with torch.no_grad():
            self.enc[2].weight[3, 4] = NAN


@case("weights", "scale")
class BufferOfNaN(Base):
    def add(self):
        self.register_buffer("scale", torch.tensor(NAN))

    def middle(self, hidden, batch):
        return hidden * self.scale


@case("backward", "culprit", "SqrtBackward0", [2])
class RootOfZero(Base):
    def add(self):
        self.culprit = Wrapped(lambda h: (h * h).sum(1).sqrt())  # <<

    def loss(self, batch):
        return self.culprit(self.enc(batch["x"]) * one_row(2, 0.0, 1.0)).mean()


@case("backward", "culprit", "DivBackward0 div", [1])
class QuotientMaskedTooLate(Base):
    def add(self):
        self.culprit = Wrapped(lambda h, c: torch.where(c > 0, h / c, torch.zeros(())))  # <<

    def middle(self, hidden, batch):
        return self.culprit(hidden, one_row(1, 0.0, 1.0))


@case("backward", "culprit", "AcosBackward0", [4])
class AngleOfOne(Base):
    def add(self):
        self.culprit = Wrapped(lambda c: torch.acos(c))  # noqa: PLW0108 # <<

    def middle(self, hidden, batch):
        mask = one_row(4, 1.0, 0.0)
        cosine = torch.tanh(hidden) * 0.9
        return self.culprit(cosine * (1 - mask) + mask * (1 + 0 * cosine))


@case("none")
class DeviationOfAConstantIsHealthy(Base):
    """torch guards this one."""

    def loss(self, batch):
        hidden = self.enc(batch["x"])
        return (hidden * 0 + 1).std(0).sum() + hidden.mean()


class BadBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.relu(x)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * x / torch.relu(x)  # <<


@case("backward", "culprit", "BadBackwardBackward", at=BadBackward)
class BackwardOfTheUsersOwn(Base):
    def add(self):
        self.culprit = Wrapped(BadBackward.apply)

    def middle(self, hidden, batch):
        return self.culprit(hidden)


@case("backward", "enc.2", "AddmmBackward0 MmBackward0")
class HalfPrecisionOverflowInBackward(Base):
    """A loss scale that is too large."""

    def add(self):
        with torch.no_grad():
            self.out.weight.mul_(100)
            self.enc[2].weight.mul_(300)

    def loss(self, batch):
        with torch.autocast("cpu", torch.float16):
            loss = F.cross_entropy(self.out(self.enc(batch["x"])), batch["y"])  # <<
        return loss * 2.0**8


@case("backward", "culprit", "SqrtBackward0", [2])
class RootOfZeroInACheckpoint(Base):
    def add(self):
        self.culprit = Wrapped(lambda h: (h * h).sum(1).sqrt())  # <<

    def loss(self, batch):
        hidden = self.enc(batch["x"]) * one_row(2, 0.0, 1.0)
        return checkpoint(self.culprit, hidden, use_reentrant=False).mean()


@case("none")
class InfiniteGradientThatReluDropsIsHealthy(Base):
    """The slope of a root at zero is infinite; relu's backward makes it zero."""

    def add(self):
        self.culprit = Wrapped(lambda h: torch.relu(h) ** 0.5)


@case("forward", "rnn", "any")
class RecurrentExplosion(Base):
    def add(self):
        self.rnn = nn.RNN(WIDTH, WIDTH, nonlinearity="relu", batch_first=True)
        with torch.no_grad():
            self.rnn.weight_hh_l0.copy_(torch.eye(WIDTH) * 8)

    def middle(self, hidden, batch):
        return self.rnn(hidden[:, None].abs().expand(-1, 60, -1))[0][:, -1]  # <<


class Deep(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(70))
        for layer in self.layers:
            nn.init.normal_(layer.weight, std=3.0)

    def forward(self, hidden):
        for layer in self.layers:
            hidden = torch.relu(layer(hidden))  # <<
        return hidden


@case("forward", "culprit.layers.*", "addmm", at=Deep)
class DeepBadInitialisation(Base):
    def add(self):
        self.culprit = Deep()

    def loss(self, batch):
        return F.mse_loss(self.out(self.culprit(self.enc(batch["x"]) * 10)), torch.zeros(BATCH, 4))
