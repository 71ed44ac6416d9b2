"""What a guard has to know of the engine that trains."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_gradguard.measure.name_filter import NameFilter
from lightning_gradguard.measure.parameters import WatchedParameters
from lightning_gradguard.measure.scaling import Scaling
from lightning_gradguard.measure.shards import Parameter
from lightning_gradguard.record import Record
from lightning_gradguard.settings import Settings


class MasterWeights(Protocol):
    """Weights that an engine keeps in fp32 and trains, where those of the module only follow them."""

    @property
    def tensors(self) -> Sequence[Tensor]:
        """What this rank holds of them; the optimizer's state goes by them."""

    @property
    def optimizer(self) -> Optimizer:
        """Torch's own, which steps them."""

    def covers(self, parameter: Tensor) -> bool:
        """Whether a parameter of the module is made anew by `spread`."""

    def spread(self) -> None:
        """Have the module's parameters follow. In place; all ranks call it."""

    def state(self) -> dict[str, Any]:
        """What else the engine would have to forget to be back at an earlier step."""

    def load_state(self, state: dict[str, Any]) -> None:
        """Bring it back."""


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
    def has_whole_weights(self) -> bool:
        """Whether each rank holds all weights, so that it can run a step without the others."""

    @property
    def saves_folders(self) -> bool:
        """Whether a checkpoint is a folder into which each rank writes its part."""

    @property
    def scaling(self) -> Scaling | None:
        """Of an engine that scales the loss by itself; None where the Trainer's precision does or nobody does."""

    @property
    def master_weights(self) -> MasterWeights | None:
        """None where all that is trained is in the module, and its state in the Trainer's optimizers."""

    def refuse_settings(self, settings: Settings) -> None:
        """Raise a `ConflictError` for what the Trainer's own settings show to go wrong, before anything is built.

        Args:
            settings: the guard's.
        """

    def refuse(self, optimizers: Sequence[Optimizer], settings: Settings) -> None:
        """Raise a `ConflictError` for what would go wrong under this engine, once there are optimizers.

        Args:
            optimizers: the Trainer's.
            settings: the guard's.
        """

    def named_parameters(self, module: nn.Module) -> Iterable[tuple[str, Parameter]]:
        """What this rank holds of each parameter of the trained module, under its own name, in model order."""

    def watch(self, module: nn.Module, optimizer: Optimizer, only: NameFilter) -> WatchedParameters:
        """Those of them that an optimizer trains."""

    def note(self, record: Record) -> None:
        """A step was decided, on all ranks alike."""

    def is_step(self) -> bool:
        """Whether the hook that comes now belongs to a step, rather than to a micro-batch before it."""
