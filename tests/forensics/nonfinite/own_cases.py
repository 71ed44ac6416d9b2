"""Further labelled failures, each a training step whose gradients or loss are not finite, and healthy controls.

The true culprit's line carries `# <<`. Labels as in `cases.py`.
"""

from __future__ import annotations

import math

import torch
from cases import BATCH, INF, NAN, WIDTH, Base, Sequences, Wrapped, case, one_row
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


@case("forward", "multihead", "_softmax softmax _safe_softmax", rows=[3])
class KeyPaddingOfATransformerLayer(Sequences):
    """nn.MultiheadAttention inside nn.TransformerEncoderLayer; one sample is all padding."""

    def add(self):
        self.multihead = nn.MultiheadAttention(WIDTH, 2, batch_first=True)

    def batch(self):
        batch = super().batch()
        batch["keep"][3] = False
        return batch

    def middle(self, hidden, batch):
        return self.multihead(hidden, hidden, hidden, key_padding_mask=~batch["keep"])[0].mean(1)  # <<


class RMSNorm(nn.Module):
    """As Llama has it, but without eps."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def forward(self, hidden):
        variance = hidden.pow(2).mean(-1, keepdim=True)
        return self.weight * hidden * torch.rsqrt(variance)  # <<


class Block(nn.Module):
    """A decoder block in the way of Hugging Face's Llama."""

    def __init__(self):
        super().__init__()
        self.input_layernorm = RMSNorm()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))
        self.post_attention_layernorm = nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 32), nn.SiLU(), nn.Linear(32, WIDTH))

    def forward(self, hidden, mask):
        normed = self.input_layernorm(hidden)
        scores = self.q_proj(normed) @ self.k_proj(normed).transpose(1, 2) / math.sqrt(WIDTH) + mask
        hidden = hidden + torch.softmax(scores, -1) @ self.v_proj(normed)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


@case("forward", "blocks.0.input_layernorm", "rsqrt", rows=[6], at=RMSNorm)
class TransformerBlockRMSNormOfZeros(Sequences):
    def add(self):
        self.enc = nn.Identity()
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        causal = torch.full((5, 5), -INF).triu(1)
        self.register_buffer("causal", causal)

    def batch(self):
        batch = super().batch()
        batch["x"][6] = 0.0
        return batch

    def middle(self, hidden, batch):
        for block in self.blocks:
            hidden = block(hidden, self.causal)
        return hidden.mean(1)


@case("forward", "", "binary_cross_entropy log mul", rows=None)
class BinaryCrossEntropyByHand(Base):
    def loss(self, batch):
        p = torch.sigmoid(self.out(self.enc(batch["x"]))[:, 0] * 1e4)
        y = (batch["y"] > 1).float()
        loss = -(y * p.log() + (1 - y) * (1 - p).log())  # <<
        return loss.mean()


@case("forward", "", "mse_loss", rows=[2])
class MseOfOneHugeTarget(Base):
    """The birth has no rows: the sample has to be found by other means."""

    def batch(self):
        batch = super().batch()
        batch["t"] = torch.zeros(BATCH, 4)
        batch["t"][2] = 3e19
        return batch

    def loss(self, batch):
        return F.mse_loss(self.out(self.enc(batch["x"])), batch["t"])  # <<


@case("forward", "", "nll_loss_forward cross_entropy nll_loss", rows=None)
class TargetOfAMaskedClass(Base):
    """The gradients stay finite, the loss is infinite."""

    def loss(self, batch):
        logits = self.out(self.enc(batch["x"])).clone()
        logits[:, 0] = -INF
        return F.cross_entropy(logits, torch.zeros_like(batch["y"]))  # <<


@case("backward", "norm", "SqrtBackward0 PowBackward0", rows=[4])
class DistanceOfEqualPoints(Base):
    """Square root of a sum of squares, at zero."""

    def add(self):
        self.norm = Wrapped(lambda a, b: ((a - b) ** 2).sum(1) ** 0.5)  # <<

    def loss(self, batch):
        hidden = self.enc(batch["x"])
        other = hidden.detach().clone() + 1.0
        other[4] = hidden[4].detach()
        return self.norm(hidden, other).mean()


@case("backward", "culprit", "ExpBackward0", rows=[5])
class SoftplusByHandMaskedTooLate(Base):
    """The forward pass masks the overflow, the backward pass multiplies it by zero."""

    def add(self):
        self.culprit = Wrapped(
            lambda h: torch.where(h > 20, h, torch.log1p(torch.exp(h)))  # <<
        )

    def batch(self):
        batch = super().batch()
        batch["x"][5] *= 3000
        return batch


@case("data", "batch[1]['targets']", "", rows=[1, 6])
class NestedTargetsMaskedByWhere(Base):
    """NaN in targets, masked in the loss: the loss is finite, its gradient is not."""

    def batch(self):
        inputs = super().batch()
        targets = torch.zeros(BATCH, 4)
        targets[[1, 6], 2] = NAN
        return (inputs["x"], {"targets": targets})

    def loss(self, batch):
        x, rest = batch
        out = self.out(self.enc(x))
        error = (out - rest["targets"]) * (out * 1.0 - rest["targets"])
        return torch.where(rest["targets"].isnan(), torch.zeros(()), error).mean()


