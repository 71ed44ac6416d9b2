"""What ZeRO holds on a rank, and its step: pieces of gradients and weights, weights in fp32, and the loss scale."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.optim import Optimizer

from lightning_gradguard.act.stand_in import StandIn
from lightning_gradguard.measure.distributed import Ranks
from lightning_gradguard.measure.shards import FlatShard


class ZeroScaling:
    """DeepSpeed's loss scale.

    Args:
        zero: DeepSpeed's optimizer.
    """

    scales_losses = False

    def __init__(self, zero: Any) -> None:
        self._zero = zero

    @property
    def scale(self) -> Tensor | None:
        """On the CPU, where DeepSpeed has it."""
        return torch.tensor(float(self._zero.loss_scale))

    def unscale_(self) -> None:
        """The pieces give true gradients."""


class _Masters:
    """Common to all stages.

    Args:
        zero: DeepSpeed's optimizer.
    """

    def __init__(self, zero: Any) -> None:
        self._zero = zero
        self.optimizer: Optimizer = zero.optimizer

    def state(self) -> dict[str, Any]:
        """The loss scale and what is counted for it."""
        return {name: value for name, value in vars(self._zero.loss_scaler).items() if isinstance(value, (bool, int, float))}

    def load_state(self, state: dict[str, Any]) -> None:
        """Bring it back."""
        vars(self._zero.loss_scaler).update(state)


class Stage12Masters(_Masters):
    """Of ZeRO 1 and 2: one partition a group."""

    @property
    def tensors(self) -> Sequence[Tensor]:
        """In fp32."""
        return list(self._zero.single_partition_of_fp32_groups)

    def covers(self, parameter: Tensor) -> bool:
        """Those that it trains."""
        return hasattr(parameter, "_hp_mapping")

    def spread(self) -> None:
        """As at the end of DeepSpeed's step."""
        self._zero.update_lp_params()


class Stage3Masters(_Masters):
    """Of ZeRO 3: one partition a sub-group."""

    @property
    def tensors(self) -> Sequence[Tensor]:
        """In fp32."""
        return list(self._zero.fp32_partitioned_groups_flat)

    def covers(self, parameter: Tensor) -> bool:
        """All."""
        return hasattr(parameter, "ds_id")

    def spread(self) -> None:
        """As DeepSpeed's step does, with its own functions."""
        zero = self._zero
        zero._partition_all_parameters()
        for index in range(len(zero.fp16_groups)):
            zero._reassign_or_swap_out_partitioned_parameters(index)
        zero._post_step([])


class ZeroStep:
    """DeepSpeed's engine, as the pieces see it.

    Args:
        engine: a `DeepSpeedEngine`.
    """

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self.zero: Any = engine.optimizer
        self.is_open = False
        self.scale: float | None = None
        """By which gradients are multiplied until DeepSpeed's own step, in fp16; None in any other precision."""
        self._checks_overflow: bool | None = getattr(self.zero, "check_grad_overflow", None)

    def piece_of(self, parameter: nn.Parameter) -> FlatShard:
        """What this rank holds of a parameter."""
        return _Stage3Piece(self, parameter) if hasattr(parameter, "ds_id") else _Stage12Piece(self, parameter)

    def open(self) -> bool:
        """Whether a step comes now, and with it gradients."""
        if self._checks_overflow is not None:
            self.zero.check_grad_overflow = self._checks_overflow
        if self._engine.fp16_enabled():
            self.scale = float(self.zero.loss_scale)
        self.is_open = bool(self._engine.is_gradient_accumulation_boundary())
        return self.is_open

    def keep_scale(self) -> None:
        """Have the next step leave the loss scale as it is."""
        if self._engine.fp16_enabled() and self.is_open:

            def keep(_: Any, has_overflow: bool = False) -> None:  # noqa: ARG001, FBT001, FBT002 - as DeepSpeed calls it
                stand_in.remove()

            stand_in = StandIn(self.zero, "_update_scale", keep)


class _Piece(FlatShard):
    """Common to all stages.

    Args:
        step: DeepSpeed's.
        parameter: as the module has it.
    """

    owner = None

    def __init__(self, step: ZeroStep, parameter: nn.Parameter) -> None:
        self._step = step
        self._parameter: Any = parameter

    @property
    def grad(self) -> Tensor | None:
        """Where DeepSpeed's step takes it from; in fp16 a copy of true size in fp32."""
        if not self._step.is_open:
            return None
        gradient, scale = self._gradient(), self._step.scale
        return gradient if scale is None else gradient.float() / scale

    @grad.setter
    def grad(self, value: None) -> None:  # noqa: ARG002 - the protocol's way to skip
        if self._step.is_open:
            self._gradient().fill_(math.nan)
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

    def __init__(self, step: ZeroStep, parameter: nn.Parameter) -> None:
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

    def __init__(self, step: ZeroStep, parameter: nn.Parameter) -> None:
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
