"""The whole pipeline for one optimizer, without Lightning."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler

from lightning_gradguard.act.buffers import BufferRepair
from lightning_gradguard.act.gate import Gate
from lightning_gradguard.act.pending import PendingStep
from lightning_gradguard.alert import Alert, Culprit
from lightning_gradguard.clippers import Clipped, Clipper
from lightning_gradguard.detectors import Detector, Explosion, NonFinite, Overflow, Vanishing
from lightning_gradguard.errors import GradientError
from lightning_gradguard.judge.judge import Judge, Judgement, state_for
from lightning_gradguard.layout import Bools
from lightning_gradguard.measure.gradients import Gradients
from lightning_gradguard.measure.histogram import HistogramMeter
from lightning_gradguard.measure.measurement import Facts, MicroBatch, measure
from lightning_gradguard.measure.parameters import WatchedParameters
from lightning_gradguard.measure.scaling import LossScaling
from lightning_gradguard.measure.updates import UpdateMeter
from lightning_gradguard.measure.weights import WeightMeter, learning_rate
from lightning_gradguard.policy import Action, ActionName, require_int
from lightning_gradguard.record import Decision, Histograms, Measurement, Position, Record, Totals
from lightning_gradguard.report.alerting import INVESTIGATED, alerts_of
from lightning_gradguard.report.summary import add_alert, count
from lightning_gradguard.settings import Settings
from lightning_gradguard.sinks import ConsoleSink, Sink
from lightning_gradguard.sinks.base import SafeSink

# Backward passes that are remembered between two steps; more than any accumulation window, so only a loop that
# never calls `step` reaches it.
_MAX_MICRO_BATCHES = 4096

Investigate = Callable[[Position, Measurement, str], Culprit | None]
"""Says who is to blame for a finding of some kind; asked while the step's gradients are still there, if they ever are."""


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
        named_buffers: the model's buffers, as `model.named_buffers()` gives them, to repair those that a skipped
            forward pass has made non-finite.
        scaler: what scales the loss in fp16 training. The guard unscales the gradients by it before it looks at them (give
            `optimizer` too), and leaves the calibration of its scale alone.

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
        for detector in settings.detectors:
            if detector.policy.action is Action.ROLLBACK:
                raise ValueError(
                    f"The action of detector `{detector.name}` must be one that a guard alone can take, got 'rollback': "
                    "going back needs a Trainer. Use `GradGuard`, or 'skip' here."
                )
        settings = replace(settings.fresh(), sinks=(*settings.sinks, ConsoleSink()))
        parameters = WatchedParameters(named_parameters, optimizer, settings.only)
        self._set_up(settings, parameters, log_every_n_steps, BufferRepair(named_buffers), scaler)

    @classmethod
    def from_settings(
        cls,
        settings: Settings,
        parameters: WatchedParameters,
        *,
        log_every_n_steps: int,
        buffers: BufferRepair,
        scaler: GradScaler | None = None,
        listener: Callable[[Record], None] | None = None,
        investigate: Investigate | None = None,
    ) -> Guard:
        """A guard with exactly these sinks; for adapters such as `GradGuard`.

        Unlike a sink, `listener` gets every record on every rank, and what it raises is not caught.
        """
        guard = cls.__new__(cls)
        guard._set_up(settings, parameters, log_every_n_steps, buffers, scaler)
        guard._listener = listener
        guard._investigate = investigate
        return guard

    def _set_up(
        self,
        settings: Settings,
        parameters: WatchedParameters,
        log_every_n_steps: int,
        buffers: BufferRepair,
        scaler: GradScaler | None,
    ) -> None:
        require_int("log_every_n_steps", log_every_n_steps, at_least=0, remedy="For no scalars pass 0.")
        optimizer = parameters.optimizer
        self._parameters = parameters
        self._judge = Judge(settings.detectors)
        self._updates = UpdateMeter()
        self._weights = WeightMeter()
        self._scaling = LossScaling(scaler, optimizer) if scaler is not None and optimizer is not None else None
        self._gate = Gate(parameters, settings.clipper, buffers, uses_scaler=self._scaling is not None)
        self._sinks = [SafeSink(sink) for sink in settings.sinks]
        self._investigate: Investigate | None = None
        self._scalar_interval = log_every_n_steps
        self._histogram_interval = settings.histogram_every_n_steps or 0
        self._histogram_meter = HistogramMeter()
        self._pending: deque[MicroBatch] = deque(maxlen=_MAX_MICRO_BATCHES)
        self._pending_step: PendingStep | None = None
        self._has_rivals = False  # other optimizers, whose backward passes are told of as well
        self._listener: Callable[[Record], None] | None = None
        self._notices: list[Alert] = []
        self.totals = Totals()
        """Counts so far."""
        self.alerts: list[Alert] = []
        """Reported findings, oldest first."""
        self.last: Record | None = None
        """The last step."""
        self.stopped_by: Alert | None = None
        """What asked for the end of training; None: nothing has."""

    @property
    def num_steps(self) -> int:
        """Steps so far, one included whose outcome the host has yet to learn."""
        return self.totals.num_steps + (self._pending_step is not None)

    @property
    def is_pending(self) -> bool:
        """Whether the host has yet to learn of the last step."""
        return self._pending_step is not None

    @torch.no_grad()
    def before_backward(self, loss: Tensor | None = None) -> None:
        """Note a backward pass that is about to begin.

        From the second one before a step on, the gradients accumulated so far are measured as well, so that an alert
        can name the pass that did the damage. No sync, rank-local.

        Args:
            loss: what `backward()` is called on, scalar; with a `scaler`, scaled by it.
        """
        scale = self._scaling.scale if self._scaling is not None else None
        sofar = None
        if self._pending or self._has_rivals:
            sofar = self._gradients().local_total_norm()
            sofar = sofar if scale is None else sofar / scale
        if self._pending:
            self._pending[-1] = replace(self._pending[-1], total_norm=sofar)
            sofar = None
        if loss is None or loss.numel() != 1:
            self._pending.append(MicroBatch(norm_before=sofar))
            return
        value = loss.detach() if loss.dim() == 0 else loss.detach().reshape(())
        self._pending.append(MicroBatch(loss=value if scale is None else value / scale, norm_before=sofar))

    @torch.no_grad()
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
        if self._gate.undoable is not None and self._gate.undoable.note_evaluation() and self.last is not None:
            return self._step_again(self.last)
        was_running = self.stopped_by is None
        self.flush()
        if was_running and self.stopped_by is not None and self.last is not None:
            # The host has just learnt that the step before ends the training: this one comes too late.
            self._gate.skip_()
            self._pending.clear()
            return self.last
        updates = self._updates.read_(self._parameters.tensors)
        if self._parameters.refresh():
            updates = None
        self._gate.open()
        position = position or Position(step=self.totals.num_steps, log_step=self.totals.num_steps)
        with_histogram = _is_due(position.log_step, self._histogram_interval)
        gradients, facts = self._measure(position, updates, with_histogram=with_histogram)
        layout = self._parameters.layout
        threshold = self._judge.skip_threshold() if self.last is not None and self._gate.can_defer(gradients) else None
        if self.last is not None and threshold is not None:
            coef = self._gate.defer_(gradients, facts, threshold)
            self._pending_step = PendingStep.start(position, facts, coef, gradients.present, layout)
            self._watch_update(position)
            return self.last
        if (queued := self._gate.queue_clip_(gradients, facts)) is not None:
            pending = PendingStep.start(position, facts, queued, gradients.present, layout)
            record = self._land(pending, gradients, facts)
            self._watch_update(position, record.decision)
            return record
        measurement = facts.read(gradients, layout)
        judgement = self._judge.judge(measurement)
        culprit = self._culprit(position, measurement, judgement)
        clipped = self._apply(gradients, facts, measurement, judgement.decision)
        self._watch_update(position, judgement.decision)
        histograms = self._histograms(facts.histogram, gradients.present)
        return self._finish(position, measurement, judgement, clipped, histograms, culprit=culprit)

    def flush(self) -> None:
        """Wait for a step that the device has decided by itself, and record it.

        Raises:
            GradientError: where its action is "raise".
        """
        pending, self._pending_step = self._pending_step, None
        if pending is not None:
            self._land(pending)

    def close(self) -> None:
        """Let the sinks write out what they hold. The guard can be used on."""
        for sink in self._sinks:
            sink.close()

    def state_dict(self) -> dict[str, Any]:
        """Baselines, streaks and counts in plain types, so that a resumed run decides as one that ran through."""
        self.flush()
        clipper = self._gate.clipper
        return {
            "judge": self._judge.state_dict(),
            "clipper": clipper and {"type": type(clipper).__qualname__, "state": clipper.state_dict()},
            "updates": self._updates.state_dict(self._parameters.tensors),
            "totals": {**vars(self.totals), "alerts_by_kind": dict(self.totals.alerts_by_kind)},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state.

        Whatever is configured otherwise than in the run that saved it starts afresh, with a warning.
        """
        self.totals = Totals(**state["totals"])
        self._judge.load_state_dict(state["judge"])
        self._updates.load_state_dict(state["updates"])
        clipper = self._gate.clipper
        saved = None if clipper is None else state_for(clipper, state["clipper"], "clipper")
        if clipper is not None and saved is not None:
            clipper.load_state_dict(saved)

    def return_to(self, state: dict[str, Any]) -> None:
        """Judge and clip as at a saved state; counts and alerts go on."""
        self._pending.clear()
        self.load_state_dict({**state, "totals": vars(self.totals)})

    def notify(self, alert: Alert) -> None:
        """Report something that is no finding about gradients; before the first step it waits for that."""
        if self.last is None:
            self._notices.append(alert)
            return
        self.totals = add_alert(self.totals, alert)
        self._tell(replace(self.last, alerts=(alert,), totals=self.totals, scalars_due=False, histograms=None))

    def _gradients(self) -> Gradients:
        watched = self._parameters
        others = None
        if watched.excluded:
            others = Gradients(watched.excluded, sharded=watched.is_sharded, names=watched.excluded_layout.names)
        return Gradients(
            watched.tensors,
            sharded=watched.is_sharded,
            is_uniform=watched.is_uniform,
            names=watched.layout.names,
            others=others,
        )

    def _watch_update(self, position: Position, decision: Decision | None = None) -> None:
        """Have the update of this step measured, if it is applied and someone asks; no decision: the device has it."""
        if decision is not None and decision.skip:
            return
        if self._judge.needs_update():
            self._updates.start_(self._parameters.tensors)
        if self._sinks and _is_due(position.log_step + 1, self._scalar_interval):
            self._weights.start_(self._parameters.tensors)

    def _measure(
        self, position: Position, updates: Tensor | None = None, *, with_histogram: bool = False
    ) -> tuple[Gradients, Facts]:
        self._has_rivals = position.num_optimizers > 1
        scale = None
        if self._scaling is not None:
            scale = self._scaling.scale
            self._scaling.unscale_()
        gradients = self._gradients()
        histogram = self._histogram_meter.count(gradients) if with_histogram and gradients.tensors else None
        is_logged = bool(self._sinks) and _is_due(position.log_step, self._scalar_interval)
        weights = self._weights.read_(self._parameters.tensors) if is_logged else None
        self._weights.forget()
        facts = measure(
            gradients,
            self._pending,
            loss_scale=scale,
            histogram=histogram,
            some_are_foreign=self._has_rivals,
            updates=updates,
            weights=weights,
            learning_rate=learning_rate(self._parameters.optimizer) if is_logged else None,
        )
        self._pending.clear()
        return gradients, facts

    def _land(self, pending: PendingStep, gradients: Gradients | None = None, facts: Facts | None = None) -> Record:
        """Judge a step that the device has clipped; skip it where the gradients are still here, else the device did."""
        measurement, clipped = pending.land(gradients)
        judgement = self._judge.judge(measurement)
        culprit = self._culprit(pending.position, measurement, judgement)
        is_here = gradients is not None and facts is not None
        if judgement.decision.skip:
            clipped = Clipped(coef=1.0, norm=measurement.global_norm)
        if judgement.decision.skip and is_here:
            self._gate.skip_()
        elif measurement.overflowed and gradients is not None and facts is not None:
            clipped = self._gate.clip_(gradients, facts, measurement)
        else:
            self._gate.settle(skipped=judgement.decision.skip)
        histograms = self._histograms(pending.histogram, pending.present)
        return self._finish(pending.position, measurement, judgement, clipped, histograms, culprit=culprit)

    def _culprit(self, position: Position, measurement: Measurement, judgement: Judgement) -> Culprit | None:
        """Who is to blame for what is going to be reported."""
        reported = zip(judgement.verdicts, judgement.decision.alerting, strict=True)
        kinds = [verdict.kind for verdict, alerting in reported if alerting and verdict.kind in INVESTIGATED]
        if self._investigate is None or not kinds:
            return None
        return self._investigate(position, measurement, kinds[0] if measurement.is_finite else "nonfinite")

    def _histograms(self, counts: Tensor | None, present: Bools) -> Histograms | None:
        return None if counts is None else self._histogram_meter.read(counts, present, self._parameters.layout)

    def _apply(self, gradients: Gradients, facts: Facts, measurement: Measurement, decision: Decision) -> Clipped:
        if decision.skip:
            self._gate.skip_()
            return Clipped(coef=1.0, norm=measurement.global_norm)
        return self._gate.clip_(gradients, facts, measurement)

    def _step_again(self, first: Record) -> Record:
        """A further evaluation inside one step of LBFGS: it counts only if it turns the step bad."""
        gradients, facts = self._measure(first.position)
        measurement = facts.read(gradients, self._parameters.layout)
        if first.decision.skip:
            self._gate.skip_()
            return first
        if measurement.is_finite:
            self._gate.clip_(gradients, facts, measurement, is_repeated=True)
            return first
        judgement = self._judge.judge(measurement, is_repeated=True)
        culprit = self._culprit(first.position, measurement, judgement)
        clipped = self._apply(gradients, facts, measurement, judgement.decision)
        # The same step is decided a second time, so the first decision is taken out of the counts.
        self.totals = replace(self.totals, num_steps=self.totals.num_steps - 1)
        return self._finish(first.position, measurement, judgement, clipped, None, culprit=culprit)

    def _finish(
        self,
        position: Position,
        measurement: Measurement,
        judgement: Judgement,
        clipped: Clipped,
        histograms: Histograms | None,
        *,
        culprit: Culprit | None,
    ) -> Record:
        """Count, record, and tell."""
        alerts = (*self._notices, *alerts_of(position, judgement.verdicts, judgement.decision, culprit))
        self._notices = []
        self.totals = count(self.totals, measurement, judgement.decision, alerts, is_clipped=clipped.coef < 1.0)
        record = Record(
            position,
            measurement,
            judgement.verdicts,
            judgement.decision,
            clipped.coef,
            clipped.norm,
            judgement.limit,
            alerts,
            self.totals,
            scalars_due=_is_due(position.log_step, self._scalar_interval),
            histograms=histograms,
        )
        self._publish(record)
        return record

    def _publish(self, record: Record) -> None:
        self.last = record
        if self._listener is not None:
            self._listener(record)
        self._tell(record)

    def _tell(self, record: Record) -> None:
        self.alerts.extend(record.alerts)
        strongest = max(record.alerts, key=lambda alert: alert.action, default=None)
        if strongest is not None and strongest.action >= Action.STOP and self.stopped_by is None:
            self.stopped_by = strongest
        try:
            for sink in self._sinks:
                sink.write(record)
        finally:
            # Also where warnings are errors, and the console has just raised one.
            if strongest is not None and strongest.action is Action.RAISE:
                raise GradientError(strongest)


def _is_due(step: int, interval: int) -> bool:
    return interval > 0 and (step + 1) % interval == 0
