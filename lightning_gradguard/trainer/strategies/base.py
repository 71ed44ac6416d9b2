"""What a guard has to know of the engine that trains."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from torch import nn
from torch.optim import Optimizer

from lightning_gradguard.measure.name_filter import NameFilter
from lightning_gradguard.measure.parameters import WatchedParameters
from lightning_gradguard.measure.shards import Parameter
from lightning_gradguard.settings import Settings


class Engine(Protocol):
    """A way to spread a training over ranks. Another engine is one file with one such class, and its name in `ENGINES`.

    Which tensors there are, and whose share of them a rank holds, say its parameters: tensors, DTensors, or a `FlatShard`
    each. So is skipped: taking a parameter's `.grad` away keeps the step from being applied. All ranks agree over torch's
    default process group, whatever the engine does.
    """

    @property
    def no_replay(self) -> str | None:
        """Why a step can't be run again to find the culprit, in words; None where it can."""

    @property
    def saves_folders(self) -> bool:
        """Whether a checkpoint is a folder into which each rank writes its part."""

    def refuse(self, optimizers: Sequence[Optimizer], settings: Settings, *, rolls_back: bool) -> None:
        """Raise a `ConflictError` for what would go wrong under this engine, once there are optimizers.

        Args:
            optimizers: the Trainer's.
            settings: the guard's.
            rolls_back: whether the guard keeps snapshots.
        """

    def named_parameters(self, module: nn.Module) -> Iterable[tuple[str, Parameter]]:
        """What this rank holds of each parameter of the trained module, under its own name, in model order."""

    def watch(self, module: nn.Module, optimizer: Optimizer, only: NameFilter) -> WatchedParameters:
        """Those of them that an optimizer trains."""

    def is_step(self) -> bool:
        """Whether the hook that comes now belongs to a step, rather than to a micro-batch before it."""
