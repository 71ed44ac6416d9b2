"""Losses, distributions, number types: where what is minimised stops being a number."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.forensics.labels import BATCH, INF, LENGTH, NAN, WIDTH, Step, case
from benchmarks.forensics.layouts import noise


def at(row: int | tuple[int, ...], value: float, other: float = 0.0) -> Tensor:
    """[BATCH, 1]: one value in some rows, another in the rest."""
    made = torch.full((BATCH, 1), other)
    made[list(row) if isinstance(row, tuple) else row] = value
    return made


class _Shifted(Step):
    """A column of the batch is added to what the head gives."""

    row: int = 0
    shift = 0.0

    def batch(self) -> Any:
        return {**super().batch(), "shift": at(self.row, self.shift)}

    def logits(self, batch: Any) -> Tensor:
        return self.head(self.encoder(batch["x"])) + batch["shift"]


@case("forward", "", "log", samples=(6,))
class FocalLossByHand(_Shifted):
    row, shift = 6, -200.0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        p = torch.sigmoid(self.logits(batch))[:, 0]
        return -((1 - p) ** 2 * torch.log(p)).mean()  # <<


@case("forward", "", "exp")
class ColdContrast(Step):
    """A temperature of a thousandth: each sample's likeness to itself overflows."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        hidden = F.normalize(self.encoder(batch["x"]))
        likeness = torch.exp(hidden @ hidden.T / 0.001)  # <<
        return -torch.log(likeness.diagonal() / likeness.sum(1)).mean()


@case("forward", "", "div", samples=(6,))
class ClassOfOneInAContrast(Step):
    """A mean over the other samples of its class; there is none."""

    def batch(self) -> Any:
        return {**super().batch(), "y": torch.tensor([0, 0, 1, 1, 2, 2, 3, 0])}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        hidden = F.normalize(self.encoder(batch["x"]))
        scores = (hidden @ hidden.T).fill_diagonal_(-1e4).log_softmax(1)
        positive = (batch["y"][:, None] == batch["y"][None]).float().fill_diagonal_(0.0)
        return -((positive * scores).sum(1) / positive.sum(1)).mean()  # <<


@case("backward", "", "SqrtBackward0", samples=(4,))
class TripletOfEqualAnchorAndPositive(Step):
    def batch(self) -> Any:
        triplets = noise(BATCH, 3, WIDTH)
        triplets[4, 1] = triplets[4, 0]
        return triplets

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        anchor, positive, negative = self.encoder(batch).unbind(1)
        near = (anchor - positive).square().sum(1).sqrt()  # <<
        far = (anchor - negative).square().sum(1).add(1e-6).sqrt()
        return (near - far + 1.0).mean()


@case("forward", "", "_ctc_loss", samples=(5,))
class TooFewFramesForATranscript(Step):
    """Time first, with lengths of inputs and targets."""

    def add(self) -> None:
        self.rnn = nn.GRU(WIDTH, WIDTH)

    def batch(self) -> Any:
        frames = torch.full((BATCH,), 12)
        frames[5] = 1
        targets = torch.randint(1, 4, (BATCH, 3), generator=torch.Generator().manual_seed(1))
        return {"x": noise(12, BATCH, WIDTH), "targets": targets, "frames": frames, "long": torch.full((BATCH,), 3)}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        scores = self.head(self.rnn(batch["x"])[0]).log_softmax(-1)
        return F.ctc_loss(scores, batch["targets"], batch["frames"], batch["long"])  # <<


@case("forward", "", "atanh", samples=(3,))
class ActionAtItsBound(Step):
    """The density of an action that an environment has clipped to 1."""

    def batch(self) -> Any:
        batch = super().batch()
        batch["action"] = torch.tanh(noise(BATCH, 4))
        batch["action"][3, 2] = 1.0
        return batch

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        before = torch.atanh(batch["action"])  # <<
        return (before - self.head(self.encoder(batch["x"]))).square().mean()


