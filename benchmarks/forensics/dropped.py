"""NaN and Inf in branches that the loss does not show: a mask, an index or a slice leaves them out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from benchmarks.forensics.labels import BATCH, INF, LENGTH, WIDTH, Attention, Ratio, Sequences, Step, Unit, case

NO_FINITE_INPUTS = ("finite inputs",)


class _Masked(Sequences):
    def add(self) -> None:
        self.attention = Attention()

    def batch(self) -> Any:
        batch = super().batch()
        batch["keep"][6] = False
        return batch

    def after(self, hidden: Tensor) -> Tensor:
        return hidden

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        hidden = self.after(self.attention(self.encoder(batch["x"]), batch["keep"]))
        return self.head(hidden)[batch["keep"]].square().mean()


@case("forward", "attention", "_softmax", samples=(6,), at=Attention, says=("index",), never=NO_FINITE_INPUTS)
class IntoALinearLayer(_Masked):
    """The plain one."""


@case(
    "forward",
    "attention",
    "_softmax",
    samples=(6,),
    at=Attention,
    says=("NativeLayerNormBackward0",),
    never=NO_FINITE_INPUTS,
)
class IntoALayerNorm(_Masked):
    def add(self) -> None:
        super().add()
        self.norm = nn.LayerNorm(WIDTH)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        hidden = self.norm(self.attention(self.encoder(batch["x"]), batch["keep"]))
        return hidden[batch["keep"]].square().mean()


@case("forward", "attention", "_softmax", samples=(6,), at=Attention, says=("ConvolutionBackward0",), never=NO_FINITE_INPUTS)
class IntoAConvolution(_Masked):
    def add(self) -> None:
        super().add()
        self.conv = nn.Conv1d(WIDTH, WIDTH, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        hidden = self.conv(self.attention(self.encoder(batch["x"]), batch["keep"]).transpose(1, 2)).transpose(1, 2)
        return torch.where(batch["keep"][..., None], hidden, torch.zeros(())).square().mean()


@case("forward", "attention", "_softmax", samples=(6,), at=Attention, never=NO_FINITE_INPUTS)
class IntoASecondAttention(_Masked):
    def add(self) -> None:
        super().add()
        self.query = nn.Linear(WIDTH, WIDTH)

    def after(self, hidden: Tensor) -> Tensor:
        return (self.query(hidden) @ hidden.transpose(1, 2)).softmax(-1) @ hidden


@case("forward", "attention", "_softmax", samples=(6,), at=Attention, never=NO_FINITE_INPUTS)
class IntoAnLstm(_Masked):
    def add(self) -> None:
        super().add()
        self.lstm = nn.LSTM(WIDTH, WIDTH, batch_first=True)

    def after(self, hidden: Tensor) -> Tensor:
        return self.lstm(hidden)[0]


@case("forward", "ratio", "div", samples=(3,), at=Ratio, never=NO_FINITE_INPUTS)
class EmptyCountLeftOutByIndexSelect(Step):
    def add(self) -> None:
        self.ratio = Ratio()

    def batch(self) -> Any:
        batch = super().batch()
        batch["count"] = torch.ones(BATCH)
        batch["count"][3] = 0.0
        return batch

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits = self.head(self.ratio(self.encoder(batch["x"]), batch["count"][:, None]))
        good = batch["count"].nonzero()[:, 0]
        return F.cross_entropy(logits.index_select(0, good), batch["y"][good])


@case("forward", "", "log", samples=(2,), never=NO_FINITE_INPUTS)
class LogarithmOfAFeatureThatIsZero(Step):
    def batch(self) -> Any:
        batch = super().batch()
        batch["x"] = batch["x"].abs()
        batch["x"][2, 1] = 0.0
        return batch

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits = self.head(torch.log(batch["x"]))  # <<
        good = batch["x"].amin(1) > 0
        return F.cross_entropy(logits[good], batch["y"][good])


@case("forward", "unit", "div", samples=(4,), at=Unit, says=("where",), never=NO_FINITE_INPUTS)
class NormOfZeroMaskedByWhere(Step):
    def add(self) -> None:
        self.unit = Unit()
        self.body = nn.Linear(WIDTH, WIDTH, bias=False)

    def batch(self) -> Any:
        batch = super().batch()
        batch["x"][4] = 0.0
        return batch

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        hidden = self.head(self.unit(self.body(batch["x"])))
        return torch.where(batch["x"].abs().sum(1, keepdim=True) > 0, hidden, torch.zeros(())).square().mean()


@case("forward", "", "acos", samples=(1,), never=NO_FINITE_INPUTS)
class AngleOutsideTheDomainMaskedByMaskedFill(Step):
    def batch(self) -> Any:
        batch = super().batch()
        batch["x"] = batch["x"].tanh()
        batch["x"][1, 3] = 1.5
        return batch

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        angle = torch.acos(batch["x"])  # <<
        bad = batch["x"].abs().amax(1, keepdim=True) > 1
        return self.head(angle).masked_fill(bad, 0.0).square().mean()


@case("forward", "ratio", "div", samples=(3,), at=Ratio)
class MaskedByAProduct(EmptyCountLeftOutByIndexSelect):
    """Zero times NaN is NaN: the loss shows it."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits = self.head(self.ratio(self.encoder(batch["x"]), batch["count"][:, None]))
        return (logits * (batch["count"] > 0)[:, None]).square().mean()


