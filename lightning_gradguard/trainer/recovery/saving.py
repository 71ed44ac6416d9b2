"""No checkpoint of damaged weights, and no good one lost for it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from lightning_gradguard.act.stand_in import StandIn
from lightning_gradguard.recovery.finite import find_nonfinite
from lightning_gradguard.trainer.callback_order import callbacks_of
from lightning_gradguard.trainer.packages import is_checkpoint
from lightning_gradguard.trainer.recovery.run_state import RunState

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule, Trainer

_HOOKS = ("on_train_batch_end", "on_train_epoch_end", "on_validation_end", "on_train_end", "on_exception")
_MAX_NAMES = 3


class _RefusedError(Exception):
    """Takes a checkpoint callback out of its hook, before it deletes the file that the refused one was to replace."""


class SaveGate:
    """Looks at the weights when a checkpoint is saved, and refuses to save damaged ones.

    `trainer.save_checkpoint` looks first, at parameters, at the optimizers' state where it is saved too, and for NaN at
    buffers; what was not finite when training began is left out. A callback that saves would go on after a refusal, count
    the file among its best and delete an older one; so its hook ends there, and its counts are put back.

    Args:
        trainer: whose checkpoints.
        module: whose weights.
        report: told of a refusal that follows no other: which file, and what is damaged.
    """

    def __init__(self, trainer: Trainer, module: LightningModule, report: Callable[[str], None]) -> None:
        self._trainer = trainer
        self._module = module
        self._report = report
        self._state = RunState(trainer, module, [])
        self._was_refused = False
        self._is_in_hook = False
        self._callbacks = [callback for callback in callbacks_of(trainer) if is_checkpoint(callback)]
        self._stand_ins: list[StandIn] = []
        self._ends_with: Callback | None = None
        self._exempt: set[str] = set()
        self._exempt = set(self._damaged(weights_only=False))

    def attach(self) -> None:
        """Stand in for `trainer.save_checkpoint` and for the hooks of the callbacks that save."""
        self._stand_ins = [
            StandIn(self._trainer, "save_checkpoint", self._look_first),
            *(StandIn(callback, name, partial(self._run, callback)) for callback in self._callbacks for name in _HOOKS),
        ]

    def detach(self, *, after_exception: bool = False) -> None:
        """Leave no trace.

        Args:
            after_exception: whether that can wait until the last of the callbacks has been told of an exception, which
                follows at once: it may save then.
        """
        self._ends_with = self._callbacks[-1] if after_exception and self._callbacks else None
        if self._ends_with is None:
            for stand_in in self._stand_ins:
                stand_in.remove()

    def _look_first(self, save: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        filepath = kwargs.get("filepath", args[0] if args else None)
        weights_only = kwargs.get("weights_only", args[1] if len(args) > 1 else None)
        damaged = self._damaged(weights_only=bool(weights_only))
        if self._trainer.strategy.reduce_boolean_decision(not damaged, all=True):
            self._was_refused = False
            return save(*args, **kwargs)
        if not self._was_refused:
            more = f" and {len(damaged) - _MAX_NAMES} more" if len(damaged) > _MAX_NAMES else ""
            names = ", ".join(f"`{name}`" for name in damaged[:_MAX_NAMES]) or "what another rank holds"
            self._report(f"The checkpoint {filepath} is not saved: {names}{more} would hold NaN or Inf")
        self._was_refused = True
        if self._is_in_hook:
            raise _RefusedError
        return None

    def _run(self, callback: Callback, hook: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        before = {name: _copy(value) for name, value in vars(callback).items()}
        self._is_in_hook = True
        try:
            return hook(*args, **kwargs)
        except _RefusedError:
            vars(callback).clear()
            vars(callback).update(before)
            return None
        except BaseException:
            # Nobody after this one is told of the exception that it was being told of.
            self._ends_with = callback if self._ends_with is not None else None
            raise
        finally:
            self._is_in_hook = False
            if callback is self._ends_with:
                self.detach()

    def _damaged(self, *, weights_only: bool) -> list[str]:
        weights = self._state.weights() if not weights_only else self._state.parameters()
        names = find_nonfinite(weights) + find_nonfinite(self._module.named_buffers(), may_be_infinite=True)
        return [name for name in names if name not in self._exempt]


def _copy(value: Any) -> Any:
    return value.copy() if isinstance(value, (dict, list, set)) else value