@case("forward", "", "log", samples=(7,))
class SquashedPolicy(_Shifted):
    """The correction of a tanh that has saturated."""

    row, shift = 7, 30.0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        before = self.logits(batch)
        correction = torch.log(1 - torch.tanh(before).square())  # <<
        return (0.01 * before.square() + correction).sum(1).mean()


@case("backward", "", "ExpBackward0", samples=(1,))
class RatioOfPolicies(_Shifted):
    """Clipping takes the finite one of the two, and the gradient of the other is zero times infinity."""

    row, shift = 1, 200.0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        ratio = self.logits(batch)[:, 0].exp()  # <<
        return -torch.min(ratio * 0.5, ratio.clamp(0.8, 1.2) * 0.5).mean()


@case("forward", "", "std")
class AdvantageOfASingleStep(Step):
    def batch(self) -> Any:
        return {name: it[:1] for name, it in super().batch().items()}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        value = self.head(self.encoder(batch["x"]))[:, 0]
        return ((value - value.mean()) / (value.std() + 1e-8)).mean()  # <<


@case("forward", "", "log", samples=(4,))
class SpectrumOfSilence(Step):
    def batch(self) -> Any:
        wave = noise(BATCH, 32)
        wave[4] = 0.0
        return wave, torch.zeros(BATCH, dtype=torch.long)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loudness = torch.fft.rfft(batch[0]).abs().log()[:, :WIDTH]  # <<
        return F.cross_entropy(self.head(self.encoder(loudness)), batch[1])


@case("forward", "", "div", samples=(4,))
class PhaseOfSilence(Step):
    """A complex number over its own magnitude."""

    def batch(self) -> Any:
        wave = noise(BATCH, 32)
        wave[4] = 0.0
        return wave, torch.zeros(BATCH, dtype=torch.long)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        spectrum = torch.fft.rfft(batch[0])
        phase = spectrum / spectrum.abs()  # <<
        return F.cross_entropy(self.head(self.encoder(torch.view_as_real(phase).flatten(1)[:, :WIDTH])), batch[1])


@case("forward", "", "bmm", samples=(2,), says=("float16",))
class ScoresBeyondFloat16(Step):
    def add(self) -> None:
        self.gain = nn.Parameter(torch.ones(WIDTH))

    def batch(self) -> Any:
        x = noise(BATCH, LENGTH, WIDTH)
        x[2] *= 300.0
        return x, torch.zeros(BATCH, dtype=torch.long)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        hidden = batch[0] * self.gain
        with torch.autocast("cpu", torch.float16):
            scores = hidden @ hidden.transpose(1, 2)  # <<
        return F.cross_entropy(self.head((scores.float().softmax(-1) @ hidden).mean(1)), batch[1])


@case("forward", "", "log", samples=(5,))
class BrainFloatRoundsToOne(_Shifted):
    row, shift = 5, 20.0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            p = torch.sigmoid(self.logits(batch).bfloat16())
        return -torch.log(1 - p).mean()  # <<


@case("forward", "", "log")
class LogarithmOfWeightNorms(Step):
    """A penalty on the norms of all parameters, of which one is a bias of zero."""

    def add(self) -> None:
        nn.init.zeros_(self.head.bias)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        sizes = torch.stack([it.square().sum() for it in self.parameters()])
        return super().training_step(batch, batch_idx) + 1e-3 * torch.log(sizes).sum()  # <<


@case("backward", "", "LinalgEighBackward0")
class WhitenedByEqualEigenvalues(Step):
    def add(self) -> None:
        self.covariance = nn.Parameter(torch.eye(WIDTH))

    def middle(self, hidden: Tensor, batch: Any) -> Tensor:
        values, vectors = torch.linalg.eigh(self.covariance)  # <<
        return hidden @ vectors / values.sqrt()