@case("backward", "", "SqrtBackward0", samples=(5,))
class HarmlessNanBesideABirthInTheBackwardPass(Step):
    """What a metric makes is not to blame."""

    def batch(self) -> Any:
        batch = super().batch()
        batch["scale"] = torch.ones(BATCH, 1)
        batch["scale"][5] = 0.0
        return batch

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        hidden = self.encoder(batch["x"]) * batch["scale"]
        share = (hidden.detach() / batch["scale"]).nan_to_num()
        length = hidden.square().sum(1, keepdim=True).sqrt()  # <<
        return self.head(length * share.mean().clamp(1.0, 1.0).expand(BATCH, WIDTH)).mean()


@case("none")
class HarmlessNanAlone(Step):
    """It is dropped, and meets no parameter."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        share = (self.encoder(batch["x"]).detach() / torch.zeros(())).nan_to_num(0.0, 0.0, 0.0)
        return super().training_step(batch, batch_idx) + share.mean()


@case("none")
class LogsumexpOfNothingLeftOutByIndex(Sequences):
    """torch guards its gradient; it was labelled as a failure first."""

    def batch(self) -> Any:
        batch = super().batch()
        batch["keep"][5] = False
        return batch

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        scores = self.encoder(batch["x"])[..., 0].masked_fill(~batch["keep"], -INF)
        return scores.logsumexp(1)[batch["keep"].any(1)].square().mean()


@case("forward", "ratio", "div", samples=(6, 7), at=Ratio, never=NO_FINITE_INPUTS)
class LeftOutByASlice(EmptyCountLeftOutByIndexSelect):
    def batch(self) -> Any:
        batch = super().batch()
        batch["count"][:] = 1.0
        batch["count"][6:] = 0.0
        return batch

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits = self.head(self.ratio(self.encoder(batch["x"]), batch["count"][:, None]))
        return F.cross_entropy(logits[:6], batch["y"][:6])


@case("forward", "ratio", "div", samples=(3,), at=Ratio, never=NO_FINITE_INPUTS)
class InsideACheckpointLeftOutByIndex(EmptyCountLeftOutByIndexSelect):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        def inner(x: Tensor, count: Tensor) -> Tensor:
            return self.head(self.ratio(self.encoder(x), count))

        logits = checkpoint(inner, batch["x"], batch["count"][:, None], use_reentrant=False)
        good = batch["count"] > 0
        return F.cross_entropy(logits[good], batch["y"][good])


@case("forward", "ratio", "div", at=Ratio, never=NO_FINITE_INPUTS)
class PaddedStepsLeftOutByGather(Sequences):
    """Padding of all but the longest sample is damaged, and only the last real step is taken."""

    def add(self) -> None:
        self.ratio = Ratio()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        weight = batch["keep"].float()[..., None]
        hidden = self.head(self.ratio(self.encoder(batch["x"]) * weight, weight))
        last = batch["keep"].sum(1) - 1
        return hidden.gather(1, last[:, None, None].expand(-1, 1, 4)).square().mean()


@case("backward", "", "LogBackward0", samples=(0,))
class LogOfALossLeftOutByIndex(Step):
    """One over zero times zero, in the backward pass itself."""

    def batch(self) -> Any:
        batch = super().batch()
        batch["weight"] = torch.ones(BATCH)
        batch["weight"][0] = 0.0
        return batch

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        share = self.head(self.encoder(batch["x"])).sigmoid().mean(1) * batch["weight"]
        losses = -share.log()  # <<
        return losses[batch["weight"] > 0].mean()


@case("data", "batch['t']", samples=(2,))
class NanTargetsUnderAMaskOfZeros(Step):
    def batch(self) -> Any:
        batch = super().batch()
        batch["t"] = torch.zeros(BATCH, 4)
        batch["t"][2, 0] = torch.nan
        return batch

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        error = (self.head(self.encoder(batch["x"])) - batch["t"]).square()
        return torch.where(batch["t"].isnan(), torch.zeros(()), error).mean()


@case("forward", "attention", "_softmax", samples=(6,), at=Attention, never=NO_FINITE_INPUTS)
class IntoAnEmbeddingOfPositions(_Masked):
    """The damaged rows are scaled by a learned vector of as many entries as positions."""

    def add(self) -> None:
        super().add()
        self.gain = nn.Parameter(torch.ones(LENGTH, 1))

    def after(self, hidden: Tensor) -> Tensor:
        return hidden * self.gain
