"""Losses over probabilities, distances and lattices: generative models, policies, sequences, graphs."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Dirichlet, Normal, kl_divergence
from torch.nn import functional as F

from benchmarks.forensics.labels import BATCH, INF, LENGTH, WIDTH, Step, case
from benchmarks.forensics.layouts import _Graph, noise
from benchmarks.forensics.objectives import _Shifted, at


@case("forward", "", "div", samples=(3,), needs_remedy=True)
class MixtureDensityNetwork(_Shifted):
    """A component's deviation underflows, and the error is divided by it."""

    row, shift = 3, -200.0

    def add(self) -> None:
        self.means = nn.Linear(WIDTH, 4)
        self.shares = nn.Linear(WIDTH, 4)

    def batch(self) -> Any:
        return {**super().batch(), "t": noise(BATCH, 1)}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        hidden = self.encoder(batch["x"])
        log_sigma = self.logits(batch)
        z = (batch["t"] - self.means(hidden)) / log_sigma.exp()  # <<
        log_prob = -0.5 * z.square() - log_sigma + self.shares(hidden).log_softmax(1)
        return -log_prob.logsumexp(1).mean()


@case("forward", "", "log", samples=(2,))
class DivergenceOfALibrary(_Shifted):
    """`torch.distributions` takes the logarithm, not the line itself."""

    row, shift = 2, -200.0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        mean, spread = self.logits(batch).chunk(2, 1)
        posterior = Normal(mean - batch["shift"], spread.exp(), validate_args=False)
        return kl_divergence(posterior, Normal(torch.zeros(2), torch.ones(2))).mean()  # <<


@case("forward", "", "xlogy", samples=(5,))
class SharesOfADirichlet(Step):
    """A share of 0, which is inside of the support, and has an infinite density below a concentration of one."""

    def batch(self) -> Any:
        shares = noise(BATCH, 4).softmax(1)
        shares[5] = torch.tensor([0.0, 0.5, 0.25, 0.25])
        return {**super().batch(), "shares": shares}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        concentration = torch.sigmoid(self.head(self.encoder(batch["x"])))
        return -Dirichlet(concentration).log_prob(batch["shares"]).mean()  # <<


@case("forward", "", "log", samples=(2,))
class PoissonLossOfANegativeRate(_Shifted):
    row, shift = 2, -50.0

    def batch(self) -> Any:
        return {**super().batch(), "count": torch.ones(BATCH, 4)}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        rate = self.logits(batch) + 10.0
        return F.poisson_nll_loss(rate, batch["count"], log_input=False)  # <<


@case("forward", "", "exp", needs_remedy=True)
class LearnedTemperature(Step):
    """Kept as a logarithm, which has grown too large: no sample's fault."""

    def add(self) -> None:
        self.log_scale = nn.Parameter(torch.tensor(100.0))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        hidden = F.normalize(self.encoder(batch["x"]))
        scores = self.log_scale.exp() * (hidden @ hidden.T)  # <<
        return F.cross_entropy(scores, torch.arange(len(hidden)))


@case("forward", "", "sub", samples=(4,), never=("finite inputs",))
class RandomFieldWithoutAnyPath(Step):
    """One sequence's constraints allow no tag at one place: both scores are minus infinity."""

    def add(self) -> None:
        self.transitions = nn.Parameter(torch.zeros(4, 4))

    def batch(self) -> Any:
        allowed = torch.ones(BATCH, LENGTH, 4, dtype=torch.bool)
        allowed[4, 2] = False
        return {"x": noise(BATCH, LENGTH, WIDTH), "allowed": allowed, "y": torch.ones(BATCH, LENGTH, dtype=torch.long)}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        emissions = self.head(self.encoder(batch["x"])).masked_fill(~batch["allowed"], -INF)
        total, gold = emissions[:, 0], emissions[:, 0].gather(1, batch["y"][:, :1])[:, 0]
        for time in range(1, LENGTH):
            total = torch.logsumexp(total[:, :, None] + self.transitions, 1) + emissions[:, time]
            y = batch["y"][:, time]
            gold = gold + self.transitions[batch["y"][:, time - 1], y] + emissions[:, time].gather(1, y[:, None])[:, 0]
        return (torch.logsumexp(total, 1) - gold).mean()  # <<