@case("forward", "", "log", samples=(5,))
class LikelihoodOfASequence(_Shifted):
    """A product of probabilities, of which one is zero."""

    row, shift = 5, -200.0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        likelihood = torch.sigmoid(self.logits(batch)).prod(1)
        return -torch.log(likelihood).mean()  # <<


@case("forward", "", "log", samples=(6,))
class MixtureByHand(_Shifted):
    """The logarithm of a sum of exponentials, all of which are zero."""

    row, shift = 6, -1000.0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return -torch.log(torch.exp(self.logits(batch)).sum(1)).mean()  # <<


class _Gumbel(Step):
    drawn = 1.0

    def batch(self) -> Any:
        batch = super().batch()
        batch["u"] = torch.rand(BATCH, 4, generator=torch.Generator().manual_seed(2)).clamp(0.01, 0.99)
        batch["u"][3, 1] = self.drawn
        return batch

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        gumbel = -torch.log(-torch.log(batch["u"]))  # <<
        return (self.head(self.encoder(batch["x"])) + gumbel).softmax(1)[:, 0].mean()


@case("forward", "", "log", samples=(3,), at=_Gumbel)
class GumbelOfOne(_Gumbel):
    """Its first logarithm is zero, and its second infinite."""


@case("none")
class GumbelOfZeroIsHealthy(_Gumbel):
    """Minus infinity is a class that is never chosen."""

    drawn = 0.0


@case("forward", "", "lgamma")
class DispersionOfZero(Step):
    """A negative binomial distribution whose dispersion has underflowed."""

    def add(self) -> None:
        self.log_dispersion = nn.Parameter(torch.full((4,), -200.0))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        r = self.log_dispersion.exp()
        counts = batch["y"].float()[:, None]
        rest = torch.lgamma(counts + 1) + self.head(self.encoder(batch["x"]))
        return (torch.lgamma(r) + rest).mean()  # <<


@case("forward", "", "xlogy", samples=(2,))
class DensityOfABetaDistribution(Step):
    """At its border, below a parameter of one."""

    def batch(self) -> Any:
        batch = super().batch()
        batch["t"] = torch.sigmoid(noise(BATCH, 4))
        batch["t"][2, 3] = 0.0
        return batch

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        alpha = torch.sigmoid(self.head(self.encoder(batch["x"])))
        return -torch.xlogy(alpha - 1, batch["t"]).mean()  # <<


@case("backward", "", "PowBackward0", samples=(1,))
class FourthRootOfAResidual(Step):
    def batch(self) -> Any:
        return {**super().batch(), "scale": at(1, 0.0, 1.0)}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        error = self.head(self.encoder(batch["x"])) * batch["scale"]
        return error.square().pow(0.25).mean()  # <<


@case("backward", "", "HypotBackward0", samples=(3,))
class LengthOfNoDisplacement(Step):
    def batch(self) -> Any:
        return {**super().batch(), "scale": at(3, 0.0, 1.0)}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        dx, dy = (self.head(self.encoder(batch["x"])) * batch["scale"])[:, :2].unbind(1)
        return torch.hypot(dx, dy).mean()  # <<


@case("forward", "", "div", samples=(4,))
class ProjectedFromTheCamerasPlane(Step):
    """Points at depth zero have no place in the image that is sampled."""

    def batch(self) -> Any:
        points = noise(BATCH, 3, 3, 3)
        points[4, 1, 1, 2] = 0.0
        return {"points": points, "images": noise(BATCH, 4, 6, 6)}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        place = batch["points"][..., :2] / batch["points"][..., 2:]  # <<
        features = F.grid_sample(batch["images"], place * self.head.weight.mean(), align_corners=False)
        return self.head(F.pad(features.mean((2, 3)), (0, 2))).square().mean()


@case("forward", "", "log", samples=(2, 5))
class DepthWithoutMeasurement(Step):
    """Invalid pixels are zero; the mask comes after the logarithm, as a product."""

    def batch(self) -> Any:
        depth = noise(BATCH, 4).abs() + 0.5
        depth[2, 1], depth[5, 3] = 0.0, 0.0
        return {**super().batch(), "depth": depth}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        truth = torch.log(batch["depth"])  # <<
        error = self.head(self.encoder(batch["x"])) - truth
        return (error * (batch["depth"] > 0)).square().mean()


