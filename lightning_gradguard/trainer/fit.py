"""Everything that belongs to one running fit: made in one place, and taken down in one place however the fit ends."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.optim import Optimizer

from lightning_gradguard.act.buffers import Buffers
from lightning_gradguard.alert import Alert
from lightning_gradguard.environment import Environment
from lightning_gradguard.measure.parameters import WatchedParameters
from lightning_gradguard.pipeline import Pipeline
from lightning_gradguard.policy import Action
from lightning_gradguard.record import Position, Record, Totals
from lightning_gradguard.report.alerting import notice
from lightning_gradguard.report.summary import summarize
from lightning_gradguard.settings import Settings
from lightning_gradguard.trainer.clipping import ScaledClipping, clips_later
from lightning_gradguard.trainer.conflicts import can_quarantine
from lightning_gradguard.trainer.guards import Guards
from lightning_gradguard.trainer.history import History
from lightning_gradguard.trainer.options import Options
from lightning_gradguard.trainer.packages import rank_zero_info
from lightning_gradguard.trainer.precision import scaler_of
from lightning_gradguard.trainer.progress import log_interval, request_stop
from lightning_gradguard.trainer.raised import RaisedSteps
from lightning_gradguard.trainer.recovery.quarantine import Quarantine
from lightning_gradguard.trainer.recovery.recovery import Recovery
from lightning_gradguard.trainer.recovery.run_state import set_random_states
from lightning_gradguard.trainer.recovery.saving import SaveGate
from lightning_gradguard.trainer.replay.incidents import Incidents
from lightning_gradguard.trainer.running_step import RunningStep
from lightning_gradguard.trainer.sinks import all_sinks
from lightning_gradguard.trainer.skipped_gradients import SkippedGradients
from lightning_gradguard.trainer.strategies import engine_of

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


class Fit:
    """One fit of a Trainer, from `setup` to `teardown`.

    Args:
        trainer: whose fit.
        module: what it trains.
        settings: of the guards.
        options: of the fit.
        history: what it may go on from.

    Raises:
        ConflictError: for a strategy that can't be guarded, or not with these settings.
    """

    def __init__(
        self, trainer: Trainer, module: LightningModule, settings: Settings, options: Options, history: History
    ) -> None:
        self._trainer = trainer
        self._module = module
        self._engine = engine_of(trainer)
        self._engine.refuse_settings(settings)
        self._settings = settings
        self._options = options
        self._history = history
        self._buffers = Buffers()
        self._step = RunningStep(trainer, module)
        self._incidents: Incidents | None = None
        self._recovery: Recovery | None = None
        self._save_gate: SaveGate | None = None
        self._quarantine: Quarantine | None = None
        self._scaled_clipping: ScaledClipping | None = None
        self._raised: RaisedSteps | None = None
        self._skipped: SkippedGradients | None = None
        self._is_finished = False
        self.guards: Guards | None = None
        """One for each optimizer; None until training starts."""
        self._last_guard: Pipeline | None = None
        if options.quarantine is not None and can_quarantine(options.quarantine, module):
            self._quarantine = Quarantine(options.quarantine, trainer)
            self._quarantine.left_out |= history.left_out
            self._quarantine.attach()

    @property
    def has_started(self) -> bool:
        """Whether training has begun."""
        return self.guards is not None

    @property
    def last(self) -> Record | None:
        """The last step."""
        return None if self._last_guard is None else self._last_guard.last

    @property
    def alerts(self) -> list[Alert]:
        """Reported findings of all optimizers, oldest first."""
        return [] if self.guards is None else self.guards.alerts

    @property
    def stopped_by(self) -> Alert | None:
        """What ended the training; None if nothing did."""
        return None if self.guards is None else self.guards.stopped_by

    @property
    def totals(self) -> list[Totals]:
        """Counts of each optimizer."""
        return [] if self.guards is None else self.guards.totals

    def restore(self, history: History) -> None:
        """Go on from a checkpoint, read before training starts."""
        self._history = history
        if self._quarantine is not None:
            self._quarantine.left_out |= history.left_out

    def start(self) -> None:
        """Make all that training needs; optimizers and a checkpoint's state are there by now."""
        trainer, module, options, history = self._trainer, self._module, self._options, self._history
        self._engine.refuse(trainer.optimizers, self._settings)
        self._buffers = Buffers(module=module, follows_steps=_may_step_often(trainer, module))
        self._incidents = Incidents(
            trainer,
            module,
            self._buffers,
            self._settings,
            options,
            engine=self._engine,
            num_replays=history.num_replays,
        )
        settings = replace(
            self._settings, sinks=all_sinks(trainer, self._settings.sinks, self._settings.in_words(), options.log_norms)
        )
        self.guards = Guards(trainer, self._watch, settings, self._environment(self._incidents), history)
        if self._quarantine is not None:
            self._quarantine.start()
            if (find := self._incidents.investigation) is not None:
                self._quarantine.find_culprit = lambda record: find(record.position, record.measurement, "nonfinite")
        self._save_gate = SaveGate(trainer, module, partial(_report_refused_save, self.guards))
        self._save_gate.attach()
        self._scaled_clipping = ScaledClipping.watch(trainer)
        self._skipped = SkippedGradients.where_seen(trainer, module)
        self._raised = self._incidents.follow_exceptions(self.guards, self._step, self.step)
        if options.snapshots is not None:
            self._recovery = Recovery(
                options.snapshots,
                trainer,
                module,
                self.guards,
                rollback_detectors=options.rollback_detectors,
                stop=lambda: request_stop(trainer),
            )
            self._recovery.progress = replace(history.rollbacks)
            rank_zero_info(self._recovery.start())
        if history.random is not None:
            set_random_states(history.random)

    def begin_batch(self, batch: Any, batch_idx: int) -> None:
        """Note where we are."""
        assert self.guards is not None
        assert self._incidents is not None
        self.guards.follow()
        if self._skipped is not None:
            self._skipped.forget()
        if self._step.begins:
            self._buffers.remember()
        else:
            self._buffers.look()
        self._step.begin_batch(batch_idx)
        if self._step.knows_batches:
            if self._quarantine is not None:
                self._quarantine.begin_batch(batch_idx)
            self._incidents.open(batch, batch_idx)

    def before_backward(self, loss: Tensor) -> None:
        """Note the loss; from the second micro-batch on, measure what the ones before have left."""
        self._step.before_backward()
        if self._options.every_backward and self.guards is not None:
            for guard in self.guards:
                guard.before_backward(loss)

    def step(self, optimizer: Optimizer) -> None:
        """Have the guard decide about a step, write a bad one down, and stop the training where that was decided."""
        if self.guards is None or not self._engine.is_step() or self._step.is_skipped_by_lightning():
            return
        if (index := self.guards.index_of(optimizer)) is None:
            return
        assert self._incidents is not None
        guard = self.guards[index]
        try:
            guard.decide(self._step.position(index, self.guards))
        finally:
            self._step.end()
            self._last_guard = guard
            self._incidents.look_back(optimizer, guard)
            taken = guard.hand_over_taken()
            if self._skipped is not None:
                self._skipped.show(taken)
        if self._scaled_clipping is not None and guard.outcome is not None:
            self._scaled_clipping.note(guard.outcome.measurement)
        if guard.stopped_by is not None:
            request_stop(self._trainer)
        guard.leave()

    def end_batch(self) -> None:
        """Go back where that was decided; keep a snapshot where due; let go of batches that no step needs any more."""
        for part in (self._recovery, self._quarantine):
            if part is not None:
                part.after_batch()
        assert self._incidents is not None
        self._incidents.close()

    def flush(self) -> None:
        """Learn of the last step.

        Raises:
            GradientError: where its action is "raise".
        """
        if self.guards is not None:
            self.guards.flush()

    def explain(self, error: BaseException) -> None:
        """Say why the run has ended in an exception, where another rank knows."""
        if self._raised is not None:
            self._raised.explain(error)

    def finish(self) -> None:
        """Say what the run came to, once."""
        if self._incidents is not None:
            self._incidents.clear()
        if not self.guards or self._is_finished:
            return
        self._is_finished = True
        self.guards.close()
        if self._recovery is not None:
            self._recovery.detach()
        rank_zero_info(summarize(self.totals, self.stopped_by, is_manual=not self._module.automatic_optimization))

    def take_down(self, *, in_exception: bool = False) -> None:
        """Leave nothing on Trainer, optimizers and callbacks.

        Args:
            in_exception: whether callbacks are being told of an exception: checkpoints that are still to save for it are
                looked at until then.
        """
        if self._save_gate is not None:
            self._save_gate.detach(after_exception=in_exception)
        for part in (self._recovery, self._quarantine, self._scaled_clipping, self._raised, self._skipped, self.guards):
            if part is not None:
                part.detach()

    def history(self) -> History:
        """What is to be known of it when it is over, and what a checkpoint needs."""
        if self.guards is None:
            return self._history
        history, done = self._history, 0 if self._incidents is None else self._incidents.num_replays
        return History(
            guards=[guard.state_dict() for guard in self.guards],
            totals=self.totals,
            num_replays=history.num_replays + done,
            rollbacks=history.rollbacks if self._recovery is None else replace(self._recovery.progress),
            left_out=history.left_out if self._quarantine is None else set(self._quarantine.left_out),
            alerts=self.alerts,
            stopped_by=self.stopped_by,
            last=self.last,
        ).of(self._module)

    def _environment(self, incidents: Incidents) -> Environment:
        own = self._options.log_every_n_steps
        return Environment(
            log_interval(self._trainer) if own is None else own,
            self._buffers,
            scaler_of(self._trainer),
            self._engine.scaling,
            listener=self._note if self._listens else None,  # healthy steps are cheap without
            can_defer=True,
            clips_later=clips_later(self._trainer, self._module),
            investigate=incidents.investigation,
            archive=None if incidents.bundles is None else incidents.bundles.write,
        )

    def _watch(self, optimizer: Optimizer) -> WatchedParameters:
        return self._engine.watch(self._module, optimizer, self._settings.only)

    @property
    def _listens(self) -> bool:
        return self._options.snapshots is not None or self._quarantine is not None or self._engine.scaling is not None

    def _note(self, record: Record) -> None:
        self._engine.note(record)
        for part in (self._recovery, self._quarantine):
            if part is not None:
                part.note(record)


def _report_refused_save(guards: Guards, message: str) -> None:
    """Tell of a checkpoint that was not saved, by the first optimizer's guard; nobody does where there is none."""
    for guard in guards[:1]:
        remedy = "What was saved before stays. Find what damages the weights, and resume from there."
        position = Position(step=0) if guard.last is None else guard.last.position
        guard.notify(notice(position, "checkpoint", Action.SKIP, f"{message}.", remedy))


def _may_step_often(trainer: Trainer, module: LightningModule) -> bool:
    """Whether a batch may have several steps."""
    return len(trainer.optimizers) > 1 or not module.automatic_optimization