@case("data", "batch['x']", "", rows=[0])
class InfiniteSample(Base):
    """Minus infinity from a logarithm of zero in the data pipeline."""

    def batch(self):
        batch = super().batch()
        batch["x"][0, 3] = -INF
        return batch


@case("weights", "embedding.weight", "", rows=None)
class EmbeddingRowOfNaN(Base):
    def add(self):
        self.embedding = nn.Embedding(10, WIDTH)
        with torch.no_grad():
            self.embedding.weight[7] = NAN

    def middle(self, hidden, batch):
        return hidden + self.embedding(batch["y"] * 0 + 7)


@case("forward", "culprit", "div", rows=None)
class GroupOfOneStandardised(Base):
    """A deviation over a dimension of one is NaN... divided by: the deviation is to blame."""

    def add(self):
        self.culprit = Wrapped(lambda h: h / (h.mean(1, keepdim=True) - h.mean(1, keepdim=True)))  # <<


@case("forward", "culprit", "std", rows=None)
class DeviationOfASingleValue(Base):
    def add(self):
        self.culprit = Wrapped(lambda h: h / (h[:, :1].std(1, keepdim=True) + 1e-5))  # <<


@case("forward", "culprit", "mean", rows=None)
class MeanOfAnEmptySelection(Base):
    def add(self):
        self.culprit = Wrapped(lambda h: h + h[h > 1e9].mean())  # <<


@case("forward", "culprit", "var", rows=[3])
class VarianceOverflow(Base):
    """One sample's square overflows the variance of all: every row of the result is damaged."""

    def add(self):
        self.culprit = Wrapped(lambda h: h - h.var(0))  # <<

    def batch(self):
        batch = super().batch()
        batch["x"][3] *= 1e22
        return batch


@case("backward", "culprit", "div", rows=None)
class GradientHookDividesByZero(Base):
    """A hook on a tensor does it."""

    def add(self):
        self.culprit = Wrapped(self.hooked)

    def hooked(self, hidden):
        hidden = hidden * 1.0
        hidden.register_hook(lambda grad: grad / (grad - grad))  # <<
        return hidden


@case("forward", "culprit", "log", rows=[2])
class LogInsideACheckpoint(Base):
    def add(self):
        self.culprit = Wrapped(lambda h: torch.log(h.sigmoid() - 0.0))  # <<

    def loss(self, batch):
        hidden = self.enc(batch["x"])
        shift = torch.zeros(BATCH, 1)
        shift[2] = 200.0
        return self.out(checkpoint(self.culprit, hidden - shift, use_reentrant=False)).square().mean()


@case("forward", "culprit", "acos asin", rows=[7])
class AngleOutsideTheDomain(Base):
    def add(self):
        self.culprit = Wrapped(lambda h, s: torch.acos(torch.tanh(h) * s))  # <<

    def middle(self, hidden, batch):
        return self.culprit(hidden, one_row(7, 1e6, 1.0))


@case("forward", "culprit", "pow", rows=None)
class RootOfNegativeNumbers(Base):
    def add(self):
        self.culprit = Wrapped(lambda h: h**0.3)  # <<


@case("forward", "culprit.inner", "mul prod cumprod", rows=None)
class PowersByALoop(Base):
    """A recurrence that doubles its exponent."""

    def add(self):
        class Loop(nn.Module):
            def forward(self, value):
                for _ in range(12):
                    value = value * value  # <<
                return value

        class Outer(nn.Module):
            def __init__(self):
                super().__init__()
                self.inner = Loop()

            def forward(self, value):
                return self.inner(value * 20 + 3)

        self.culprit = Outer()


@case("forward", "culprit", "mul", rows=None)
class ConstantOfNaN(Base):
    def add(self):
        self.culprit = Wrapped(lambda h: h * NAN)  # <<


@case("none")
class LogOfAMaskIsHealthy(Sequences):
    """An additive mask made by a logarithm of zero."""

    def middle(self, hidden, batch):
        scores = hidden @ hidden.transpose(1, 2) + batch["keep"].float().log()[:, None]
        return (scores.softmax(-1) @ hidden).mean(1)


@case("forward", "", "_softmax softmax", rows=[2])
class LogOfAMaskAllMasked(LogOfAMaskIsHealthy):
    """The logarithm is innocent; the softmax of a row without any open position is not."""

    def batch(self):
        batch = super().batch()
        batch["keep"][2] = False
        return batch

    def middle(self, hidden, batch):
        scores = hidden @ hidden.transpose(1, 2) + batch["keep"].float().log()[:, None]
        return (scores.softmax(-1) @ hidden).mean(1)  # <<


@case("none")
class MaskedLossIsHealthy(Base):
    """NaN in rows that are left out by index."""

    def batch(self):
        batch = super().batch()
        batch["t"] = torch.zeros(BATCH, 4)
        batch["t"][2] = NAN
        return batch

    def loss(self, batch):
        good = ~batch["t"].isnan().any(1)
        return F.mse_loss(self.out(self.enc(batch["x"]))[good], batch["t"][good])
