"""The whole pipeline for one optimizer, without Lightning."""

from __future__ import annotations

import math
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler

from lightning_gradguard.alerting import alerts_of
from lightning_gradguard.buffers import BufferRepair
from lightning_gradguard.clippers import Clipped, Clipper
from lightning_gradguard.closure import UndoableStep
from lightning_gradguard.decision import Streak, decide
from lightning_gradguard.detectors import Detector, Explosion, NonFinite, Overflow, Vanishing
from lightning_gradguard.errors import GradientError, GuardWarning
from lightning_gradguard.gate import skip_
from lightning_gradguard.histogram import HistogramMeter
from lightning_gradguard.measurement import Facts, Gradients, MicroBatch, measure
from lightning_gradguard.parameters import WatchedParameters
from lightning_gradguard.policy import Action, ActionName, require_int
from lightning_gradguard.record import Alert, Decision, Histograms, Measurement, Position, Record, Totals, Verdict
from lightning_gradguard.scaling import LossScaling
from lightning_gradguard.settings import Settings
from lightning_gradguard.sinks import ConsoleSink, Sink
from lightning_gradguard.sinks.base import SafeSink

# Backward passes that are remembered between two steps; more than any accumulation window, so only a loop that
# never calls `step` reaches it.
_MAX_MICRO_BATCHES = 4096


