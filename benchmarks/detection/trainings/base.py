"""What a training is, and the list of all kinds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

STEPS = 300
ONSET = 150


def _nothing(step: int) -> None:
    """What happens where nothing special does."""


@dataclass
class Training:
    """One training, ready to run.

    Attributes:
        network: whose parameters are watched.
        optimizer: of these parameters.
        batch: makes the batch of a step.
        loss: of a batch.
        before: called before each forward pass; schedules and faults go here.
        after: called after each backward pass; damage to gradients goes here.
        scaler: for fp16.
        autocast: whether the forward pass runs in fp16.
    """

    network: nn.Module
    optimizer: Optimizer
    batch: Callable[[int], Any]
    loss: Callable[[Any], Tensor]
    before: Callable[[int], None] = _nothing
    after: Callable[[int], None] = _nothing
    scaler: GradScaler | None = None
    autocast: bool = False


@dataclass(frozen=True)
class Kind:
    """One kind of training; each seed of it is another run.

    Attributes:
        name: unique.
        build: makes a training from torch's and numpy's seeded generators.
        fault: `""` for a healthy one, else a row of the report.
        must_find: which of our detectors may count as finding it.
        onset: first step on which the fault can be seen.
    """

    name: str
    build: Callable[[], Training]
    fault: str = ""
    must_find: tuple[str, ...] = ()
    onset: int = 0

    @property
    def is_healthy(self) -> bool:
        """Whether an alarm would be a false one."""
        return not self.fault


KINDS: dict[str, Kind] = {}


def healthy(build: Callable[[], Training]) -> Callable[[], Training]:
    """Register a healthy kind."""
    KINDS[build.__name__] = Kind(build.__name__, build)
    return build


def sick(fault: str, *must_find: str, onset: int = ONSET) -> Callable[[Callable[[], Training]], Callable[[], Training]]:
    """Register a sick kind; its name is the function's."""

    def register(build: Callable[[], Training]) -> Callable[[], Training]:
        KINDS[build.__name__] = Kind(build.__name__, build, fault, must_find, onset)
        return build

    return register
