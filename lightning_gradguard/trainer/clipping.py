"""Clipping that the Trainer or the module does beside the guard."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch.amp.grad_scaler import GradScaler, OptState

from lightning_gradguard.act.stand_in import StandIn
from lightning_gradguard.errors import GuardWarning
from lightning_gradguard.record import Measurement
from lightning_gradguard.trainer.packages import is_of_lightning
from lightning_gradguard.trainer.precision import scaler_of
from lightning_gradguard.wording import counted

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


def clips_later(trainer: Trainer, module: LightningModule) -> bool:
    """Whether gradients are clipped after the guard has seen them. In manual optimization modules clip before their step."""
    return module.automatic_optimization and (bool(trainer.gradient_clip_val) or overrides_clipping(module) is not None)


def overrides_clipping(module: LightningModule) -> type | None:
    """The class of a user's, in the module's ancestry, that clips by a method of its own; None if there is none."""
    owner = next(cls for cls in type(module).__mro__ if "configure_gradient_clipping" in vars(cls))
    return None if is_of_lightning(owner) else owner


_NUM_ALIKE = 3
"""Steps whose norm before unscaling is the same limit, until that is taken for clipping."""


class ScaledClipping:
    """Points out, once, that gradients are clipped that are still multiplied by the GradScaler's scale.

    In manual optimization nobody has unscaled them when `self.clip_gradients` is called before `optimizer.step()`, nor in
    `on_after_backward`: the limit is meant for numbers that are thousands of times smaller. The module's own method is seen
    as it is called; torch's functions show by what they leave, a norm that is the same round number step after step.

    Args:
        trainer: whose precision plugin clips.
        scaler: of that plugin.
    """

    def __init__(self, trainer: Trainer, scaler: GradScaler) -> None:
        self._trainer = trainer
        self._scaler = scaler
        self._has_warned = False
        self._limit = 0.0
        self._num_alike = 0
        self._stand_in = StandIn(trainer.precision_plugin, "clip_gradients", self._look)

    @classmethod
    def watch(cls, trainer: Trainer) -> ScaledClipping | None:
        """Where there is a scaler; None elsewhere."""
        scaler = scaler_of(trainer)
        return None if scaler is None else cls(trainer, scaler)

    def detach(self) -> None:
        """Leave nothing on the plugin."""
        self._stand_in.remove()

    def note(self, measurement: Measurement) -> None:
        """A step was measured, after unscaling."""
        scale = measurement.loss_scale or 1.0
        norm = scale * measurement.global_norm
        limit = float(f"{norm:.2g}")
        is_limit = math.isclose(norm, limit, rel_tol=1e-5) and scale != 1.0 and norm > 0.0
        self._num_alike = self._num_alike + 1 if is_limit and limit == self._limit else int(is_limit)
        self._limit = limit
        if self._num_alike == _NUM_ALIKE:
            self._warn(
                f"In {counted(_NUM_ALIKE, 'step')} in a row the norm of the gradients was {limit:g} before the GradScaler's "
                f"scale, {scale:g}, was taken out of them, as if they had been clipped to that while still scaled. "
                "Such a limit holds for the scaled numbers."
            )

    def _look(self, clip: Callable[..., Any], optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        raw = getattr(optimizer, "optimizer", optimizer)  # Lightning wraps those that it hands to a module
        is_manual = not self._trainer.lightning_module.automatic_optimization
        is_scaled = is_manual and self._scaler._per_optimizer_states[id(raw)]["stage"] is OptState.READY
        if is_scaled and self._scaler.get_scale() != 1.0:
            self._warn(
                "`clip_gradients` is called on gradients that are still multiplied by the GradScaler's scale, "
                f"{self._scaler.get_scale():g}. Its limit then holds for the scaled numbers."
            )
        return clip(optimizer, *args, **kwargs)

    def _warn(self, message: str) -> None:
        if not self._has_warned:
            self._has_warned = True
            remedy = "Let the guard clip: `GradGuard(clip=...)`, which sees true gradients."
            warnings.warn(f"{message} {remedy}", GuardWarning, stacklevel=4)
