"""A third set: losses, linear algebra, normalisations, layers of `torch.nn`, and shapes of batches."""

from __future__ import annotations

import torch
from cases import BATCH, INF, NAN, WIDTH, Base, Sequences, Wrapped, case, one_row
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


@case("forward", "", "div", [2])
class DiceOfNothing(Base):
    def loss(self, batch):
        p = self.out(self.enc(batch["x"])).softmax(1) * one_row(2, 0.0, 1.0)
        y = F.one_hot(batch["y"], 4) * one_row(2, 0.0, 1.0)
        return (1 - 2 * (p * y).sum(1) / (p.sum(1) + y.sum(1))).mean()  # <<


@case("forward", "", "div", [2])
class CosineOfZero(Base):
    def loss(self, batch):
        hidden = self.enc(batch["x"]) * one_row(2, 0.0, 1.0)
        unit = hidden / hidden.norm(dim=1, keepdim=True)  # <<
        return F.cross_entropy(self.out(unit), batch["y"])


@case("backward", "", "NormBackward0 LinalgVectorNormBackward0 SqrtBackward0 PowBackward0 DivBackward0", [4])
class DistanceToItself(Base):
    """x ** 0.5 of zero."""

    def loss(self, batch):
        hidden = self.enc(batch["x"])
        shift = one_row(4, 0.0, 1.0)
        return (((hidden * shift) ** 2).sum(1) ** 0.5).mean()  # <<


@case("backward", "culprit", "SqrtBackward0", [1])
class RootMaskedTooLate(Base):
    def add(self):
        self.culprit = Wrapped(lambda h: torch.where(h > 0, h.clamp_min(0).sqrt(), 0.0 * h))  # <<

    def middle(self, hidden, batch):
        return self.culprit(hidden.abs() * one_row(1, 0.0, 1.0) + one_row(1, 0.0, 0.1))


@case("backward", "culprit", "LogBackward0", [1])
class LogMaskedTooLate(Base):
    def add(self):
        self.culprit = Wrapped(lambda h: torch.where(h > 0, h.log(), torch.zeros_like(h)))  # <<

    def middle(self, hidden, batch):
        return self.culprit((hidden.abs() + 0.1) * one_row(1, 0.0, 1.0))


@case("forward", "temperature", "div", None)
class TemperatureOfZero(Base):
    def add(self):
        class Temperature(nn.Module):
            def __init__(self):
                super().__init__()
                self.value = nn.Parameter(torch.zeros(()))

            def forward(self, h):
                return h / self.value  # <<

        self.temperature = Temperature()

    def middle(self, hidden, batch):
        return self.temperature(hidden)


@case("backward", "culprit", "LinalgEighBackward0", None)
class EqualEigenvalues(Base):
    def add(self):
        self.culprit = Wrapped(lambda m: torch.linalg.eigh(m)[1])  # <<

    def loss(self, batch):
        hidden = self.enc(batch["x"]).mean()
        return self.culprit(torch.eye(3) * (hidden + 2)).cumsum(0).sin().sum() + (self.out.weight**2).sum()


@case("forward", "", "log", None)
class LogDetOfSingular(Base):
    def loss(self, batch):
        hidden = self.enc(batch["x"])
        m = hidden.T @ hidden
        m = m * 0 + 1.0
        return torch.det(m).log()  # <<


@case("forward", "", "log", [6])
class FocalLoss(Base):
    def loss(self, batch):
        p = torch.sigmoid(self.out(self.enc(batch["x"]))[:, 0] * one_row(6, 0.0, 1.0)[:, 0] - one_row(6, 200.0, 0.0)[:, 0])
        return -((1 - p) ** 2 * p.log()).mean()  # <<


@case("forward", "", "reciprocal", [2])
class BceWithInfiniteWeight(Base):
    def loss(self, batch):
        weight = one_row(2, 0.0, 1.0).reciprocal()  # <<
        logits = self.out(self.enc(batch["x"]))[:, :1]
        return F.binary_cross_entropy_with_logits(logits, (batch["y"] > 1).float()[:, None], weight=weight)


