"""The gradients of a skipped step, for a module whose own hooks look at them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lightning_gradguard.act.stand_in import StandIn
from lightning_gradguard.measure.shards import Parameter
from lightning_gradguard.trainer.callback_order import callbacks_of
from lightning_gradguard.trainer.packages import is_of_lightning

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


_EARLIER = (
    *("on_fit_start", "on_sanity_check", "on_train_start", "on_load_checkpoint"),
    *("on_before_backward", "on_after_backward", "on_before_zero_grad"),
    *("on_test", "on_predict"),
)
"""Hooks that are called before the guard decides, or once the next batch has begun; of all others any may look."""

_OTHERS = (
    *("configure_gradient_clipping", "optimizer_step", "lr_scheduler_step"),
    *("transfer_batch_to_device", "teardown"),
)
"""What is called later, too, though its name does not say that it is a hook."""


class SkippedGradients:
    """Has a module find its gradients where they would be without a guard, though the optimizer doesn't.

    A skip takes `.grad` away. `configure_gradient_clipping` and the module's own `on_before_optimizer_step` come after the
    guard and before the optimizer's update; the rest of an `optimizer_step` of its own, and `on_train_batch_end`, come after
    that. All of them may read `parameter.grad` without asking whether there is one.

    Args:
        trainer: whose precision plugin calls the former, and steps the optimizer.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._taken: list[tuple[Tensor, Tensor]] = []
        self._is_before_update = False
        plugin = trainer.precision_plugin
        self._stand_ins = (
            StandIn(plugin, "_after_closure", self._run_hooks),
            StandIn(plugin, "optimizer_step", self._run_step),
        )

    @classmethod
    def where_seen(cls, trainer: Trainer, module: LightningModule) -> SkippedGradients | None:
        """Where module, strategy or a callback of the user's has a hook that may look at them; None elsewhere."""
        parts = (module, trainer.strategy, *callbacks_of(trainer))
        return cls(trainer) if any(_may_look(part) for part in parts) else None

    def detach(self) -> None:
        """Leave nothing on the plugin, and no gradient of a skipped step."""
        for stand_in in self._stand_ins:
            stand_in.remove()
        self.forget()

    def show(self, taken: Sequence[tuple[Parameter, Tensor]]) -> None:
        """Put back what a skip has taken, if it is certain that it is taken away again before the update."""
        self._taken = []
        if self._is_before_update:
            self._taken = [(parameter, grad) for parameter, grad in taken if isinstance(parameter, Tensor)]
            self._put_back()

    def forget(self) -> None:
        """The next batch begins: it does not add to them."""
        self._take_away()
        self._taken = []

    def _run_hooks(self, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._is_before_update = True
        try:
            return run(*args, **kwargs)
        finally:
            self._is_before_update = False
            self._take_away()

    def _run_step(self, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        result = run(*args, **kwargs)
        # By hand, another optimizer may be about to step the same parameters, or more may be added to their gradients.
        if self._trainer.lightning_module.automatic_optimization:
            self._put_back()
        return result

    def _put_back(self) -> None:
        for parameter, grad in self._taken:
            parameter.grad = grad

    def _take_away(self) -> None:
        for parameter, _ in self._taken:
            parameter.grad = None


def _may_look(part: object) -> bool:
    """Whether a hook of it that comes later is neither Lightning's nor the guard's."""
    owners = [cls for cls in type(part).__mro__ if not is_of_lightning(cls) and not _is_ours(cls)]
    hooks = [name for owner in owners for name in vars(owner)]
    hooks += [name for name, value in vars(part).items() if not isinstance(value, StandIn)]
    return any(name in _OTHERS or (name.startswith("on_") and not name.startswith(_EARLIER)) for name in hooks)


def _is_ours(cls: type) -> bool:
    return cls.__module__.startswith("lightning_gradguard.")
