"""FSDP1 (`FullyShardedDataParallel`): parameters of a module lie in a row, and each rank holds a stretch of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.optim import Optimizer

from lightning_gradguard.layout import clean_name
from lightning_gradguard.measure.distributed import Ranks
from lightning_gradguard.measure.name_filter import NameFilter
from lightning_gradguard.measure.parameters import WatchedParameters, is_cut_up
from lightning_gradguard.measure.shards import FlatShard, Parameter
from lightning_gradguard.record import Record
from lightning_gradguard.settings import Settings
from lightning_gradguard.trainer.conflicts import ConflictError

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


class FSDP1:
    """Gradients are pieces of flat ones.

    Where each piece belongs stands in private attributes of torch's `FlatParameter`, the same since torch 2.1 at least, and
    nowhere else.

    Args:
        trainer: the Trainer.
    """

    no_replay: str | None = "a backward pass through FSDP1's wrappers changes the gradients of the step"
    has_whole_weights = False
    scaling = None
    master_weights = None

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer

    @property
    def saves_folders(self) -> bool:
        """By the strategy's `state_dict_type`."""
        # Private, and found nowhere else.
        return self._trainer.strategy._state_dict_type == "sharded"  # type: ignore[attr-defined,no-any-return]

    def refuse_settings(self, settings: Settings) -> None:
        """Nothing shows there."""

    def refuse(self, optimizers: Sequence[Optimizer], settings: Settings) -> None:  # noqa: ARG002 - of the protocol
        """LBFGS does not know what other ranks hold; without sharding each holds all."""
        if any(isinstance(optimizer, torch.optim.LBFGS) for optimizer in optimizers) and any(
            handle.uses_sharded_strategy for handle in _handles_of(self._trainer.strategy.model)
        ):
            raise ConflictError(
                "`configure_optimizers` must not return LBFGS where FSDPStrategy shards: on each rank it takes the piece "
                "that is there for the whole, and makes other steps than on one device, guard or not. Use DDPStrategy, "
                '`FSDPStrategy(sharding_strategy="NO_SHARD")`, or another optimizer.'
            )

    def named_parameters(self, module: nn.Module) -> Iterable[tuple[str, Parameter]]:
        """A piece of each parameter that is flattened, and the others as they are."""
        pieces = _pieces_of(self._trainer.strategy.model)
        for path, owner in module.named_modules():
            prefix = f"{path}." if path else ""
            plain = dict(owner.named_parameters(recurse=False))
            flattened = pieces.get(id(owner), {})
            for name in dict.fromkeys([*plain, *flattened]):
                if name in flattened:
                    yield clean_name(prefix + name), flattened[name]
                elif not is_cut_up(plain[name]):
                    yield clean_name(prefix + name), plain[name]

    def watch(self, module: nn.Module, optimizer: Optimizer, only: NameFilter) -> WatchedParameters:
        """Those of the optimizer, which has the pieces or, without `use_orig_params`, the flat parameters."""
        return WatchedParameters(self.named_parameters(module), optimizer, only)

    def note(self, record: Record) -> None:
        """Nothing follows from it."""

    def is_step(self) -> bool:
        """The Trainer calls only where it steps."""
        return True


class _Piece(FlatShard):
    """A parameter inside of a flat one.

    Args:
        handle: FSDP1's, of the flat parameter.
        index: which of its parameters.
    """

    def __init__(self, handle: Any, index: int) -> None:
        flat: Any = handle.flat_param
        info = flat._shard_param_infos[index]
        ranks = Ranks.current()
        self._flat: Tensor = flat
        self._original: Tensor | None = flat._params[index] if handle._use_orig_params else None
        self._is_sharded: bool = handle.uses_sharded_strategy
        self._here = (
            slice(info.offset_in_shard, info.offset_in_shard + info.numel_in_shard) if info.in_shard else slice(0, 0)
        )
        self.shape = flat._shapes[index]
        self.start = info.intra_param_start_idx or 0
        self.share = (handle.world_size if self._is_sharded else 1) / ranks.size
        self._trained: Tensor = flat if self._original is None else self._original
        self.owner = self._trained

    @property
    def grad(self) -> Tensor | None:
        """From the parameter, where an optimizer takes it from, or from the flat one."""
        flat = self._flat.grad
        if self._original is None:
            return None if flat is None else flat[self._here]
        own = self._original.grad
        if own is not None:  # in the order in which it lies in memory, as the weights
            return own.as_strided((own.numel(),), (1,))
        if flat is None or not self._is_sharded or not self._original.requires_grad:
            return None
        # Nothing of it is here. Whoever holds some has a gradient, and all ranks have to say so.
        return flat[:0]

    @grad.setter
    def grad(self, value: None) -> None:
        self._trained.grad = value

    def weight(self) -> Tensor:
        """From the flat parameter."""
        return self._flat.detach()[self._here]


def _handles_of(model: nn.Module | None) -> Iterator[Any]:
    """FSDP1's handles of all flattened parameters."""
    for wrapper in [] if model is None else model.modules():
        if isinstance(wrapper, FullyShardedDataParallel) and wrapper._handle is not None:
            yield wrapper._handle


def _pieces_of(model: nn.Module | None) -> dict[int, dict[str, _Piece]]:
    """The pieces of all flattened parameters, by the module that owns them and their name in it."""
    pieces: dict[int, dict[str, _Piece]] = {}
    for handle in _handles_of(model):
        for index, info in enumerate(handle.flat_param._param_infos):
            pieces.setdefault(id(info.module), {})[info.param_name] = _Piece(handle, index)
    return pieces