@case("forward", "conv", "convolution mkldnn_convolution _convolution conv1d", [3])
class ConvolutionOverflow(Base):
    def add(self):
        self.conv = nn.Conv1d(1, 4, 3, padding=1)
        with torch.no_grad():
            self.conv.weight.mul_(1e3)

    def middle(self, hidden, batch):
        return self.conv((hidden * one_row(3, 1e38, 1.0))[:, None]).mean(1)  # <<


@case("weights", "conv.bias")
class BiasOfInf(Base):
    def add(self):
        self.conv = nn.Conv1d(1, 1, 3, padding=1)
        with torch.no_grad():
            self.conv.bias[0] = INF

    def middle(self, hidden, batch):
        return self.conv(hidden[:, None])[:, 0]


@case("weights", "bn.running_var")
class RunningVarianceOfNaN(Base):
    def add(self):
        self.bn = nn.BatchNorm1d(WIDTH).eval()
        self.bn.running_var[2] = NAN

    def middle(self, hidden, batch):
        self.bn.eval()
        return self.bn(hidden)


@case("data", "batch[1]", rows=[7])
class InfiniteTarget(Base):
    def batch(self):
        targets = torch.zeros(BATCH, 4)
        targets[7, 1] = INF
        return [super().batch()["x"], targets]

    def loss(self, batch):
        return F.mse_loss(self.out(self.enc(batch[0])), batch[1])


@case("data", "batch['mask']", rows=[4])
class WeightsOfSamplesWithNaN(Base):
    def batch(self):
        batch = super().batch()
        batch["mask"] = torch.ones(BATCH)
        batch["mask"][4] = NAN
        return batch

    def loss(self, batch):
        return (F.cross_entropy(self.out(self.enc(batch["x"])), batch["y"], reduction="none") * batch["mask"]).mean()


@case("data", "batch['x']", rows=[4])
class NaNLosesItselfInTheForwardPass(Base):
    """relu of a comparison hides it: the loss is finite."""

    def batch(self):
        batch = super().batch()
        batch["x"][4] = NAN
        return batch

    def loss(self, batch):
        loss = F.cross_entropy(self.out(self.enc(batch["x"])), batch["y"], reduction="none")
        return torch.where(loss.isnan(), torch.zeros(()), loss).sum()


@case("none")
class ScaledDotProductAllMaskedIsHealthy(Sequences):
    """torch guards this one."""

    def add(self):
        self.attn = nn.Identity()

    def __init__(self):
        super().__init__()
        self.attn = Wrapped(lambda h, m: F.scaled_dot_product_attention(h, h, h, attn_mask=m))

    def batch(self):
        batch = super().batch()
        batch["bias"] = torch.zeros(BATCH, 1, 5, 5)
        batch["bias"][:, :, :, 4:] = -INF
        batch["bias"][1] = -INF
        return batch

    def middle(self, hidden, batch):
        return self.attn(hidden[:, None], batch["bias"]).mean((1, 2))


