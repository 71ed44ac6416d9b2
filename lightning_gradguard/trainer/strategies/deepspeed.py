"""DeepSpeed's ZeRO 1, 2 and 3: gradients and the step are DeepSpeed's own, each rank's part of them in a partition."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.optim import Optimizer

from lightning_gradguard.layout import clean_name
from lightning_gradguard.measure.distributed import Ranks
from lightning_gradguard.measure.name_filter import NameFilter
from lightning_gradguard.measure.parameters import WatchedParameters
from lightning_gradguard.measure.shards import FlatShard, Parameter
from lightning_gradguard.settings import Settings
from lightning_gradguard.trainer.conflicts import ConflictError

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


class DeepSpeed:
    """Gradients are pieces of DeepSpeed's partitions, there to be read from the end of a window until the step.

    DeepSpeed calls no hook around its step, but passes over a step by itself when gradients are not finite. So a skip
    writes NaN into the partitions, and DeepSpeed counts it among its `skipped_steps`.

    Args:
        trainer: the Trainer.
    """

    no_replay: str | None = "a backward pass outside of DeepSpeed's engine would mix with the gradients that it has gathered"
    saves_folders = True

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._step: _Step | None = None

    def refuse(self, optimizers: Sequence[Optimizer], settings: Settings, *, rolls_back: bool) -> None:
        """What DeepSpeed does in a place that can't be reached, or does itself already."""
        (zero,) = optimizers
        engine: Any = self._trainer.strategy.model
        kinds = [cls.__name__ for cls in type(zero).__mro__]
        if not ("DeepSpeedZeroOptimizer" in kinds or "DeepSpeedZeroOptimizer_Stage3" in kinds):
            raise ConflictError(
                f"DeepSpeed's `zero_optimization` must be of stage 1, 2 or 3 for GradGuard, got an optimizer of type "
                f"{kinds[0]}, whose gradients it does not know to find. Without ZeRO, DDPStrategy trains alike."
            )
        if engine.fp16_enabled():
            raise ConflictError(
                "`precision` must be '32-true', 'bf16-mixed' or 'bf16-true' under DeepSpeed, got fp16: its gradients are "
                "multiplied by a loss scale that DeepSpeed alone keeps. Use bf16, or FSDPStrategy or DDPStrategy with fp16."
            )
        if getattr(zero, "swap_optimizer", False):
            raise ConflictError(
                "DeepSpeed's `offload_optimizer.device` must be 'cpu' or 'none' for GradGuard, got 'nvme': each look at a "
                "gradient would read it from the disk."
            )
        if settings.clipper is not None and engine.gradient_clipping() > 0.0:
            raise ConflictError(
                f"DeepSpeed's `gradient_clipping` must be unset where GradGuard clips, got {engine.gradient_clipping()!r}: "
                "gradients would be clipped twice. Remove it from DeepSpeed's config, or `clip` from GradGuard."
            )
        if rolls_back:
            raise ConflictError(
                "The action 'rollback' must not be used under DeepSpeed, which keeps weights and optimizer state where "
                "GradGuard can't put them back. Use 'skip', or 'stop' and resume from a checkpoint."
            )

    def named_parameters(self, module: nn.Module) -> Iterable[tuple[str, Parameter]]:
        """A piece of each parameter that DeepSpeed trains."""
        step = self._step = self._step or _Step(self._trainer.strategy.model)
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                yield clean_name(name), step.piece_of(parameter)

    def watch(self, module: nn.Module, optimizer: Optimizer, only: NameFilter) -> WatchedParameters:  # noqa: ARG002
        """All: there is one optimizer, and what it holds are flat partitions."""
        return WatchedParameters(self.named_parameters(module), None, only)

    def is_step(self) -> bool:
        """The Trainer calls for each micro-batch; at the end of a window DeepSpeed steps."""
        return self._step is not None and self._step.open()


