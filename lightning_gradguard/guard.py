"""The whole pipeline for one optimizer, without Lightning."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler

from lightning_gradguard.act.base import Executor
from lightning_gradguard.act.buffers import Buffers
from lightning_gradguard.act.choice import executor_for
from lightning_gradguard.act.closures import InClosure
from lightning_gradguard.act.gate import Gate
from lightning_gradguard.act.pending import PendingStep
from lightning_gradguard.alert import Alert, Culprit
from lightning_gradguard.clippers import Clipper, Grouped
from lightning_gradguard.detectors import Detector, Explosion, NonFinite, Overflow, Vanishing
from lightning_gradguard.errors import GradientError
from lightning_gradguard.forensics.nonfinite.raised import is_lack_of_memory, is_lost_gpu
from lightning_gradguard.forensics.raw_loop import HOW, RawLoop
from lightning_gradguard.judge.judge import Judge, Judgement
from lightning_gradguard.measure.distributed import Ranks
from lightning_gradguard.measure.parameters import WatchedParameters
from lightning_gradguard.measure.scaling import LossScaling
from lightning_gradguard.measure.step import StepMeter
from lightning_gradguard.policy import Action, ActionName, require_int
from lightning_gradguard.record import Measurement, Position, Record, Totals
from lightning_gradguard.report.alerting import INVESTIGATED
from lightning_gradguard.report.raised import Raised, add_note, alert_of, in_words
from lightning_gradguard.report.reporter import DecidedStep, Reporter, is_due
from lightning_gradguard.saved_state import VERSION, mended_guard_state
from lightning_gradguard.settings import Settings
from lightning_gradguard.sinks import ConsoleSink, Sink


class Investigate(Protocol):
    """Says who is to blame for a finding of some kind."""

    def __call__(self, position: Position, measurement: Measurement, kind: str, *, ends_run: bool) -> Culprit | None:
        """Asked while the step's gradients are still there, if they ever are.

        Args:
            position: where the step stands.
            measurement: of its gradients.
            kind: "nonfinite", "explosion" or "vanishing".
            ends_run: whether the finding ends the training, so that it needs an answer more than any other.
        """


@dataclass(frozen=True, eq=False)
class Environment:
    """What a guard works with besides its settings.

    Attributes:
        log_every_n_steps: how often scalars are due, >= 0; 0: never, but on steps with an alert.
        buffers: what the forward pass of a skipped step has changed.
        scaler: what scales the loss in fp16 training.
        listener: gets every record on every rank, before the sinks; what it raises is not caught.
        clips_later: whether somebody else clips after the guard.
        investigate: says who is to blame for a finding.
        archive: writes a step with these alerts down, and gives them back with where that is; called before they are told.
        hint: what is said where nobody can tell who is to blame.

    Raises:
        ValueError: if `log_every_n_steps` is wrong.
    """

    log_every_n_steps: int
    buffers: Buffers
    scaler: GradScaler | None = None
    listener: Callable[[Record], None] | None = None
    clips_later: bool = False
    investigate: Investigate | None = None
    archive: Callable[[tuple[Alert, ...]], tuple[Alert, ...]] | None = None
    hint: str = ""

    def __post_init__(self) -> None:
        require_int("log_every_n_steps", self.log_every_n_steps, at_least=0, remedy="For no scalars pass 0.")


class Guard:
    """Watches the gradients of one optimizer: measures, judges, decides, clips or skips, and records.

    Call `step()` between `backward()` and `optimizer.step()`. Where several backward passes make one step, or to have
    the loss looked at too, call `before_backward(loss)` before each of them.

    Args:
        named_parameters: the model's parameters, as `model.named_parameters()` gives them.
        optimizer: whose parameters are watched; None: all of `named_parameters`.
        clip: largest norm, or a clipper, or a mapping of patterns of names to either (`Grouped`); None: no clipping.
        nonfinite, explosion, vanishing, overflow: an action's name, a configured detector, or None for off.
        detectors: your own, beside these.
        include: patterns of names (fnmatch); only parameters that match one are measured, judged, clipped and logged. None:
            all. NaN and infinity are looked for in the others, too, and a skipped step is skipped for all.
        exclude: patterns of names; parameters that match one are left out in the same way.
        log_every_n_steps: how often scalars are due, >= 0; 0: never, but on steps with an alert.
        histogram_every_n_steps: how often histograms are, >= 1; None: never.
        sinks: where records go: objects with `write(record)` and `close()`, or functions of a record. Alerts are
            warned of whatever they are.
        named_buffers: the model's buffers, as `model.named_buffers()` gives them: a skipped step puts their values back, as
            they were when the last step was applied.
        scaler: what scales the loss in fp16 training. The guard unscales the gradients by it before it looks at them (give
            `optimizer` too), and leaves the calibration of its scale alone.
        replay: a function that runs the step again and returns the loss, as `lambda: loss_of(model(x), y)`, or runs
            `backward()` too and returns None. It is called at up to three steps with NaN or Inf, to name the culprit; module
            and batch are found among the variables that it uses. It must not step the optimizer.

    In distributed training every rank needs a guard and has to call it at the same points: ranks decide together, over
    torch's default process group.

    Raises:
        ValueError: if an argument is wrong.

    >>> model = torch.nn.Linear(2, 1)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> guard = Guard(model.named_parameters(), optimizer=optimizer, clip=1.0)
    >>> model(torch.ones(4, 2)).sum().backward()
    >>> record = guard.step()
    >>> round(record.measurement.global_norm, 3), round(record.clipped_norm, 3)
    (6.928, 1.0)
    >>> optimizer.step()
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, Tensor]],
        optimizer: torch.optim.Optimizer | None = None,
        *,
        clip: float | Clipper | Mapping[str, float | Clipper | None] | None = None,
        nonfinite: ActionName | Action | NonFinite | None = "skip",
        explosion: ActionName | Action | Explosion | None = "warn",
        vanishing: ActionName | Action | Vanishing | None = "warn",
        overflow: ActionName | Action | Overflow | None = "warn",
        detectors: Sequence[Detector] = (),
        include: Sequence[str] | None = None,
        exclude: Sequence[str] = (),
        log_every_n_steps: int = 50,
        histogram_every_n_steps: int | None = 100,
        sinks: Sequence[Sink | Callable[[Record], object]] = (),
        named_buffers: Iterable[tuple[str, Tensor]] = (),
        scaler: GradScaler | None = None,
        replay: Callable[[], Tensor | None] | None = None,
    ) -> None:
        settings = Settings.of(
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
        settings.refuse_rollback()
        settings = replace(settings.fresh(), sinks=(*settings.sinks, ConsoleSink()))
        parameters = WatchedParameters(named_parameters, optimizer, settings.only)
        raw_loop = (
            None if replay is None else RawLoop(replay, [it for it in parameters.tensors if isinstance(it, Tensor)], scaler)
        )
        environment = Environment(
            log_every_n_steps,
            Buffers(named_buffers),
            scaler,
            listener=None if raw_loop is None else raw_loop.note,
            investigate=raw_loop,
            hint=HOW if raw_loop is None else "",
        )
        self._set_up(settings, parameters, environment)

    @classmethod
    def from_settings(cls, settings: Settings, parameters: WatchedParameters, environment: Environment) -> Guard:
        """A guard with exactly these sinks; for adapters such as `GradGuard`."""
        guard = cls.__new__(cls)
        guard._set_up(settings, parameters, environment)
        return guard

    def _set_up(self, settings: Settings, parameters: WatchedParameters, environment: Environment) -> None:
        optimizer, scaler = parameters.optimizer, environment.scaler
        scaling = LossScaling(scaler, optimizer) if scaler is not None and optimizer is not None else None
        self._histogram_interval = settings.histogram_every_n_steps or 0
        if isinstance(settings.clipper, Grouped):
            settings.clipper.check(parameters.model_names)
        self._meter = StepMeter(parameters, scaling, log_interval=environment.log_every_n_steps if settings.sinks else 0)
        self._parameters = parameters
        self._detectors = settings.detectors
        self._judge = Judge(settings.detectors)
        self._gate = Gate(parameters, settings.clipper, environment.buffers, uses_scaler=scaling is not None)
        self._executor: Executor = executor_for(self._gate, parameters)
        self._reporter = Reporter(
            settings.sinks,
            scalar_interval=environment.log_every_n_steps,
            listener=environment.listener,
            archive=environment.archive,
            clips_later=environment.clips_later,
            hint=environment.hint,
        )
        self._investigate = environment.investigate
        self._pending: PendingStep | None = None
        self._raised: Raised | None = None

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

    @property
    def num_steps(self) -> int:
        """Steps so far, one included whose outcome the host has yet to learn."""
        return self.totals.num_steps + self.is_pending

    @property
    def is_pending(self) -> bool:
        """Whether the host has yet to learn of the last step."""
        return self._pending is not None

    @torch.no_grad()
    def before_backward(self, loss: Tensor | None = None) -> None:
        """Note a backward pass that is about to begin.

        From the second one before a step on, the gradients accumulated so far are measured as well, so that an alert
        can name the pass that did the damage. No sync, rank-local.

        Args:
            loss: what `backward()` is called on, scalar; with a `scaler`, scaled by it.
        """
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

    def report_exception(self, position: Position, raised: Raised) -> Alert | None:
        """Tell of an exception that NaN or infinity is the reason of, and that passes on; None if nobody looks for them."""
        action = self._judge.damage_action
        if action is None:
            return None
        return self._reporter.tell_exception(alert_of(position, raised, action), position, self._parameters.layout)

    @contextmanager
    def watch_step(self, skip_exceptions: Literal["torch", "all"] | None = "torch") -> Iterator[None]:
        """Around forward pass, backward pass and step: for exceptions that NaN or Inf is the reason of.

        Such a one is told of as a damaged step is. Where the action skips, nothing has been applied yet, and there is one
        process only, it ends here, and the step counts as a skipped one; otherwise it passes on with a note of the alert.
        Every other exception passes on untouched. It needs `replay`.

        Args:
            skip_exceptions: which ones may end here: "torch": those that torch raises; "all"; None: none.
        """
        num_steps, versions = self.num_steps, self._versions()
        try:
            yield
        except Exception as error:
            is_unchanged = num_steps == self.num_steps and versions == self._versions()
            if not self._ends_here(error, skip_exceptions if is_unchanged else None):
                raise

    def _versions(self) -> int:
        return sum([int(getattr(parameter, "_version", 0)) for parameter in self._parameters.everything])

    def _ends_here(self, error: Exception, skip_exceptions: str | None) -> bool:
        """Tell of an exception if damage is its reason; True if its step is skipped."""
        is_ours = isinstance(self._investigate, RawLoop) and not isinstance(error, GradientError)
        if not is_ours or is_lack_of_memory(error) or is_lost_gpu(error) or Ranks.current().size > 1:
            return False
        assert isinstance(self._investigate, RawLoop)
        try:
            cause = self._investigate.cause_of(error)
        except Exception:  # noqa: BLE001 - the exception that was there first matters more
            cause = None
        if cause is None:
            return False
        culprit, is_in_torch = cause
        raised = Raised(in_words(error), culprit=culprit)
        if self.skips_damage and (skip_exceptions == "all" or (skip_exceptions == "torch" and is_in_torch)):
            self.note_exception(raised)
            self.step()
            return True
        position = Position(step=self.num_steps, log_step=self.num_steps)
        if (alert := self.report_exception(position, raised)) is not None:
            add_note(error, alert.message)
        return False

    def step(self, position: Position | None = None) -> Record:
        """Inspect the gradients, then clip them, or keep the optimizer from applying them.

        In place. At most one collective; more on an incident with sharded gradients. On a CPU everything is immediate. On
        CUDA with a fused optimizer the device skips and clips by itself, without a sync; the host learns of it at the next
        step, or at `flush()`. On CUDA with another one the host waits once, after everything has been queued.

        Args:
            position: where in the training this is; None counts from 0.

        Returns:
            The record of this step; where the host has yet to learn of it, that of the last one it knows.

        Raises:
            GradientError: where the action is "raise"; the step is not applied.
        """
        record = self.decide(position)
        self.leave()
        return record

    @torch.no_grad()
    def decide(self, position: Position | None = None) -> Record:
        """`step` without its end, for adapters that have something to do in between; `leave` has to follow."""
        if isinstance(self._executor, InClosure) and self._executor.note_evaluation() and self.last is not None:
            return self._evaluate_again(self.last)
        if (end := self._end_learnt_late()) is not None:
            return end
        updates = self._meter.read_update_()
        self._gate.open()
        position = position or Position(step=self.num_steps, log_step=self.num_steps)
        histogram_is_due = is_due(position.log_step, self._histogram_interval)
        step = self._meter.measure(position, updates, with_histogram=histogram_is_due)
        # What the device compares with. The first step is the host's, since it has to return a record.
        knows_threshold = self._executor.wants_threshold and self.last is not None and self._raised is None
        pending = self._executor.begin_(step, self._judge.skip_threshold() if knows_threshold else None)
        if pending.is_left_to_device and self.last is not None:
            self._pending = pending
            self._watch_update(is_applied=True)
            return self.last
        return self._conclude(pending)

    def leave(self) -> None:
        """Take an optimizer that is not torch's out of a bad step that it is inside of; an exception does it."""
        self._executor.leave()

    def _conclude(self, pending: PendingStep, *, is_repeated: bool = False) -> Record:
        """Judge a measured step, carry out what is decided, and tell."""
        measurement = pending.read()
        judgement = self._judge.judge(measurement, is_repeated=is_repeated)
        if self._raised is not None:
            judgement = self._judge.tell_exception(judgement, self._raised.told_by)
        known = None if self._raised is None else self._raised.culprit
        culprit = known or self._culprit(pending.position, measurement, judgement)
        self._raised = None
        clipped = self._executor.finish_(pending, measurement, judgement.decision)
        if not pending.is_left_to_device:
            self._watch_update(is_applied=not judgement.decision.skip)
        histograms = self._meter.histograms(pending.histogram, pending.present)
        step = DecidedStep(pending.position, measurement, judgement, clipped.coef, clipped.norm, culprit, histograms)
        return self._reporter.report(step, replaces_last=is_repeated)

    def _evaluate_again(self, first: Record) -> Record:
        """A further evaluation inside one step of LBFGS: it counts only if it turns the step bad."""
        pending = self._executor.begin_(self._meter.measure(first.position), None)
        measurement = pending.read()
        if not first.decision.skip and not measurement.is_finite:
            return self._conclude(pending, is_repeated=True)
        self._executor.finish_(pending, measurement, first.decision)
        return first

    def flush(self) -> None:
        """Wait for a step that the device has decided by itself, and record it.

        Raises:
            GradientError: where its action is "raise".
        """
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
        """Continue from a saved state.

        Whatever is damaged, or configured otherwise than in the run that saved it, starts afresh, with a warning.
        """
        state = mended_guard_state(state, self._detectors, self._gate.clipper, self._parameters.layout)
        self._reporter.load_state_dict(state["totals"])
        self._judge.load_state_dict(state["judge"])
        self._meter.load_state_dict(state["updates"])
        self._gate.load_state_dict(state["clipper"])

    def go_on_from(self, other: Guard) -> None:
        """Take over counts, alerts and baselines of the guard of an optimizer that has been replaced."""
        self.load_state_dict(other.state_dict())
        self.alerts.extend(other.alerts)

    def return_to(self, state: dict[str, Any]) -> None:
        """Judge and clip as at a saved state; counts and alerts go on."""
        self._meter.forget()
        self.load_state_dict({**state, "totals": self._reporter.state_dict()})

    def _end_learnt_late(self) -> Record | None:
        """Learn of the step before. If it ends the training, the present one comes too late, and is not applied."""
        was_running = self.stopped_by is None
        self.flush()
        if not was_running or self.stopped_by is None:
            return None
        self._gate.skip_()
        self._meter.forget()
        return self.last

    def _watch_update(self, *, is_applied: bool) -> None:
        """Have the update of this step measured, if someone asks for it."""
        if is_applied:
            self._meter.start_sample_()
        if is_applied and self._judge.needs_update():
            self._meter.start_update_()

    def _culprit(self, position: Position, measurement: Measurement, judgement: Judgement) -> Culprit | None:
        """Who is to blame for what is going to be reported."""
        reported = zip(judgement.verdicts, judgement.decision.alerting, strict=True)
        kinds = [verdict.kind for verdict, alerting in reported if alerting and verdict.kind in INVESTIGATED]
        if self._investigate is None or not kinds:
            return None
        action = judgement.decision.action
        ends_run = action is not None and action >= Action.STOP
        kind = kinds[0] if measurement.is_finite else "nonfinite"
        return self._investigate(position, measurement, kind, ends_run=ends_run)