@case("none")
class EncoderLayerAllPaddingIsHealthy(Sequences):
    """And this one."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 32, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def middle(self, hidden, batch):
        mask = torch.zeros(BATCH, 5).masked_fill(~batch["keep"], -INF)
        scores = mask[:, None].expand(-1, 5, -1).repeat_interleave(2, 0)
        return self.encoder(hidden, mask=scores).mean(1)  # <<

    def batch(self):
        batch = super().batch()
        batch["keep"][2] = False
        return batch


@case("forward", "", "mul", [5])
class ZeroTimesInfinity(Base):
    """Each factor is a legal value of its own."""

    def loss(self, batch):
        ratio = self.out(self.enc(batch["x"])).exp() * one_row(5, 1e38, 1.0)
        ratio = ratio * 1e10  # <<
        return (ratio * one_row(5, 0.0, 1.0)).mean()


@case("backward", "body", "SqrtBackward0", [2])
class RootInAReentrantCheckpoint(Base):
    def add(self):
        self.body = Wrapped(lambda h: (h * h).sum(1).sqrt())  # <<

    def loss(self, batch):
        return checkpoint(self.body, self.enc(batch["x"]) * one_row(2, 0.0, 1.0), use_reentrant=True).mean()


@case("backward", "", "PowBackward0 LinalgVectorNormBackward0 NormBackward1 SqrtBackward0", [3])
class GradientPenalty(Base):
    """The slope of the norm of a gradient that is zero."""

    def loss(self, batch):
        x = (batch["x"] * one_row(3, 0.0, 1.0)).requires_grad_()
        score = (self.enc(x).square().sum(1) * one_row(3, 0.0, 1.0)[:, 0]).sum()
        (grad,) = torch.autograd.grad(score, x, create_graph=True)
        return (grad.square().sum(1).sqrt() - 1).square().mean()  # <<


@case("forward", "", "std", None)
class ContrastiveOfOne(Base):
    def batch(self):
        return {key: value[:1] for key, value in super().batch().items()}

    def loss(self, batch):
        hidden = self.enc(batch["x"])
        return (hidden / hidden.std(0)).sum()  # <<


@case("forward", "", "_log_softmax log_softmax logsumexp sub", [0])
class LogSoftmaxOfInf(Base):
    def loss(self, batch):
        logits = self.out(self.enc(batch["x"]))
        allowed = torch.ones(BATCH, 4, dtype=torch.bool)
        allowed[:, 2] = False
        allowed[0] = False
        return F.log_softmax(logits.masked_fill(~allowed, -INF), 1)[:, 0].mean()  # <<


@case("forward", "wn.parametrizations.weight.0", "div _weight_norm_interface _weight_norm", None)
class WeightNormOfZero(Base):
    def add(self):
        self.wn = nn.utils.parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH))
        with torch.no_grad():
            self.wn.parametrizations.weight.original1.zero_()

    def middle(self, hidden, batch):
        return self.wn(hidden)  # <<


class InPlaceDivision(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y):
        return x / y  # <<

    @staticmethod
    def backward(ctx, grad):
        return grad, None


@case("forward", "culprit", "div", [6], at=InPlaceDivision)
class ForwardOfTheUsersOwn(Base):
    def add(self):
        self.culprit = Wrapped(lambda h: InPlaceDivision.apply(h, one_row(6, 0.0, 1.0)))


@case("forward", "culprit", "div_ div", [6])
class DivisionInPlace(Base):
    def add(self):
        self.culprit = Wrapped(self.divide)

    def divide(self, hidden):
        hidden = hidden * 1.0
        hidden /= one_row(6, 0.0, 1.0)  # <<
        return hidden


@case("forward", "", "sum cumsum", None)
class SumOverflowOfHalf(Base):
    def loss(self, batch):
        hidden = self.enc(batch["x"]).half().abs() + 60000.0
        return hidden.cumsum(0).float().mean()  # <<


@case("forward", "cast", "_to_copy", [1])
class CastOverflow(Base):
    def add(self):
        self.cast = Wrapped(lambda h: h.half().float())  # <<

    def middle(self, hidden, batch):
        return self.cast(hidden * one_row(1, 1e7, 1.0))


@case("forward", "head.prob", "log", [3, 7])
class LogOfProbabilities(Base):
    def add(self):
        self.head = nn.ModuleDict({"prob": Wrapped(lambda p: torch.log(p))})  # noqa: PLW0108 # <<

    def middle(self, hidden, batch):
        scale = torch.ones(BATCH, 1)
        scale[[3, 7]] = 0.0
        return self.head["prob"](hidden.sigmoid() * scale)


@case("none")
class NanToNumIsHealthy(Base):
    """Damage that is removed, also from the gradients."""

    def middle(self, hidden, batch):
        return torch.nan_to_num((hidden / 0.0).detach()) * 0 + hidden