class _Step:
    """DeepSpeed's engine, as the pieces see it.

    Args:
        engine: a `DeepSpeedEngine`.
    """

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self.zero: Any = engine.optimizer
        self.is_open = False
        self._checks_overflow: bool | None = getattr(self.zero, "check_grad_overflow", None)

    def piece_of(self, parameter: nn.Parameter) -> FlatShard:
        """What this rank holds of a parameter."""
        return _Stage3Piece(self, parameter) if hasattr(parameter, "ds_id") else _Stage12Piece(self, parameter)

    def open(self) -> bool:
        """Whether a step comes now, and with it gradients."""
        if self._checks_overflow is not None:
            self.zero.check_grad_overflow = self._checks_overflow
        self.is_open = bool(self._engine.is_gradient_accumulation_boundary())
        return self.is_open


class _Piece(FlatShard):
    """Common to all stages.

    Args:
        step: DeepSpeed's.
        parameter: as the module has it.
    """

    owner = None

    def __init__(self, step: _Step, parameter: nn.Parameter) -> None:
        self._step = step
        self._parameter: Any = parameter

    @property
    def grad(self) -> Tensor | None:
        """Where DeepSpeed's step takes it from."""
        return self._gradient() if self._step.is_open else None

    @grad.setter
    def grad(self, value: None) -> None:  # noqa: ARG002 - the protocol's way to skip
        if (gradient := self.grad) is not None:
            gradient.fill_(math.nan)
            self._show_nan()

    @abstractmethod
    def _gradient(self) -> Tensor: ...

    @abstractmethod
    def _show_nan(self) -> None:
        """Have DeepSpeed see the NaN where it would not look."""

    def _empty(self) -> Tensor:
        return torch.empty(0, dtype=self._parameter.dtype, device=self._parameter.device)


class _Stage12Piece(_Piece):
    """Of ZeRO 1 and 2: parameters are whole everywhere, gradients and fp32 weights lie in a row that is dealt out by length.

    Where, says the fragment of `deepspeed.utils.tensor_fragment` that DeepSpeed leaves on each parameter.
    """

    def __init__(self, step: _Step, parameter: nn.Parameter) -> None:
        super().__init__(step, parameter)
        self._fragment = self._parameter._hp_mapping
        self.shape = parameter.shape
        self.start = 0 if self._fragment is None else int(self._fragment.lp_fragment_address.start)
        self.share = dist.get_world_size(self._parameter._dp_group) / Ranks.current().size

    def _gradient(self) -> Tensor:
        if self._fragment is None:
            return self._empty()
        gradient: Tensor = self._fragment.get_lp_grad_fragment(self._parameter._index_in_param_group)
        return gradient.view(-1)

    def _show_nan(self) -> None:
        zero = self._step.zero
        zero.check_grad_overflow = True  # until the next step opens; in bf16 it is off
        if zero.cpu_offload:
            zero.local_overflow = True

    def weight(self) -> Tensor:
        """In fp32."""
        return self._empty() if self._fragment is None else self._fragment.get_hp_fragment().detach()


class _Stage3Piece(_Piece):
    """Of ZeRO 3: each parameter is cut into as many pieces of one length as there are ranks; the last may be cut short."""

    def __init__(self, step: _Step, parameter: nn.Parameter) -> None:
        super().__init__(step, parameter)
        group = self._parameter.ds_process_group
        longest, numel = int(self._parameter.partition_numel()), int(self._parameter.ds_numel)
        self.shape = self._parameter.ds_shape
        self.start = min(dist.get_rank(group) * longest, numel)
        self.share = dist.get_world_size(group) / Ranks.current().size
        self._numel = min(longest, numel - self.start)

    def _gradient(self) -> Tensor:
        # Private: DeepSpeed's public `safe_get_local_grad` may return a copy, and fills it up to one length on all ranks.
        partition: Tensor = self._step.zero._get_fp32_grad_state_partition(self._parameter, release_swap_buffers=True)[0]
        return partition.view(-1)[: self._numel]

    def _show_nan(self) -> None:
        zero = self._step.zero
        if zero.offload_optimizer and self._numel:
            # Norms of what is offloaded have been taken on the way.
            zero.norm_for_param_grads[zero.get_param_id(self._parameter)] = torch.tensor(math.nan)

    def weight(self) -> Tensor:
        """In fp32."""
        partition: Tensor = self._step.zero._get_fp32_opt_state_partition(self._parameter, release_swap_buffers=True)[0]
        return partition.detach().view(-1)[: self._numel]
