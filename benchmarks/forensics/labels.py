"""Failing training steps with the truth about them, written down before they were first run."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F

BATCH, LENGTH, WIDTH = 8, 5, 6
INF, NAN = float("inf"), float("nan")


@dataclass(frozen=True)
class Case:
    """A step, and the truth about it.

    Attributes:
        make: the module; the line of the culprit ends with `# <<`.
        phase: "data", "weights", "forward", "backward", "none" for a step that is in order, or "nobody" for damage that no
            operator of forward or backward pass has made.
        module: path of the culprit, batch leaf, or name of the weight.
        ops: accepted operators, separated by blanks; "" for whichever.
        samples: the bad ones; None where it is not single ones, so that none may be stated.
        at: whose source holds the line; None: the module's own.
        helper: name of the innermost function of the user's, where it is neither `forward` nor `training_step`.
        says: parts of the message.
        never: what the message must not say, since it would not be true.
        guard: further arguments of `GradGuard`.
        has_open_samples: whether anything may be said about samples, since the label says nothing.
        needs_remedy: whether there is one that a change of the line can be, so that it has to be told, and to hold.
    """

    make: type[Step]
    phase: str
    module: str = ""
    ops: str = ""
    samples: tuple[int, ...] | None = None
    at: type | Callable[..., Any] | None = None
    helper: str = ""
    says: tuple[str, ...] = ()
    never: tuple[str, ...] = ()
    guard: dict[str, Any] = field(default_factory=dict)
    has_open_samples: bool = False
    needs_remedy: bool = False

    @property
    def name(self) -> str:
        """That of the class."""
        return self.make.__name__

    @property
    def lines(self) -> list[tuple[str, int]]:
        """File and number of the lines that may be named; empty where any may."""
        source, start = inspect.getsourcelines(self.at or self.make)
        file = inspect.getfile(self.at or self.make)
        return [(file, start + offset) for offset, line in enumerate(source) if line.rstrip().endswith("# <<")]


CASES: list[Case] = []


def case(phase: str, module: str = "", ops: str = "", **truth: Any) -> Callable[[type[Step]], type[Step]]:
    """Register a class as a case."""

    def register(make: type[Step]) -> type[Step]:
        CASES.append(Case(make, phase, module, ops, **truth))
        return make

    return register


class Step(LightningModule):
    """An encoder, whatever the case adds, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Sequential(nn.Linear(WIDTH, 12), nn.Tanh(), nn.Linear(12, WIDTH))
        self.head = nn.Linear(WIDTH, 4)
        self.add()

    def add(self) -> None:
        """What else there is."""

    def batch(self) -> Any:
        """The batch of the step."""
        draw = torch.Generator().manual_seed(1)
        return {"x": torch.randn(BATCH, WIDTH, generator=draw), "y": torch.randint(0, 4, (BATCH,), generator=draw)}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The loss."""
        return F.cross_entropy(self.head(self.middle(self.encoder(batch["x"]), batch)), batch["y"])

    def middle(self, hidden: Tensor, batch: Any) -> Tensor:
        """Between encoder and classifier."""
        return hidden

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """It takes one step only."""
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Sequences(Step):
    """Sequences with a mask that is True where there is something."""

    def batch(self) -> Any:
        draw = torch.Generator().manual_seed(2)
        keep = torch.arange(LENGTH)[None] < torch.randint(1, LENGTH + 1, (BATCH, 1), generator=draw)
        return {
            "x": torch.randn(BATCH, LENGTH, WIDTH, generator=draw),
            "keep": keep,
            "y": torch.randint(0, 4, (BATCH, LENGTH), generator=draw),
        }


class Attention(nn.Module):
    """One head, masked with minus infinity."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        scores = (self.query(x) @ x.transpose(1, 2)).masked_fill(~keep[:, None], -INF)
        return scores.softmax(-1) @ x  # <<


class Ratio(nn.Module):
    """A sum over a count."""

    def forward(self, x: Tensor, count: Tensor) -> Tensor:
        return x / count  # <<


class Unit(nn.Module):
    """A vector of length one."""

    def forward(self, x: Tensor) -> Tensor:
        return x / x.norm(dim=-1, keepdim=True)  # <<
