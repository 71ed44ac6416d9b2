"""FSDP1 in a Trainer on a CPU."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from lightning_package import FSDPPrecision, FSDPStrategy
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler


class CPUStrategy(FSDPStrategy):
    """FSDP1 on a CPU, which Lightning refuses to `FSDPStrategy` itself."""

    def _setup_model(self, model: nn.Module) -> nn.Module:
        return FullyShardedDataParallel(
            model,
            cpu_offload=self.cpu_offload,
            mixed_precision=self.mixed_precision_config,
            sharding_strategy=self.sharding_strategy,
            device_id=torch.device("cpu"),
            **self.kwargs,
        )


class CPUPrecision(FSDPPrecision):
    """fp16 or bf16 on a CPU: the plugin takes CUDA's autocast and scaler, whatever the device."""

    def __init__(self, precision: Any, init_scale: float) -> None:
        super().__init__("32-true" if precision == "16-mixed" else precision)
        self.precision = precision
        if precision == "16-mixed":
            self.scaler = ShardedGradScaler("cpu", init_scale=init_scale)

    def forward_context(self) -> Any:
        """Without autocast: the wrapper casts parameters and inputs."""
        return super().forward_context() if "true" in self.precision else contextlib.nullcontext()
