"""No checkpoint of damaged weights, and no good one lost for it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from lightning_gradguard.recovery.finite import find_nonfinite
from lightning_gradguard.trainer.callback_order import callbacks_of
from lightning_gradguard.trainer.recovery.run_state import RunState

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
        self._callbacks = [callback for callback in callbacks_of(trainer) if isinstance(callback, Checkpoint)]
        self._exempt: set[str] = set()
        self._exempt = set(self._damaged(weights_only=False))

    def attach(self) -> None:
        """Stand in for `trainer.save_checkpoint` and for the hooks of the callbacks that save."""
        self._trainer.save_checkpoint = self._save  # type: ignore[method-assign]
        for callback in self._callbacks:
            for name in _HOOKS:
                setattr(callback, name, partial(self._run, callback, getattr(callback, name)))

    def detach(self) -> None:
        """Leave no trace."""
        vars(self._trainer).pop("save_checkpoint", None)
        for callback in self._callbacks:
            for name in _HOOKS:
                vars(callback).pop(name, None)

    def _save(self, filepath: Any, weights_only: bool | None = None, storage_options: Any | None = None) -> None:  # noqa: FBT001
        damaged = self._damaged(weights_only=bool(weights_only))
        if self._trainer.strategy.reduce_boolean_decision(not damaged, all=True):
            self._was_refused = False
            type(self._trainer).save_checkpoint(self._trainer, filepath, weights_only, storage_options)
            return
        if not self._was_refused:
            more = f" and {len(damaged) - _MAX_NAMES} more" if len(damaged) > _MAX_NAMES else ""
            names = ", ".join(f"`{name}`" for name in damaged[:_MAX_NAMES]) or "what another rank holds"
            self._report(f"The checkpoint {filepath} is not saved: {names}{more} would hold NaN or Inf")
        self._was_refused = True
        if self._is_in_hook:
            raise _RefusedError

    def _run(self, callback: Callback, hook: Callable[..., Any], *args: Any) -> None:
        before = {name: _copy(value) for name, value in vars(callback).items()}
        self._is_in_hook = True
        try:
            hook(*args)
        except _RefusedError:
            vars(callback).clear()
            vars(callback).update(before)
        finally:
            self._is_in_hook = False

    def _damaged(self, *, weights_only: bool) -> list[str]:
        weights = self._state.weights() if not weights_only else self._state.parameters()
        names = find_nonfinite(weights) + find_nonfinite(self._module.named_buffers(), may_be_infinite=True)
        return [name for name in names if name not in self._exempt]


def _copy(value: Any) -> Any:
    return value.copy() if isinstance(value, (dict, list, set)) else value
