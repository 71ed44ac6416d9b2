"""The way of a step, for one optimizer: measure, judge, act, report."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec

import torch
from torch import Tensor

from lightning_gradguard.act.base import Executor
from lightning_gradguard.act.choice import executor_for
from lightning_gradguard.act.closures import InClosure
from lightning_gradguard.act.gate import Gate
from lightning_gradguard.act.on_host import OnHost
from lightning_gradguard.act.pending import PendingStep
from lightning_gradguard.alert import Alert, Culprit
from lightning_gradguard.clippers import Grouped
from lightning_gradguard.environment import Environment
from lightning_gradguard.fast_path import FastPath
from lightning_gradguard.judge.judge import NOTHING_FOUND, Judge, Judgement
from lightning_gradguard.measure.parameters import WatchedParameters
from lightning_gradguard.measure.scaling import LossScaling
from lightning_gradguard.measure.shards import Parameter
from lightning_gradguard.measure.step import StepMeter
from lightning_gradguard.policy import Action
from lightning_gradguard.record import Measurement, Outcome, Position, Record, Totals
from lightning_gradguard.report.alerting import INVESTIGATED
from lightning_gradguard.report.raised import Raised, alert_of
from lightning_gradguard.report.reporter import DecidedStep, Reporter
from lightning_gradguard.saved_state import VERSION, mended_guard_state
from lightning_gradguard.settings import Settings

_Args = ParamSpec("_Args")


def _without_grad(method: Callable[_Args, None]) -> Callable[_Args, None]:
    """As `torch.no_grad`, in half the time, which counts at each step."""

    @wraps(method)
    def run(*args: _Args.args, **kwargs: _Args.kwargs) -> None:
        had_grad = torch.is_grad_enabled()
        torch.set_grad_enabled(False)
        try:
            method(*args, **kwargs)
        finally:
            torch.set_grad_enabled(had_grad)

    return run


class Pipeline:
    """Everything that happens to the gradients of one optimizer between `backward()` and `optimizer.step()`.

    `GradGuard` has one for each optimizer of a Trainer; `Guard` is one for a loop of one's own.

    Args:
        settings: with sinks exactly as they are used.
        parameters: what is watched.
        environment: what it works with besides.

    Raises:
        ValueError: if a pattern of `clip` matches no parameter.
    """

    def __init__(self, settings: Settings, parameters: WatchedParameters, environment: Environment) -> None:
        optimizer, scaler, scaling = parameters.optimizer, environment.scaler, environment.scaling
        if scaler is not None and optimizer is not None:
            scaling = LossScaling(scaler, optimizer)
        if isinstance(settings.clipper, Grouped):
            settings.clipper.check(parameters.model_names)
        self._meter = StepMeter(parameters, scaling, settings.logged(environment.log_every_n_steps))
        self._parameters = parameters
        self._detectors = settings.detectors
        self._gate = Gate(parameters, settings.clipper, environment.buffers, uses_scaler=scaling is not None)
        self._executor: Executor = executor_for(self._gate, parameters)
        self._reporter = Reporter(
            settings.sinks,
            scalar_interval=environment.log_every_n_steps,
            limit=lambda: self._judge.last_limit,
            listener=environment.listener,
            archive=environment.archive,
            clips_later=environment.clips_later,
            hint=environment.hint,
            is_clipped=settings.clipper is not None or environment.clips_later,
        )
        # The device wants to know the limit at each step, and a closure decides about one step several times.
        waits = isinstance(self._executor, InClosure) or self._executor.wants_threshold
        self._can_defer = environment.can_defer and not waits and not self._reporter.wants_every_step
        self._judge = Judge(settings.detectors, can_defer=self._can_defer)
        is_on_host = scaling is None and isinstance(self._executor, OnHost)
        self._fast_path = FastPath(self._meter, self._judge, self._gate, self._reporter, is_possible=is_on_host)
        self._investigate = environment.investigate
        self._pending: PendingStep | None = None
        self.outcome: Outcome | None = None
        """What the last step came to, as far as the host knows."""
        self._raised: Raised | None = None
        self._knows_stop = False  # since the last step at the latest

    @property
    def totals(self) -> Totals:
        """Counts so far."""
        return self._reporter.totals

    @property
    def alerts(self) -> list[Alert]:
        """Reported findings, oldest first."""
        return self._reporter.alerts

    @property
    def last(self) -> Record | None:
        """The last step."""
        return self._reporter.last

    @property
    def stopped_by(self) -> Alert | None:
        """What asked for the end of training; None: nothing has."""
        return self._reporter.stopped_by

    def hand_over_taken(self) -> list[tuple[Parameter, Tensor]]:
        """The gradients that skipping the last step has taken away; asked for once."""
        taken, self._gate.taken = self._gate.taken, []
        return taken

    @property
    def num_steps(self) -> int:
        """Steps so far, one included whose outcome the host has yet to learn."""
        return self._reporter.num_steps + (self._pending is not None)

    @property
    def is_pending(self) -> bool:
        """Whether the host has yet to learn of the last step."""
        return self._pending is not None

    def before_backward(self, loss: Tensor | None = None) -> None:
        """Note a backward pass that is about to begin; see `Guard.before_backward`."""
        self._meter.before_backward(loss)

    @property
    def skips_damage(self) -> bool:
        """Whether the next step would be skipped, and no error raised, if NaN or infinity were found in it."""
        action = self._judge.damage_action
        return action is not None and action.skips and action is not Action.RAISE

    def note_exception(self, raised: Raised) -> None:
        """Note a forward or backward pass that NaN or infinity has ended by an exception, as one whose loss is NaN."""
        self._raised = self._raised or raised
        self.before_backward(torch.tensor(torch.nan, device=self._parameters.device))

    def report_exception(self, position: Position, raised: Raised, *, is_alone: bool = False) -> Alert | None:
        """Tell of an exception that NaN or infinity is the reason of, and that passes on; None if nobody looks for them.

        A collective if there are several ranks, unless `is_alone`.
        """
        if (action := self._judge.damage_action) is None:
            return None
        alert = alert_of(position, raised, action)
        return self._reporter.tell_exception(alert, position, self._parameters.layout, is_alone=is_alone)

    def pass_on(self, alert: Alert, position: Position) -> None:
        """Tell of an exception of which another rank has made an alert."""
        self._reporter.tell_exception(alert, position, self._parameters.layout, is_archived=True)

    def decide(self, position: Position | None = None) -> None:
        """The step: measure, judge, act, report; `leave` has to follow. `Guard.step` says more.

        Raises:
            GradientError: where the action is "raise"; the step is not applied.
        """
        outcome = None if self._raised is not None else self._fast_path.decide(position)
        if outcome is not None:
            self.outcome = outcome
        else:
            self._decide(position)

    @_without_grad
    def _decide(self, position: Position | None) -> None:
        if isinstance(self._executor, InClosure) and self._executor.note_evaluation() and self.last is not None:
            self._evaluate_again(self.last)
            return
        if self._ended_late():
            return
        updates = self._meter.read_update_()
        self._gate.open()
        position = position or Position(step=self.num_steps, log_step=self.num_steps)
        histogram_is_due = self._meter.logged.histogram_is_due(position.log_step)
        has_raised = self._raised is not None
        step = self._meter.measure(position, updates, with_histogram=histogram_is_due, owns_losses=has_raised)
        # What the device compares with. The first step is the host's, since it has to return a record.
        has_last = self._reporter.has_last
        knows_threshold = self._executor.wants_threshold and has_last and not has_raised
        pending = self._executor.begin_(step, self._judge.skip_threshold() if knows_threshold else None)
        if pending.is_left_to_device and has_last:
            self._pending = pending
            self._meter.start_(with_update=self._judge.needs_update())
            return
        is_wanted = histogram_is_due or has_raised or not has_last or self._reporter.is_due(position)
        self._conclude(pending, can_defer=self._can_defer and not is_wanted)
        self._fast_path.look_ahead(position)

    def leave(self) -> None:
        """Take an optimizer that is not torch's out of a bad step that it is inside of, by an exception."""
        self._executor.leave()
        self._knows_stop = self._reporter.stopped_by is not None

    def _conclude(self, pending: PendingStep, *, is_repeated: bool = False, can_defer: bool = False) -> None:
        """Judge a measured step, carry out what is decided, and tell."""
        measurement = pending.read()
        if can_defer and self._judge.defer(measurement):
            clipped = self._executor.finish_(pending, measurement, NOTHING_FOUND.decision)
            self.outcome = Outcome(pending.position, measurement)
            self._meter.start_(with_update=self._judge.needs_update())
            self._reporter.note(DecidedStep(pending.position, measurement, NOTHING_FOUND, clipped.coef, clipped.norm))
            return
        judgement = self._judge.judge(measurement, is_repeated=is_repeated)
        raised, self._raised = self._raised, None
        if raised is not None:
            judgement = self._judge.tell_exception(judgement, raised.told_by)
        culprit = (raised and raised.culprit) or self._culprit(pending.position, measurement, judgement)
        clipped = self._executor.finish_(pending, measurement, judgement.decision)
        has_finding = any(verdict is not None for verdict in judgement.found)
        self.outcome = Outcome(pending.position, measurement, judgement.decision.skip, has_finding)
        if not pending.is_left_to_device and not judgement.decision.skip:
            self._meter.start_(with_update=self._judge.needs_update())
        counts = self._gate.histogram(pending, measurement, judgement.decision)
        histograms = self._meter.histograms(counts, pending.present)
        step = DecidedStep(pending.position, measurement, judgement, clipped.coef, clipped.norm, culprit, histograms)
        self._reporter.report(step, replaces_last=is_repeated)

    def _evaluate_again(self, first: Record) -> None:
        """A further evaluation inside one step of LBFGS: it counts only if it turns the step bad."""
        pending = self._executor.begin_(self._meter.measure(first.position), None)
        measurement = pending.read()
        if first.decision.skip or measurement.is_finite:
            self._executor.finish_(pending, measurement, first.decision)
        else:
            self._conclude(pending, is_repeated=True)

    def flush(self) -> None:
        """Wait for a step that the device has decided by itself, and record it; see `Guard.flush`."""
        pending, self._pending = self._pending, None
        if pending is not None:
            self._conclude(pending)

    def close(self) -> None:
        """Let the sinks write out what they hold. The guard can be used on."""
        self._reporter.close()

    def detach(self) -> None:
        """Take all hooks off the optimizer, which ends the guard."""
        self._gate.detach()
        self._executor.detach()

    def notify(self, alert: Alert) -> None:
        """Report something that is no finding about gradients; before the first step it waits for that."""
        self._reporter.notify(alert)

    def state_dict(self) -> dict[str, Any]:
        """Baselines, streaks and counts in plain types, so that a resumed run decides as one that ran through."""
        self.flush()
        return {
            "version": VERSION,
            "judge": self._judge.state_dict(),
            "clipper": self._gate.state_dict(),
            "updates": self._meter.state_dict(),
            "totals": self._reporter.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state; what is damaged, or configured otherwise by now, starts afresh, with a warning."""
        self._pending = None
        state = mended_guard_state(state, self._detectors, self._gate.clipper, self._parameters.layout)
        self._reporter.load_state_dict(state["totals"])
        self._judge.load_state_dict(state["judge"])
        self._meter.load_state_dict(state["updates"])
        self._gate.load_state_dict(state["clipper"])

    def return_to(self, state: dict[str, Any]) -> None:
        """Judge and clip as at a saved state; counts and alerts go on."""
        self._meter.forget()
        self.load_state_dict({**state, "totals": self._reporter.state_dict()})

    def _ended_late(self) -> bool:
        """Learn of the step before. If it ends the training, the present one comes too late, and is not applied."""
        self.flush()
        if self._knows_stop or self.stopped_by is None:
            return False
        self._gate.skip_()
        self._meter.forget()
        return True

    def _culprit(self, position: Position, measurement: Measurement, judgement: Judgement) -> Culprit | None:
        """Who is to blame for what is going to be reported."""
        reported = zip(judgement.verdicts, judgement.decision.alerting, strict=True)
        found = [verdict for verdict, alerting in reported if alerting and verdict.kind in INVESTIGATED]
        if self._investigate is None or not found:
            return None
        kind = found[0].kind if measurement.is_finite else "nonfinite"
        silent = [report.name for report in found[0].parameters if report.norm == 0.0]
        ends_run = (judgement.decision.action or Action.LOG) >= Action.STOP
        return self._investigate(position, measurement, kind, silent=silent, ends_run=ends_run)