@case("none")
class LatticeOfTwoImpossiblePaths(Step):
    """The loss leaves the impossible out, and the mask its gradient of NaN. First labelled as a failure."""

    def batch(self) -> Any:
        allowed = torch.ones(BATCH, 4, dtype=torch.bool)
        allowed[4] = False
        return {**super().batch(), "allowed": allowed}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        scores = self.head(self.encoder(batch["x"])).masked_fill(~batch["allowed"], -INF)
        both = torch.logaddexp(scores[:, 0], scores[:, 1])
        return -torch.where(batch["allowed"][:, 0], both, 0.0).mean()


@case("none")
class CumulatedFromAMaskedBegin(Step):
    """The gradient of NaN ends at the mask. First labelled as a failure."""

    def batch(self) -> Any:
        is_begun = torch.ones(BATCH, 4, dtype=torch.bool)
        is_begun[6, :2] = False
        return {**super().batch(), "is_begun": is_begun}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        scores = self.head(self.encoder(batch["x"])).masked_fill(~batch["is_begun"], -INF)
        return -torch.logcumsumexp(scores, 1)[:, -1].mean()


@case("none")
class SoftTimeWarpingIsHealthy(Step):
    """Its table begins with infinities, and each cell has a way that is finite."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        left, right = self.encoder(batch["x"]), batch["x"]
        cost = (left[:, :, None] - right[:, None]).square()
        table = [[torch.full((BATCH,), INF) for _ in range(WIDTH + 1)] for _ in range(WIDTH + 1)]
        table[0][0] = torch.zeros(BATCH)
        for i in range(1, WIDTH + 1):
            for j in range(1, WIDTH + 1):
                ways = torch.stack([table[i - 1][j - 1], table[i - 1][j], table[i][j - 1]])
                table[i][j] = cost[:, i - 1, j - 1] - torch.logsumexp(-ways, 0)
        return table[-1][-1].mean()


@case("forward", "", "div", samples=(3,), needs_remedy=True)
class AttentionOverEdges(_Graph):
    """A softmax by hand, without taking the largest away: all edges of one graph underflow."""

    def add(self) -> None:
        self.score = nn.Linear(2 * WIDTH, 1)

    def batch(self) -> Any:
        batch = super().batch()
        batch.edge_attr = torch.where(batch.batch[batch.edge_index[0]] == 3, -300.0, 0.0)
        return batch

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        row, col = batch.edge_index
        hidden = self.encoder(batch.x)
        weight = (self.score(torch.cat([hidden[row], hidden[col]], 1))[:, 0] + batch.edge_attr).exp()
        total = torch.zeros(len(hidden)).index_add(0, col, weight)
        share = weight / total[col]  # <<
        nodes = torch.zeros(len(hidden), WIDTH).index_add(0, col, share[:, None] * hidden[row])
        return F.cross_entropy(self.head(self.pooled(nodes, batch)), batch.y)


@case("none")
class PenaltyOnTheGradientIsHealthy(Step):
    """R1: a square without a root, through a gradient of a gradient that is zero for a dead critic."""

    def add(self) -> None:
        self.critic = nn.Sequential(nn.Linear(WIDTH, 8), nn.ReLU(), nn.Linear(8, 1))
        with torch.no_grad():
            self.critic[0].bias.fill_(-100.0)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        real = batch["x"].clone().requires_grad_()
        score = self.critic(real).sum()
        (slope,) = torch.autograd.grad(score, real, create_graph=True)
        return F.softplus(-score) + slope.square().sum(1).mean()


@case("none")
class EntropyOfMaskedActionsIsHealthy(Step):
    """The library bounds the logits of what can't be chosen."""

    def batch(self) -> Any:
        legal = torch.ones(BATCH, 4, dtype=torch.bool)
        legal[:, 1] = False
        return {**super().batch(), "legal": legal}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits = self.head(self.encoder(batch["x"])).masked_fill(~batch["legal"], -INF)
        policy = torch.distributions.Categorical(logits=logits)
        return -policy.entropy().mean() - policy.log_prob(torch.zeros(BATCH, dtype=torch.long)).mean()


@case("forward", "", "div", samples=(2,), needs_remedy=True)
class ReturnsOfAnEpisodeOfOneStep(Step):
    """The deviation of an episode's rewards, whose count less one is zero."""

    def batch(self) -> Any:
        keep = torch.ones(BATCH, LENGTH)
        keep[2, 1:] = 0.0
        return {"x": noise(BATCH, LENGTH, WIDTH), "reward": noise(BATCH, LENGTH, seed=4), "keep": keep}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        keep, reward = batch["keep"], batch["reward"]
        mean = (reward * keep).sum(1, keepdim=True) / keep.sum(1, keepdim=True)
        variance = ((reward - mean).square() * keep).sum(1) / (keep.sum(1) - 1)  # <<
        advantage = (reward - mean) / (variance.sqrt()[:, None] + 1e-8) * keep
        return -(advantage * self.head(self.encoder(batch["x"])).log_softmax(-1)[..., 0]).mean()


