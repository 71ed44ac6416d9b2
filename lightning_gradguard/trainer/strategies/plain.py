"""One device, and DDP: each rank holds every gradient whole."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn
from torch.optim import Optimizer

from lightning_gradguard.measure.name_filter import NameFilter
from lightning_gradguard.measure.parameters import WatchedParameters
from lightning_gradguard.measure.shards import Parameter
from lightning_gradguard.record import Record
from lightning_gradguard.settings import Settings


class Plain:
    """Gradients are where torch leaves them."""

    no_replay: str | None = None
    has_whole_weights = True
    scaling = None
    master_weights = None
    saves_folders = False

    def refuse_settings(self, settings: Settings) -> None:
        """Nothing shows there."""

    def refuse(self, optimizers: Sequence[Optimizer], settings: Settings) -> None:
        """Everything goes."""

    def named_parameters(self, module: nn.Module) -> Iterable[tuple[str, Parameter]]:
        """The module's own."""
        return module.named_parameters()

    def watch(self, module: nn.Module, optimizer: Optimizer, only: NameFilter) -> WatchedParameters:
        """Those of the optimizer."""
        named = module.named_parameters
        return WatchedParameters(named(), optimizer, only, look_again=named)

    def note(self, record: Record) -> None:
        """Nothing follows from it."""

    def is_step(self) -> bool:
        """The Trainer calls only where it steps."""
        return True