@case("none")
class RobustLossIsHealthy(Step):
    """A small number under the root keeps its slope finite."""

    def batch(self) -> Any:
        return {**super().batch(), "scale": at(3, 0.0, 1.0)}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return (self.head(self.encoder(batch["x"])) * batch["scale"]).square().add(1e-6).sqrt().mean()


@case("forward", "")
class SmoothedLabelsOfAMaskedClass(Step):
    """Smoothing gives each class a share, and one has a logit of minus infinity."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        mask = torch.tensor([False, False, False, True])
        scores = self.head(self.encoder(batch["x"])).masked_fill(mask, -INF)
        return F.cross_entropy(scores, batch["y"].clamp_max(2), label_smoothing=0.1)  # <<


@case("forward", "", "log", has_open_samples=True)
class DivergenceFromACertainModel(Step):
    """A softmax that has underflowed to zero."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        scores = (self.head(self.encoder(batch["x"])) * 1e4).softmax(1).log()  # <<
        return F.kl_div(scores, F.one_hot(batch["y"], 4).float(), reduction="batchmean")


@case("forward", "", "exp", samples=(4,))
class ActionsCannotBeDrawn(_Shifted):
    """What is seen is an exception of torch's."""

    row, shift = 4, 200.0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        weight = self.logits(batch).exp()  # <<
        share = weight / weight.sum(1, keepdim=True)
        action = torch.multinomial(share, 1)
        return -share.gather(1, action).log().mean()


@case("forward", "", "_to_copy", samples=(3,))
class DoubleInTheBatch(Step):
    """A number of float64 that no float32 holds."""

    def batch(self) -> Any:
        batch = super().batch()
        batch["x"] = batch["x"].double()
        batch["x"][3, 1] = 1e300
        return batch

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x = batch["x"].float()  # <<
        return F.cross_entropy(self.head(self.encoder(x)), batch["y"])


@case("data", "batch['views'][1]", samples=(2,))
class NestedViews(Step):
    def batch(self) -> Any:
        views = (noise(BATCH, WIDTH), noise(BATCH, WIDTH, seed=4))
        views[1][2, 5] = INF
        return {"views": views, "y": torch.zeros(BATCH, dtype=torch.long)}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        first, second = (self.encoder(view) for view in batch["views"])
        return F.cross_entropy(self.head(first + second), batch["y"])


@case("none")
class MissingValuesAreLearned(Step):
    """`where` takes a parameter for each value that is NaN."""

    def add(self) -> None:
        self.instead = nn.Parameter(torch.zeros(WIDTH))

    def batch(self) -> Any:
        batch = super().batch()
        batch["x"][4, 1] = NAN
        return batch

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x = torch.where(batch["x"].isnan(), self.instead, batch["x"])
        return F.cross_entropy(self.head(self.encoder(x)), batch["y"])


@case("data", "batch['t']", samples=(3,))
class MissingTargetTimesZero(Step):
    def batch(self) -> Any:
        target = torch.zeros(BATCH, 4)
        target[3, 2] = NAN
        return {**super().batch(), "t": target, "known": (~target.isnan()).float()}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return ((self.head(self.encoder(batch["x"])) - batch["t"]) * batch["known"]).square().mean()


@case("forward", "", "reciprocal", samples=(2,))
class WeightByInverseVariance(Step):
    def batch(self) -> Any:
        return {**super().batch(), "variance": at(2, 0.0, 1.0)}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        weight = 1.0 / batch["variance"]  # <<
        return (self.head(self.encoder(batch["x"])).square() * weight).mean()