@case("forward", "", "cosh", samples=(1,), needs_remedy=True)
class LogCoshOfAnOutlier(_Shifted):
    row, shift = 1, 150.0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return torch.log(torch.cosh(self.logits(batch))).mean()  # <<


class Spline(nn.Module):
    """Solves a quadratic for the place inside a bin."""

    def forward(self, hidden: Tensor, y: Tensor) -> Tensor:
        a, b = F.softplus(hidden[:, 0]), F.softplus(hidden[:, 1])
        root = torch.sqrt(b.square() + 4 * a * y)  # <<
        return (root - b) / (2 * a)


@case("forward", "spline", "sqrt", samples=(5,), at=Spline, needs_remedy=True)
class InverseOfASpline(Step):
    """A value to the left of the spline's first knot."""

    def add(self) -> None:
        self.spline = Spline()

    def batch(self) -> Any:
        y = torch.linspace(0.1, 0.9, BATCH)
        y[5] = -40.0
        return {**super().batch(), "t": y}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.spline(self.encoder(batch["x"]), batch["t"]).square().mean()


@case("backward", "", "PowBackward1", samples=(6,), needs_remedy=True)
class FocusThatIsLearned(_Shifted):
    """A focal loss whose exponent is a parameter below one, at a prediction that is certain."""

    row, shift = 6, 60.0

    def add(self) -> None:
        self.focus = nn.Parameter(torch.tensor(0.5))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        scores = self.head(self.encoder(batch["x"]))
        scores = torch.cat([scores[:, :1] + batch["shift"], scores[:, 1:]], 1)
        p = scores.softmax(1)[:, 0]
        return -((1 - p) ** self.focus * torch.log(p)).mean()  # <<


@case("forward", "", "xlogy", samples=(3,), needs_remedy=True)
class NegativeTargetOfADivergence(Step):
    """Smoothing of labels that overshoots."""

    def batch(self) -> Any:
        target = torch.full((BATCH, 4), 0.25)
        target[3] = torch.tensor([-0.1, 0.4, 0.4, 0.3])
        return {**super().batch(), "target": target}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        scores = self.head(self.encoder(batch["x"])).log_softmax(1)
        return F.kl_div(scores, batch["target"], reduction="batchmean")  # <<


@case("forward", "", "log", samples=(1,), needs_remedy=True)
class SurvivalAfterACertainEvent(_Shifted):
    """A hazard of one leaves nobody."""

    row, shift = 1, 40.0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        survival = torch.cumprod(1 - torch.sigmoid(self.logits(batch)), 1)
        return -torch.log(survival).mean()  # <<


@case("forward", "", "reciprocal", samples=(3,), needs_remedy=True)
class OptimalTransportOfAFarSample(Step):
    """Its row of the kernel underflows, and scaling divides by the row's sum."""

    def add(self) -> None:
        self.prototypes = nn.Parameter(noise(5, WIDTH))

    def batch(self) -> Any:
        return {**super().batch(), "far": at(3, 300.0)}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        hidden = self.encoder(batch["x"])
        cost = (hidden[:, None] - self.prototypes).square().sum(-1) + batch["far"]
        kernel = torch.exp(-cost)
        v = torch.ones(5)
        for _ in range(3):
            u = 1.0 / (kernel @ v)  # <<
            v = 1.0 / (kernel.T @ u)
        return (u[:, None] * kernel * v * cost).mean()


@case("backward", "", "AcoshBackward0", samples=(4,), needs_remedy=True)
class DistanceInTheHyperbolicPlane(Step):
    """Of a point from itself."""

    def batch(self) -> Any:
        return {**super().batch(), "apart": at(4, 0.0, 1.0)}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        apart = (self.encoder(batch["x"]) * batch["apart"]).square().sum(1)
        return torch.acosh(1 + 2 * apart).mean()  # <<


@case("forward", "", "reciprocal", samples=(3,), needs_remedy=True)
class WeightsByInverseDistance(Step):
    """A query that is one of the anchors."""

    def add(self) -> None:
        self.anchors = nn.Parameter(noise(5, WIDTH))

    def batch(self) -> Any:
        batch = super().batch()
        batch["x"][3] = noise(5, WIDTH)[2]
        return batch

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        weight = 1 / torch.cdist(batch["x"], self.anchors)  # <<
        share = weight / weight.sum(1, keepdim=True)
        return F.cross_entropy(self.head(share @ self.anchors), batch["y"])