class Guard:
    """Watches the gradients of one optimizer: measures, judges, decides, clips or skips, and records.

    Call `step()` between `backward()` and `optimizer.step()`. Where several backward passes make one step, or to have
    the loss looked at too, call `before_backward(loss)` before each of them.

    Args:
        named_parameters: the model's parameters, as `model.named_parameters()` gives them.
        optimizer: whose parameters are watched; None: all of `named_parameters`.
        clip: largest norm, or a clipper; None: no clipping.
        nonfinite, explosion, vanishing, overflow: an action's name, a configured detector, or None for off.
        detectors: your own, beside these.
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
        clip: float | Clipper | None = None,
        nonfinite: ActionName | Action | NonFinite | None = "skip",
        explosion: ActionName | Action | Explosion | None = "warn",
        vanishing: ActionName | Action | Vanishing | None = "warn",
        overflow: ActionName | Action | Overflow | None = "warn",
        detectors: Sequence[Detector] = (),
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
            sinks=sinks,
            histogram_every_n_steps=histogram_every_n_steps,
        )
        settings = replace(settings, sinks=(ConsoleSink(), *settings.sinks))
        parameters = WatchedParameters(named_parameters, optimizer)
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
    ) -> Guard:
        """A guard with exactly these sinks; for adapters such as `GradGuard`."""
        guard = cls.__new__(cls)
        guard._set_up(settings, parameters, log_every_n_steps, buffers, scaler)
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
        self._parameters = parameters
        self._clipper = settings.clipper
        self._detectors = settings.detectors
        self._sinks = [SafeSink(sink) for sink in settings.sinks]
        self._scalar_interval = log_every_n_steps
        self._histogram_interval = settings.histogram_every_n_steps or 0
        self._histogram_meter = HistogramMeter()
        self._buffers = buffers
        self._scaling = None if scaler is None or parameters.optimizer is None else LossScaling(scaler, parameters.optimizer)
        self._undoable = (
            UndoableStep(parameters.optimizer, parameters.tensors)
            if isinstance(parameters.optimizer, torch.optim.LBFGS)
            else None
        )
        self._streaks = tuple(Streak() for _ in self._detectors)
        self._pending: deque[MicroBatch] = deque(maxlen=_MAX_MICRO_BATCHES)
        self.totals = Totals()
        """Counts so far."""
        self.alerts: list[Alert] = []
        """Reported findings, oldest first."""
        self.last: Record | None = None
        """The last step."""
        self.stopped_by: Alert | None = None
        """What asked for the end of training; None: nothing has."""

    @torch.no_grad()
    def before_backward(self, loss: Tensor | None = None) -> None:
        """Note a backward pass that is about to begin.

        From the second one before a step on, the gradients accumulated so far are measured as well, so that an alert
        can name the pass that did the damage. No sync, rank-local.

        Args:
            loss: what `backward()` is called on, scalar; with a `scaler`, scaled by it.
        """
        scale = self._scaling.scale if self._scaling is not None else None
        if self._pending:
            sofar = Gradients(self._parameters.tensors, sharded=self._parameters.is_sharded).local_total_norm()
            self._pending[-1] = replace(self._pending[-1], total_norm=sofar if scale is None else sofar / scale)
        if loss is None or loss.numel() != 1:
            self._pending.append(MicroBatch())
            return
        value = loss.detach().reshape(())
        self._pending.append(MicroBatch(loss=value if scale is None else value / scale))

    def forget_backward(self) -> None:
        """Forget the backward passes noted since the last step: they were for another optimizer."""
        self._pending.clear()

    @torch.no_grad()
    def step(self, position: Position | None = None) -> Record:
        """Inspect the gradients, then clip them, or take them away so that the optimizer passes this step over.

        In place; one sync, more on an incident. At most one collective, more on an incident with sharded gradients.

        Args:
            position: where in the training this is; None counts from 0.

        Raises:
            GradientError: where the action is "raise"; the gradients are gone by then.
        """
        if self._undoable is not None and self._undoable.note_evaluation() and self.last is not None:
            return self._step_again(self.last)
        self._parameters.refresh()
        position = position or Position(step=self.totals.num_steps, log_step=self.totals.num_steps)
        layout = self._parameters.layout
        gradients, facts = self._measure(with_histogram=_is_due(position.log_step, self._histogram_interval))
        measurement = facts.read(gradients, layout)
        histograms = None
        if facts.histogram is not None:
            histograms = self._histogram_meter.read(facts.histogram, gradients, layout)
        return self._process(position, gradients, facts.total_norm, measurement, histograms)

    def close(self) -> None:
        """Let the sinks write out what they hold. The guard can be used on."""
        for sink in self._sinks:
            sink.close()

    def state_dict(self) -> dict[str, Any]:
        """Baselines, streaks and counts in plain types, so that a resumed run decides as one that ran through."""
        return {
            "detectors": {
                detector.name: {
                    "type": type(detector).__qualname__,
                    "state": detector.state_dict(),
                    "streak": [streak.hits, streak.alerted_at, streak.alerted_action and streak.alerted_action.value],
                }
                for detector, streak in zip(self._detectors, self._streaks, strict=True)
            },
            "clipper": self._clipper and {"type": type(self._clipper).__qualname__, "state": self._clipper.state_dict()},
            "totals": {**vars(self.totals), "alerts_by_kind": dict(self.totals.alerts_by_kind)},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state.

        Whatever is configured otherwise than in the run that saved it starts afresh, with a warning.
        """
        self.totals = Totals(**state["totals"])
        streaks = []
        for detector in self._detectors:
            saved = state["detectors"].get(detector.name)
            if _fits(detector, saved, f"detector `{detector.name}`"):
                detector.load_state_dict(saved["state"])
                hits, alerted_at, action = saved["streak"]
                streaks.append(Streak(hits, alerted_at, action and Action(action)))
            else:
                streaks.append(Streak())
        self._streaks = tuple(streaks)
        if self._clipper is not None and _fits(self._clipper, state["clipper"], "clipper"):
            self._clipper.load_state_dict(state["clipper"]["state"])

    def _measure(self, *, with_histogram: bool = False) -> tuple[Gradients, Facts]:
        scale = None
        if self._scaling is not None:
            scale = self._scaling.scale
            self._scaling.unscale_()
        gradients = Gradients(self._parameters.tensors, sharded=self._parameters.is_sharded)
        histogram = self._histogram_meter.count(gradients) if with_histogram and gradients.tensors else None
        facts = measure(gradients, self._pending, loss_scale=scale, histogram=histogram)
        self._pending.clear()
        return gradients, facts

    def _process(
        self,
        position: Position,
        gradients: Gradients,
        total_norm: Tensor,
        measurement: Measurement,
        histograms: Histograms | None,
    ) -> Record:
        """Judge, decide, apply and record."""
        explosion_limit = min((detector.limit() for detector in self._detectors), default=math.inf)
        found = [detector.observe(measurement) for detector in self._detectors]
        decision, self._streaks = decide(
            self.totals.num_steps,
            [detector.policy for detector in self._detectors],
            self._streaks,
            found,
            must_skip=measurement.is_scaler_overflow,
        )
        clipped = self._apply(gradients, total_norm, measurement, decision)
        self._learn(measurement, found, decision)
        verdicts = tuple(verdict for verdict in found if verdict is not None)
        alerts = alerts_of(position, verdicts, decision)
        self._count(measurement, decision, clipped, alerts)
        record = Record(
            position,
            measurement,
            verdicts,
            decision,
            clipped.coef,
            clipped.norm,
            explosion_limit,
            alerts,
            self.totals,
            scalars_due=_is_due(position.log_step, self._scalar_interval),
            histograms=histograms,
        )
        self._publish(record)
        return record

    def _step_again(self, first: Record) -> Record:
        """A further evaluation inside one step of LBFGS: it counts only if it turns the step bad."""
        gradients, facts = self._measure()
        measurement = facts.read(gradients, self._parameters.layout)
        if first.decision.skip:
            skip_(self._parameters.tensors)
            return first
        if measurement.is_finite:
            self._clip_(gradients, facts.total_norm, measurement)
            return first
        # The same step is decided a second time, so the first decision is taken out of the counts.
        self.totals = replace(self.totals, num_steps=self.totals.num_steps - 1)
        return self._process(first.position, gradients, facts.total_norm, measurement, None)

    def _apply(self, gradients: Gradients, total_norm: Tensor, measurement: Measurement, decision: Decision) -> Clipped:
        if decision.skip:
            skip_(self._parameters.tensors)
            self._buffers.repair_()
            if self._undoable is not None:
                self._undoable.undo_()
        self._buffers.remember()
        if decision.skip:
            return Clipped(coef=1.0, norm=measurement.global_norm)
        return self._clip_(gradients, total_norm, measurement)

    def _clip_(self, gradients: Gradients, total_norm: Tensor, measurement: Measurement) -> Clipped:
        if self._clipper is None or not gradients.tensors:
            return Clipped(coef=1.0, norm=measurement.global_norm)
        if measurement.overflowed:
            total_norm = torch.tensor(measurement.global_norm, dtype=torch.float64)
        return self._clipper.clip_(gradients, total_norm)

    def _learn(self, measurement: Measurement, found: Sequence[Verdict | None], decision: Decision) -> None:
        if decision.skip or not measurement.is_finite:
            return
        for detector, verdict in zip(self._detectors, found, strict=True):
            if verdict is None:
                detector.learn(measurement)

    def _count(self, measurement: Measurement, decision: Decision, clipped: Clipped, alerts: tuple[Alert, ...]) -> None:
        totals = self.totals
        by_kind = Counter(totals.alerts_by_kind)
        by_kind.update(alert.kind for alert in alerts)
        self.totals = Totals(
            num_steps=totals.num_steps + 1,
            num_skipped=totals.num_skipped + decision.skip,
            num_overflows=totals.num_overflows + measurement.is_scaler_overflow,
            num_clipped=totals.num_clipped + (clipped.coef < 1.0),
            num_alerts=totals.num_alerts + len(alerts),
            num_repeats=totals.num_repeats + decision.alerting.count(False),
            alerts_by_kind=dict(by_kind),
        )

    def _publish(self, record: Record) -> None:
        self.last = record
        self.alerts.extend(record.alerts)
        strongest = max(record.alerts, key=lambda alert: alert.action, default=None)
        if strongest is not None and strongest.action >= Action.STOP and self.stopped_by is None:
            self.stopped_by = strongest
        for sink in self._sinks:
            sink.write(record)
        if strongest is not None and strongest.action is Action.RAISE:
            raise GradientError(strongest)


def _is_due(step: int, interval: int) -> bool:
    return interval > 0 and (step + 1) % interval == 0


def _fits(part: Detector | Clipper, saved: dict[str, Any] | None, name: str) -> bool:
    if saved is not None and saved["type"] == type(part).__qualname__:
        return True
    before = "nothing" if saved is None else saved["type"]
    warnings.warn(
        f"The checkpoint holds {before} for the {name}, which is {type(part).__qualname__} now. It starts without history; "
        "the rest of the guard's state is restored.",
        GuardWarning,
        stacklevel=3,
    )
    return False