@case("forward", "", "div", samples=(7,))
class ErrorInPercent(Step):
    """Of a target that is zero, and a prediction that is not."""

    def batch(self) -> Any:
        target = noise(BATCH, 4).abs() + 0.5
        target[7, 0] = 0.0
        return {**super().batch(), "t": target}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return ((self.head(self.encoder(batch["x"])) - batch["t"]).abs() / batch["t"]).mean()  # <<


@case("forward", "", "sinh", samples=(0,))
class HyperbolicEmbedding(_Shifted):
    row, shift = 0, 100.0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return torch.sinh(self.logits(batch)).square().mean()  # <<


@case("forward", "", "square pow", samples=(6,))
class CubeOfAnError(_Shifted):
    row, shift = 6, 1e25

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        error = self.logits(batch)
        return (error * error.abs().square()).mean()  # <<


@case("backward", "", "NormBackward0 LinalgVectorNormBackward0 PowBackward0", samples=(3,))
class NormOfOrderOneHalf(Step):
    """The slope of a root at zero, inside `pow`."""

    def batch(self) -> Any:
        return {**super().batch(), "scale": at(3, 0.0, 1.0)}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        hidden = self.head(self.encoder(batch["x"])) * batch["scale"]
        return hidden.abs().pow(0.5).sum(1).square().mean()  # <<


@case("forward", "", "logit", samples=(1,))
class TargetsAsLogits(Step):
    def batch(self) -> Any:
        target = torch.sigmoid(noise(BATCH, 4))
        target[1, 0] = 1.0
        return {**super().batch(), "t": target}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.l1_loss(self.head(self.encoder(batch["x"])), torch.logit(batch["t"]))  # <<


@case("forward", "", "pow", samples=(5,))
class GammaCorrection(Step):
    """A negative pixel to a broken power."""

    def batch(self) -> Any:
        images = noise(BATCH, 1, 4, 4).abs()
        images[5, 0, 2, 2] = -0.01
        return images, torch.zeros(BATCH, dtype=torch.long)

    def add(self) -> None:
        self.conv = nn.Conv2d(1, WIDTH, 3)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        bright = batch[0] ** (1 / 2.2)  # <<
        return F.cross_entropy(self.head(self.conv(bright).mean((2, 3))), batch[1])


@case("forward", "", "log1p", samples=(4,))
class ReturnsOfAPortfolio(Step):
    """A share that has lost all."""

    def batch(self) -> Any:
        returns = noise(BATCH, LENGTH, WIDTH).clamp(-0.5, 0.5)
        returns[4, 2, 1] = -1.0
        return returns, torch.zeros(BATCH, dtype=torch.long)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        growth = torch.log1p(batch[0]).sum(1)  # <<
        return F.cross_entropy(self.head(self.encoder(growth)), batch[1])


@case("forward", "", "acos", samples=(6,))
class AngleBetweenRotations(Step):
    """A trace that is a little above three, by rounding."""

    def batch(self) -> Any:
        rotations = torch.eye(3).repeat(BATCH, 1, 1)
        angle = torch.linspace(0.3, 1.0, BATCH)
        rotations[:, 0, 0], rotations[:, 1, 1] = angle.cos(), angle.cos()
        rotations[6] = torch.eye(3) * (1 + 1e-6)
        return {**super().batch(), "rotations": rotations}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        trace = batch["rotations"].diagonal(dim1=1, dim2=2).sum(1)
        angle = torch.acos((trace - 1) / 2)  # <<
        return (self.head(self.encoder(batch["x"]))[:, 0] - angle / math.pi).square().mean()


@case("forward", "", "nll_loss_forward")
class NoTokenLeft(Step):
    """All targets are ignored: a mean over nothing, and no sample's fault."""

    def batch(self) -> Any:
        return {"x": noise(BATCH, LENGTH, WIDTH), "y": torch.full((BATCH, LENGTH), -100)}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        scores = self.head(self.encoder(batch["x"]))
        return F.cross_entropy(scores.flatten(0, 1), batch["y"].flatten())  # <<