@case("none")
class DistancesOfEqualPointsAreHealthy(Step):
    """torch gives `cdist` a gradient of zero there."""

    def batch(self) -> Any:
        batch = super().batch()
        batch["x"][1:4] = batch["x"][0]
        return batch

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        hidden = self.encoder(batch["x"])
        return torch.cdist(hidden, hidden).mean()


@case("forward", "", "reciprocal", needs_remedy=True)
class DiscountedGain(Step):
    """The logarithm of the first rank is zero, in each list."""

    def batch(self) -> Any:
        return {**super().batch(), "gain": noise(BATCH, 4).abs()}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        scores = self.head(self.encoder(batch["x"]))
        rank = scores.argsort(1, descending=True).argsort(1) + 1
        discount = 1.0 / torch.log2(rank.float())  # <<
        return -(scores.softmax(1) * batch["gain"] * discount).mean()


@case("none")
class WeightOfAnAbsentClassIsHealthy(Step):
    """It is infinite, and no target asks for it."""

    def batch(self) -> Any:
        return {**super().batch(), "y": torch.arange(BATCH) % 3}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        weight = 1.0 / torch.bincount(batch["y"], minlength=4)
        return F.cross_entropy(self.head(self.encoder(batch["x"])), batch["y"], weight=weight)


@case("forward", "", "reciprocal", needs_remedy=True)
class WeightOfAnAbsentClassWithSmoothedLabels(WeightOfAnAbsentClassIsHealthy):
    """Now every class counts."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        weight = 1.0 / torch.bincount(batch["y"], minlength=4)  # <<
        scores = self.head(self.encoder(batch["x"]))
        return F.cross_entropy(scores, batch["y"], weight=weight, label_smoothing=0.1)


@case("forward", "", "div", needs_remedy=True)
class NoPositiveOfOneLabel(Step):
    """The share of negatives to positives of a label that nobody in the batch has."""

    def batch(self) -> Any:
        target = (noise(BATCH, 4) > 0).float()
        target[:, 2] = 0.0
        return {**super().batch(), "target": target}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        positive = batch["target"].sum(0)
        balance = (len(batch["x"]) - positive) / positive  # <<
        scores = self.head(self.encoder(batch["x"]))
        return F.binary_cross_entropy_with_logits(scores, batch["target"], pos_weight=balance)


@case("none")
class ZeroVarianceOfGaussianLossIsHealthy(Step):
    """`gaussian_nll_loss` bounds it."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        mean = self.head(self.encoder(batch["x"]))
        return F.gaussian_nll_loss(mean, torch.zeros_like(mean), mean.detach() * 0.0)


@case("none")
class PerplexityThatOverflowsIsHealthy(Step):
    """It is logged, and nothing is made of it."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = 100.0 + F.cross_entropy(self.head(self.encoder(batch["x"])), batch["y"])
        self.log("perplexity", loss.exp())
        return loss


@case("forward", "", "exp", samples=(7,), needs_remedy=True)
class KLWeightThatIsStillZero(_Shifted):
    """A term that overflows counts nothing yet: infinity times zero."""

    row, shift = 7, 120.0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        log_variance = self.logits(batch)
        divergence = 0.5 * (log_variance.exp() - 1 - log_variance).sum(1)  # <<
        return log_variance.mean() * 0.01 + 0.0 * divergence.mean()


@case("forward", "", "mse_loss")
class NoLabelledPixel(Step):
    """A selection that is empty, and its mean."""

    def batch(self) -> Any:
        return {**super().batch(), "is_labelled": torch.zeros(BATCH, 4, dtype=torch.bool), "t": noise(BATCH, 4)}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        scores = self.head(self.encoder(batch["x"]))
        chosen = batch["is_labelled"]
        return F.mse_loss(scores[chosen], batch["t"][chosen])  # <<


@case("data", "batch['t']", samples=(3,))
class NanMeanOfSquares(Step):
    """It leaves missing targets out of the loss, and not out of the gradients."""

    def batch(self) -> Any:
        target = noise(BATCH, 4)
        target[3, 1] = math.nan
        return {**super().batch(), "t": target}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return ((self.head(self.encoder(batch["x"])) - batch["t"]) ** 2).nanmean()
