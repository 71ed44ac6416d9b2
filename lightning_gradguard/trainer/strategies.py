"""Which strategies leave gradients where they can be read, and read to be right."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_gradguard.trainer.conflicts import ConflictError

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

_SUPPORTED = ("SingleDeviceStrategy", "DDPStrategy", "ModelParallelStrategy")
_REMEDY = {
    "FSDPStrategy": (
        "it flattens parameters into shards whose boundaries cut through them, so per-parameter norms would be wrong. "
        "Use ModelParallelStrategy with `fully_shard` (FSDP2)."
    ),
    "DeepSpeedStrategy": (
        "it accumulates, clips and steps by itself, where a callback can't keep an update from being applied. "
        "Use its own `gradient_clipping`, or ModelParallelStrategy."
    ),
    "XLAStrategy": "each look at a gradient would end the compiled graph. Use GradGuard on a GPU or CPU.",
    "SingleDeviceXLAStrategy": "each look at a gradient would end the compiled graph. Use GradGuard on a GPU or CPU.",
}


def refuse_strategy(trainer: Trainer) -> None:
    """Raise a `ConflictError` for a strategy under which a norm could be wrong."""
    # By name, since `lightning` and `pytorch_lightning` have distinct classes. The most derived name decides.
    names = [cls.__name__ for cls in type(trainer.strategy).__mro__]
    for name in names:
        if name in _REMEDY:
            raise ConflictError(f"`strategy` must be one whose gradients can be read, got {name}: {_REMEDY[name]}")
        if name in _SUPPORTED:
            return
    raise ConflictError(
        f"`strategy` must be one of {', '.join(_SUPPORTED)} or derived from them, got {names[0]}: GradGuard can't tell how "
        "it spreads gradients over ranks, and would rather not give a wrong norm."
    )
