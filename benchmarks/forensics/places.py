"""Where a failure is said to be: helpers, functions, hooks, weights, and what a replay has to draw again."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.forensics.labels import BATCH, INF, NAN, WIDTH, Step, case


class _Positive(Step):
    def batch(self) -> Any:
        batch = super().batch()
        batch["x"] = batch["x"].abs() + 0.1
        batch["x"][4, 1] = 0.0
        return batch


@case(
    "forward",
    "",
    "log",
    samples=(4,),
    helper="HelperMethod._energy",
    says=("HelperMethod._energy",),
    never=("`training_step`",),
)
class HelperMethod(_Positive):
    def _energy(self, x: Tensor) -> Tensor:
        return torch.log(x)  # <<

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.head(self._energy(batch["x"])).mean()


class Scorer(nn.Module):
    """Scores in a method of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return self.score(x) * 2.0

    def score(self, x: Tensor) -> Tensor:
        return torch.log(x)  # <<


@case("forward", "scorer", "log", samples=(4,), at=Scorer, helper="Scorer.score", says=("`scorer`", "Scorer.score"))
class HelperOfASubmodule(_Positive):
    def add(self) -> None:
        self.scorer = Scorer()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.head(self.scorer(batch["x"])).mean()


def log_of(x: Tensor) -> Tensor:
    """A function beside the module."""
    return x.log()  # <<


@case("forward", "", "log", samples=(4,), at=log_of, helper="log_of", says=("`log_of`",))
class FreeFunction(_Positive):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.head(log_of(batch["x"])).mean()


@case("backward", "", "SqrtBackward0", samples=(4,), helper="HelperInTheBackwardPass._length", says=("_length",))
class HelperInTheBackwardPass(Step):
    def batch(self) -> Any:
        batch = super().batch()
        batch["x"][4] = 0.0
        return batch

    def add(self) -> None:
        self.body = nn.Linear(WIDTH, WIDTH, bias=False)

    def _length(self, x: Tensor) -> Tensor:
        return x.square().sum(1).sqrt()  # <<

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self._length(self.body(batch["x"])).mean()


class _Log(torch.autograd.Function):
    """A logarithm by hand."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.log()  # <<

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad / ctx.saved_tensors[0]


@case("forward", "", "log", samples=(4,), at=_Log)
class ForwardOfAFunctionByHand(_Positive):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return _Log.apply(batch["x"] * self.head.weight.mean().square()).mean()


@case("backward", "encoder.2", "mul", says=("hook", "mul"))
class HookThatScalesAGradient(Step):
    """The node beside which it runs is innocent; the module is the one whose result the hook is on."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        hidden = self.encoder(batch["x"])
        hidden.register_hook(lambda grad: grad * INF)  # <<
        return F.cross_entropy(self.head(hidden), batch["y"])


@dataclass
class Example:
    """A batch as a data class."""

    values: Tensor
    labels: Tensor


@case("data", "batch.values", samples=(0, 3))
class InfInADataClass(Step):
    def batch(self) -> Any:
        values = torch.randn(BATCH, WIDTH, generator=torch.Generator().manual_seed(1))
        values[0, 1], values[3, 2] = INF, NAN
        return Example(values, torch.zeros(BATCH, dtype=torch.long))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.head(self.encoder(batch.values)), batch.labels)


@case("weights", "scales.1")
class NanInAParameterList(Step):
    def add(self) -> None:
        self.scales = nn.ParameterList([torch.ones(WIDTH), torch.full((WIDTH,), NAN)])

    def middle(self, hidden: Tensor, batch: Any) -> Tensor:
        return hidden * self.scales[0] * self.scales[1]


@case("weights", "table")
class InfInABuffer(Step):
    def add(self) -> None:
        self.register_buffer("table", torch.tensor([1.0, INF, 1.0, 1.0, 1.0, 1.0]))

    def middle(self, hidden: Tensor, batch: Any) -> Tensor:
        return hidden * self.table


@case("forward", "", "log", samples=(4,))
class BranchByPythonsRandomNumbers(_Positive):
    """The failing branch is taken by chance: the replay has to draw the same number."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x = batch["x"]
        for _ in range(40):
            x = x * 1.0
            if random.random() < 0.05:
                return self.head(torch.log(x)).mean()  # <<
        return self.head(torch.log(x)).mean()  # <<


@case("forward", "", "log", samples=(4,))
class MixedByNumpysRandomNumbers(_Positive):
    """Mixup with a share of numpy's."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        share = float(np.random.beta(0.4, 0.4))  # noqa: NPY002 - as such code is written
        hidden = torch.log(batch["x"])  # <<
        return self.head(self.encoder(share * hidden + (1 - share) * hidden.flip(0))).mean()


@case("forward", "blocks.1.0", "log", samples=(4,), at=Scorer, helper="Scorer.score")
class DeepInsideASequential(_Positive):
    def add(self) -> None:
        self.blocks = nn.Sequential(nn.Identity(), nn.Sequential(Scorer(), nn.Identity()))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.head(self.blocks(batch["x"])).mean()
