"""The engines that a Trainer's strategy may bring: how each spreads a training over ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from lightning_gradguard.trainer.conflicts import ConflictError
from lightning_gradguard.trainer.strategies.base import Engine
from lightning_gradguard.trainer.strategies.deepspeed import DeepSpeed
from lightning_gradguard.trainer.strategies.dtensor import DTensors
from lightning_gradguard.trainer.strategies.plain import Plain

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

__all__ = ["ENGINES", "Engine", "engine_of"]


def _fsdp1(trainer: Trainer) -> Engine:
    # What only one engine needs is loaded with that engine.
    from lightning_gradguard.trainer.strategies.fsdp1 import FSDP1  # noqa: PLC0415

    return FSDP1(trainer)


ENGINES: dict[str, Callable[[Trainer], Engine]] = {
    "SingleDeviceStrategy": lambda trainer: Plain(),  # noqa: ARG005
    "DDPStrategy": lambda trainer: Plain(),  # noqa: ARG005
    "ModelParallelStrategy": lambda trainer: DTensors(),  # noqa: ARG005
    "FSDPStrategy": _fsdp1,
    "DeepSpeedStrategy": DeepSpeed,
}
"""By the name of the strategy, since `lightning` and `pytorch_lightning` have distinct classes."""

_XLA = ("XLAStrategy", "SingleDeviceXLAStrategy", "XLAFSDPStrategy")


def engine_of(trainer: Trainer) -> Engine:
    """The engine behind the Trainer's strategy, or behind the one that it derives from.

    Raises:
        ConflictError: for a strategy under which a norm could be wrong.
    """
    names = [cls.__name__ for cls in type(trainer.strategy).__mro__]
    for name in names:  # the most derived name decides
        if name in ENGINES:
            return ENGINES[name](trainer)
        if name in _XLA:
            raise ConflictError(
                f"`strategy` must be one whose gradients can be read, got {name}: each look at a gradient would end the "
                "compiled graph. Use GradGuard on a GPU or CPU."
            )
    raise ConflictError(
        f"`strategy` must be one of {', '.join(ENGINES)} or derived from them, got {names[0]}: GradGuard can't tell how "
        "it spreads gradients over ranks, and would rather not give a wrong norm."
    )
