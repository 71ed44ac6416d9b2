"""GradGuard: the adapter between Lightning's hooks and one `Guard` per optimizer."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.optim import Optimizer

from lightning_gradguard.act.buffers import BufferRepair
from lightning_gradguard.alert import Alert
from lightning_gradguard.clippers import Clipper
from lightning_gradguard.detectors import Detector, Explosion, NonFinite, Overflow, Vanishing
from lightning_gradguard.errors import GradientError, GuardWarning
from lightning_gradguard.guard import Guard
from lightning_gradguard.measure.parameters import WatchedParameters
from lightning_gradguard.policy import Action, ActionName, require_float, require_int
from lightning_gradguard.record import Position, Record
from lightning_gradguard.recovery import Rollback
from lightning_gradguard.report.alerting import notice
from lightning_gradguard.report.summary import summarize
from lightning_gradguard.settings import Settings
from lightning_gradguard.sinks import Sink
from lightning_gradguard.trainer.callback_order import move_behind
from lightning_gradguard.trainer.conflicts import refuse_second_clipping, refuse_second_guard
from lightning_gradguard.trainer.precision import scaler_of, skips_without_backward
from lightning_gradguard.trainer.progress import log_interval, log_step, stop_is_deferred_by
from lightning_gradguard.trainer.recovery.quarantine import Quarantine
from lightning_gradguard.trainer.recovery.recovery import Progress, Recovery
from lightning_gradguard.trainer.recovery.run_state import set_random_states
from lightning_gradguard.trainer.recovery.saving import SaveGate
from lightning_gradguard.trainer.recovery.snapshot_storage import random_states_in
from lightning_gradguard.trainer.replay.bundles import Bundles
from lightning_gradguard.trainer.replay.investigation import Investigation
from lightning_gradguard.trainer.replay.window import Window
from lightning_gradguard.trainer.sinks import all_sinks
from lightning_gradguard.trainer.strategies import refuse_strategy


class GradGuard(Callback):
    """Inspects every backward pass: measures, logs, clips, and keeps bad updates from being applied.

    Args:
        clip: largest global norm, or a clipper, or a mapping of patterns of names to either (`Grouped`); None: no clipping.
        nonfinite: what to do about NaN and Inf: an action's name, a configured detector, or None for off.
        explosion: the same for gradients that are finite but far too large.
        vanishing: the same for gradients that no longer reach a part of the model.
        overflow: the same for a GradScaler that does not find its scale (fp16 only).
        detectors: your own, beside these.
        include: patterns of names (fnmatch); only parameters that match one are measured, judged, clipped and logged. None:
            all. NaN and infinity are looked for in the others, too, and a skipped step is skipped for all.
        exclude: patterns of names; parameters that match one are left out in the same way.
        every_backward: look at each micro-batch and its loss too, not only at each step.
        log_every_n_steps: how often scalars are logged, >= 0; None: as often as the Trainer does.
        histogram_every_n_steps: how often histograms are logged, >= 1; None: never.
        max_replays: how many bad steps of a run are replayed, >= 0; 0: none. A damaged one to name the operator, line and
            samples that made the damage; one that vanishes or explodes to say why. Keeps one more batch alive.
        max_bundle_mib: size, > 0, of the file that a bad step is written to, to be replayed anywhere; what does not fit
            is left out: optimizer state first, then weights. At most three a run. None: no files. It needs `max_replays`.
        sinks: where records go beside the built-in ones: objects with `write(record)` and `close()`, or functions of
            a record. They live on the first rank.
        rollback: when states are kept and how training goes back to one, for the action "rollback"; None: the defaults where
            a detector has that action, else nothing.
        quarantine: "list" writes batches that caused a skip or a rollback into `<log_dir>/gradguard/quarantine.jsonl`, with
            their samples where the sampler shows them; "skip" also keeps these samples out of later batches, in this run and
            when it is resumed; None: neither.

    Raises:
        ValueError: if an argument is wrong; when training starts, if a pattern of names matches nothing.
        ConflictError: in `setup`, if Trainer and guard exclude each other.
        GradientError: from the Trainer's `fit`, where an action is "raise".

    >>> guard = GradGuard(clip=1.0, explosion="stop")
    >>> guard.num_steps, guard.alerts, guard.stopped_by
    (0, [], None)
    """

    def __init__(
        self,
        *,
        clip: float | Clipper | Mapping[str, float | Clipper | None] | None = None,
        nonfinite: ActionName | Action | NonFinite | None = "skip",
        explosion: ActionName | Action | Explosion | None = "warn",
        vanishing: ActionName | Action | Vanishing | None = "warn",
        overflow: ActionName | Action | Overflow | None = "warn",
        detectors: Sequence[Detector] = (),
        include: Sequence[str] | None = None,
        exclude: Sequence[str] = (),
        every_backward: bool = True,
        log_every_n_steps: int | None = None,
        histogram_every_n_steps: int | None = 100,
        max_replays: int = 3,
        max_bundle_mib: float | None = 64.0,
        sinks: Sequence[Sink | Callable[[Record], object]] = (),
        rollback: Rollback | None = None,
        quarantine: Literal["list", "skip"] | None = None,
    ) -> None:
        self._settings = Settings.of(
            clip=clip,
            nonfinite=nonfinite,
            explosion=explosion,
            vanishing=vanishing,
            overflow=overflow,
            detectors=detectors,
            include=include,
            exclude=exclude,
            sinks=sinks,
            histogram_every_n_steps=histogram_every_n_steps,
        )
        if log_every_n_steps is not None:
            require_int("log_every_n_steps", log_every_n_steps, at_least=0, remedy="For the Trainer's own pass None.")
        require_int("max_replays", max_replays, at_least=0, remedy="For no replays pass 0.")
        if max_bundle_mib is not None:
            require_float("max_bundle_mib", max_bundle_mib, above=0.0, remedy="For no bundles pass None.")
        self._max_replays = max_replays
        self._max_bundle_mib = max_bundle_mib
        self._every_backward = every_backward
        self._log_every_n_steps = log_every_n_steps
        self._armed = [entry.name for entry in self._settings.detectors if entry.policy.action is Action.ROLLBACK]
        if rollback is not None and not self._armed:
            raise ValueError(
                "`rollback` must go with a detector whose action is 'rollback', got none. For example "
                "`nonfinite='rollback', explosion='rollback'`."
            )
        if quarantine not in (None, "list", "skip"):
            raise ValueError(f"`quarantine` must be 'list', 'skip' or None, got {quarantine!r}. 'list' changes nothing.")
        self._quarantine_mode: Literal["list", "skip"] | None = quarantine
        self._quarantine: Quarantine | None = None
        self._left_out: set[int] = set()
        self._rollback = rollback or (Rollback() if self._armed else None)
        self._recovery: Recovery | None = None
        self._save_gate: SaveGate | None = None
        self._progress = Progress()
        self._random: dict[str, Any] | None = None
        self._window = Window()
        self._investigation: Investigation | None = None
        self._num_replays = 0
        self._bundles: Bundles | None = None
        self._guards: dict[int, Guard] = {}
        self._restored: list[dict[str, Any]] = []
        self._batch_idx = 0
        self._batches: list[int] = []
        self._has_backward = False
        self._is_attached = False
        self._is_finished = False
        self._last: Record | None = None

    @property
    def alerts(self) -> list[Alert]:
        """Reported findings of all optimizers, oldest first."""
        return sorted((alert for guard in self._guards.values() for alert in guard.alerts), key=lambda alert: alert.step)

    @property
    def stopped_by(self) -> Alert | None:
        """What ended the training; None if nothing did."""
        return next((guard.stopped_by for guard in self._guards.values() if guard.stopped_by is not None), None)

    @property
    def last(self) -> Record | None:
        """The last step."""
        return self._last

    @property
    def num_steps(self) -> int:
        """Decisions so far, skipped steps included; one for each step of each optimizer."""
        return sum(guard.num_steps for guard in self._guards.values())

    @property
    def num_skipped(self) -> int:
        """Steps passed over so far."""
        return sum(guard.totals.num_skipped for guard in self._guards.values())

    @property
    def num_clipped(self) -> int:
        """Steps so far whose gradients were made smaller."""
        return sum(guard.totals.num_clipped for guard in self._guards.values())

    @property
    def state_key(self) -> str:
        """Key of the guard's state in a checkpoint."""
        # The Trainer's constructor refuses two callbacks of one key, with a message about checkpoints. Until `setup` has had
        # a chance to say it better, each guard has a key of its own.
        return "GradGuard" if self._is_attached else f"GradGuard-{id(self)}"

    # From here on in the order in which Lightning calls.

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what can't go together, before anything is trained."""
        refuse_second_guard(trainer, GradGuard)
        self._is_attached = True
        if stage != "fit":
            return
        self._restored = []  # what `test` or `validate` read from a checkpoint is not for this fit
        refuse_strategy(trainer)
        if self._settings.clipper is not None:
            refuse_second_clipping(trainer, pl_module)
        move_behind(trainer, self)
        self._detach()
        if self._quarantine_mode is not None:
            self._quarantine = Quarantine(self._quarantine_mode, trainer)
            self._quarantine.left_out |= self._left_out
            self._quarantine.attach()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep a checkpoint's state until there are guards to take it."""
        self._restored = state_dict["guards"]
        self._num_replays, self._investigation = state_dict.get("num_replays", 0), None
        self._progress = Progress(**state_dict.get("recovery", {}))
        self._left_out.update(state_dict.get("quarantine", ()))
        if self._quarantine is not None:
            self._quarantine.left_out |= self._left_out

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep the random states of a snapshot until training starts."""
        self._random = random_states_in(checkpoint)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make a guard for each optimizer; optimizers and a checkpoint's state are there by now."""
        goes_on = trainer.global_step > 0 and not self._restored  # a second `fit` of the same Trainer
        before = list(self._guards.values()) if goes_on else []
        states = [guard.state_dict() for guard in before] or self._restored
        settings = replace(self._settings, sinks=all_sinks(trainer, self._settings.sinks))
        interval = log_interval(trainer) if self._log_every_n_steps is None else self._log_every_n_steps
        buffers = BufferRepair(pl_module.named_buffers())
        self._window = Window()
        self._num_replays = self._num_replays_done
        self._investigation = None
        if self._max_replays:
            left = self._max_replays - self._num_replays
            self._investigation = Investigation(trainer, pl_module, self._window, buffers, left)
        self._bundles = None
        if self._max_bundle_mib is not None:
            self._bundles = Bundles(
                trainer, pl_module, self._window, max_mib=self._max_bundle_mib, guard=self._settings.in_words()
            )
        self._guards = {
            id(optimizer): Guard.from_settings(
                settings.fresh(),
                WatchedParameters(pl_module.named_parameters(), optimizer, settings.only),
                log_every_n_steps=interval,
                buffers=buffers,
                scaler=scaler_of(trainer),
                listener=self._note,
                investigate=self._investigation,
            )
            for optimizer in trainer.optimizers
        }
        for guard, state in zip(self._guards.values(), states, strict=False):
            guard.load_state_dict(state)
        for guard, earlier in zip(self._guards.values(), before, strict=False):
            guard.alerts = earlier.alerts
        self._restored = []
        self._is_finished = False
        if self._quarantine is not None:
            self._quarantine.start()
        self._save_gate = SaveGate(trainer, pl_module, self._refused_save)
        self._save_gate.attach()
        if self._rollback is not None:
            guards = list(self._guards.values())
            self._recovery = Recovery(self._rollback, trainer, pl_module, guards, armed=self._armed, stop=self._stop)
            self._recovery.progress = self._progress
            rank_zero_info(self._recovery.start())
        if self._random is not None:
            set_random_states(self._random)
            self._random = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Note where we are."""
        self._batch_idx = batch_idx
        self._has_backward = False
        if self._quarantine is not None:
            self._quarantine.begin_batch(batch_idx)
        if self._max_replays:
            self._window.open(batch, batch_idx)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Note the loss; from the second micro-batch on, measure what the ones before have left."""
        self._has_backward = True
        self._batches.append(self._batch_idx)
        if self._every_backward:
            for guard in self._guards.values():
                guard.before_backward(loss)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """The step: measure, judge, decide, clip or skip, record."""
        if not self._has_backward and skips_without_backward(trainer, pl_module):
            return
        guard = self._guards[id(optimizer)]
        num_alerts = len(guard.alerts)
        try:
            guard.step(self._position(trainer, optimizer))
        finally:
            self._batches.clear()
            self._last = guard.last
            if self._bundles is not None and self._investigation is not None:
                self._bundles.write(tuple(guard.alerts[num_alerts:]), optimizer, self._investigation.diagnosis)
            self._note_step(optimizer, guard)
        if guard.stopped_by is not None:
            self._stop(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Let go of batches that no step needs any more; go back where that was decided; keep a snapshot where due."""
        if self._recovery is not None:
            self._recovery.after_batch()
        if self._quarantine is not None:
            self._quarantine.after_batch()
        self._window.close(trainer.optimizers)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to decide as one that ran through."""
        state: dict[str, Any] = {"guards": [guard.state_dict() for guard in self._guards.values()] or self._restored}
        state["num_replays"] = self._num_replays_done
        if self._recovery is not None:
            state["recovery"] = vars(self._recovery.progress).copy()
        if self._quarantine is not None:
            state["quarantine"] = sorted(self._quarantine.left_out)
        return state

    @property
    def _num_replays_done(self) -> int:
        return self._num_replays + (0 if self._investigation is None else self._investigation.num_done)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Wait for the last step, and say what the run came to."""
        for guard in self._guards.values():
            guard.flush()
        self._finish()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Say it also where the run ends by an error or an interrupt."""
        with suppress(GradientError):  # there is an error already
            for guard in self._guards.values():
                guard.flush()
        self._finish()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave nothing on the Trainer."""
        self._detach()

    def _detach(self) -> None:
        if self._save_gate is not None:
            self._save_gate.detach()
            self._save_gate = None
        if self._quarantine is not None:
            self._left_out = self._quarantine.left_out
            self._quarantine.detach()
            self._quarantine = None

    def _refused_save(self, message: str) -> None:
        guard = next(iter(self._guards.values()))
        remedy = "What was saved before stays. Find what damages the weights, and resume from there."
        position = guard.last.position if guard.last is not None else Position(step=0)
        guard.notify(notice(position, "checkpoint", Action.SKIP, f"{message}.", remedy))

    def _note(self, record: Record) -> None:
        if self._recovery is not None:
            self._recovery.note(record)
        if self._quarantine is not None:
            self._quarantine.note(record)

    def _position(self, trainer: Trainer, optimizer: Optimizer) -> Position:
        return Position(
            step=self.num_steps,
            epoch=trainer.current_epoch,
            batch_idx=self._batch_idx,
            batches=tuple(self._batches) if len(self._guards) == 1 else (),
            optimizer=list(self._guards).index(id(optimizer)),
            num_optimizers=len(self._guards),
            rank=trainer.global_rank,
            log_step=log_step(trainer),
        )

    def _stop(self, trainer: Trainer) -> None:
        if not trainer.should_stop and (reason := stop_is_deferred_by(trainer)):
            warnings.warn(
                f"GradGuard stops the training, but `{reason}` keeps the Trainer going until then. Bad steps stay skipped.",
                GuardWarning,
                stacklevel=2,
            )
        trainer.should_stop = True

    def _note_step(self, optimizer: Optimizer, guard: Guard) -> None:
        if isinstance(optimizer, torch.optim.LBFGS):
            self._window.reopen()
        if self._investigation is not None:
            self._investigation.note(optimizer, guard.last, is_pending=guard.is_pending)
        self._window.note_step(optimizer, guard.num_steps - 1, is_pending=guard.is_pending)

    def _finish(self) -> None:
        self._window.clear()
        if self._investigation is not None:
            self._investigation.clear()
        if not self._guards or self._is_finished:
            return
        self._is_finished = True
        for guard in self._guards.values():
            guard.close()
        if self._recovery is not None:
            self._recovery.close()
        rank_zero_info(summarize([guard.totals for guard in self._guards.values()], self.stopped_by))
