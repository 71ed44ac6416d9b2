"""Tells of decided steps: counts them, makes the record, and hands it to listener, sinks and whoever asks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

import numpy as np

from lightning_gradguard.alert import Alert, Culprit
from lightning_gradguard.errors import GradientError
from lightning_gradguard.judge.judge import Judgement
from lightning_gradguard.layout import Layout
from lightning_gradguard.policy import Action, is_due
from lightning_gradguard.record import Decision, Histograms, Measurement, Position, Record, Totals
from lightning_gradguard.report.alerting import alerts_of
from lightning_gradguard.report.summary import add_alert, count, without_last_step
from lightning_gradguard.sinks import Sink
from lightning_gradguard.sinks.base import SafeSink

MAX_ALERTS = 1000
"""Alerts of an optimizer that are held in memory, the last ones; files hold all of them."""


class DecidedStep(NamedTuple):
    """All that is to be told of a step.

    Attributes:
        position: where in the training.
        measurement: what was measured.
        judgement: what was found, and what is done.
        clip_coef: norm after clipping over norm before.
        clipped_norm: global norm after clipping.
        culprit: who is to blame; None if that is not known, or there is nothing to blame.
        histograms: of the gradients; None on most steps.
    """

    position: Position
    measurement: Measurement
    judgement: Judgement
    clip_coef: float
    clipped_norm: float
    culprit: Culprit | None = None
    histograms: Histograms | None = None


class Archive(Protocol):
    """Writes steps down."""

    def __call__(self, alerts: tuple[Alert, ...], *, is_alone: bool = False) -> tuple[Alert, ...]:
        """Write the step of these alerts down, and give them back with where that is.

        Args:
            alerts: about one step.
            is_alone: whether the other ranks don't take part.
        """


class Reporter:
    """What one optimizer's steps have come to, and who is told.

    Args:
        sinks: where records go. One that fails can't hurt.
        scalar_interval: every how many steps scalars are due, >= 0; 0: never.
        limit: gives the global norm above which the last step would have been an explosion.
        listener: gets every record on every rank, before the sinks; what it raises is not caught.
        archive: writes a step with these alerts down, and gives them back with where that is; must not raise.
        clips_later: whether somebody else clips after the guard, so that the norm after clipping is not known.
        hint: what the remedy of NaN and Inf says besides where no culprit is named.
        is_clipped: whether something clips the gradients.
    """

    def __init__(
        self,
        sinks: Sequence[Sink],
        *,
        scalar_interval: int,
        limit: Callable[[], float],
        listener: Callable[[Record], None] | None = None,
        archive: Archive | None = None,
        clips_later: bool = False,
        hint: str = "",
        is_clipped: bool = True,
    ) -> None:
        self._sinks = [SafeSink(sink) for sink in sinks]
        self._scalar_interval = scalar_interval
        self._limit = limit
        self._listener = listener
        self._archive = archive
        self._clips_later = clips_later
        self._hint = hint
        self._is_clipped = is_clipped
        self._notices: list[Alert] = []
        self._totals = Totals()
        self._noted: DecidedStep | None = None
        self._num_noted = 0
        self._num_noted_clipped = 0
        self.num_steps = 0
        """Steps so far."""
        self._last: Record | None = None
        self.alerts: list[Alert] = []
        """Reported findings, oldest first, at most the last `MAX_ALERTS`."""
        self.stopped_by: Alert | None = None
        """What asked for the end of training; None: nothing has."""

    @property
    def wants_every_step(self) -> bool:
        """Whether somebody looks at the records of steps at which nothing is due and nothing happens."""
        return self._listener is not None or any(sink.wants_every_step for sink in self._sinks)

    def is_due(self, position: Position) -> bool:
        """Whether scalars are due at a step."""
        return is_due(position.log_step, self._scalar_interval)

    @property
    def has_last(self) -> bool:
        """Whether there has been a step."""
        return self._last is not None

    @property
    def totals(self) -> Totals:
        """Counts so far."""
        if self._num_noted:
            counts = self._totals
            self._totals = replace(
                counts,
                num_steps=counts.num_steps + self._num_noted,
                num_clipped=counts.num_clipped + self._num_noted_clipped,
            )
            self._num_noted = self._num_noted_clipped = 0
        return self._totals

    @property
    def last(self) -> Record | None:
        """The last step; its record is made now if it has only been noted."""
        step, self._noted = self._noted, None
        if step is not None:
            self._last = self._record(step._replace(judgement=Judgement(self._limit(), (), Decision())), ())
        return self._last

    def note(self, step: DecidedStep) -> None:
        """Count a step that nobody wants to be told of: it was applied, and nothing was found."""
        self._noted = step
        self._num_noted += 1
        self.num_steps += 1
        self._num_noted_clipped += step.clip_coef < 1.0

    def _with_hint(self, alert: Alert) -> Alert:
        if not self._hint or alert.kind != "nonfinite" or alert.culprit is not None or not alert.remedy:
            return alert
        return replace(alert, remedy=f"{alert.remedy} {self._hint}")

    def report(self, step: DecidedStep, *, replaces_last: bool = False) -> Record:
        """Count a step, and tell.

        Args:
            step: what is told.
            replaces_last: whether it is the last one, decided anew.

        Raises:
            GradientError: where the action is "raise".
        """
        self._noted = None
        if replaces_last:
            coef = None if self._last is None else self._last.clip_coef
            self._totals = without_last_step(self.totals, was_clipped=coef is not None and coef < 1.0)
        judgement = step.judgement
        decision, is_clipped = judgement.decision, self._is_clipped
        found = alerts_of(step.position, judgement.verdicts, decision, step.culprit, is_clipped=is_clipped)
        found = tuple(self._with_hint(alert) for alert in found)
        alerts = (*self._notices, *(found if self._archive is None or not found else self._archive(found)))
        self._notices = []
        self._totals = count(self.totals, step.measurement, judgement.decision, alerts, is_clipped=step.clip_coef < 1.0)
        self.num_steps = self._totals.num_steps
        record = self._last = self._record(step, alerts)
        if self._listener is not None:
            self._listener(record)
        self._tell(record)
        return record

    def _record(self, step: DecidedStep, alerts: tuple[Alert, ...]) -> Record:
        return Record(
            step.position,
            step.measurement,
            step.judgement.verdicts,
            step.judgement.decision,
            None if self._clips_later else step.clip_coef,
            None if self._clips_later else step.clipped_norm,
            step.judgement.limit,
            alerts,
            self.totals,
            scalars_due=self.is_due(step.position),
            histograms=step.histograms,
        )

    def tell_exception(
        self, alert: Alert, position: Position, layout: Layout, *, is_alone: bool = False, is_archived: bool = False
    ) -> Alert:
        """Tell at once of an exception that ends a step before there is anything to measure.

        Args:
            alert: about it.
            position: where in the training.
            layout: of what is measured.
            is_alone: whether the other ranks don't take part.
            is_archived: whether the archive has it.

        Returns:
            The alert, with what the archive adds.
        """
        alert = self._with_hint(alert)
        if self._archive is not None and not is_archived:
            (alert,) = self._archive((alert,), is_alone=is_alone)
        if self.last is None:
            nothing = np.zeros(len(layout.names))
            measurement = Measurement(layout, nothing, nothing.astype(bool), 0.0, num_micro_batches=0)
            self._last = Record(position, measurement, (), Decision(), None, None, math.inf, (), self.totals)
        self.notify(alert)
        return alert

    def notify(self, alert: Alert) -> None:
        """Report something that is no finding about gradients; before the first step it waits for that."""
        if (last := self.last) is None:
            self._notices.append(alert)
            return
        self._totals = add_alert(self.totals, alert)
        notice = replace(last, verdicts=(), decision=Decision(), alerts=(alert,), scalars_due=False, histograms=None)
        self._tell(replace(notice, totals=self.totals))

    def state_dict(self) -> dict[str, Any]:
        """The counts, in plain types."""
        return {**vars(self.totals), "alerts_by_kind": dict(self.totals.alerts_by_kind)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Count on from a saved state."""
        _ = self.last  # which stays
        self._num_noted = self._num_noted_clipped = 0
        self._totals = Totals(**state)
        self.num_steps = self._totals.num_steps

    def close(self) -> None:
        """Let the sinks write out what they hold. They can be used on."""
        for sink in self._sinks:
            sink.close()

    def _tell(self, record: Record) -> None:
        self.alerts.extend(record.alerts)
        del self.alerts[:-MAX_ALERTS]
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
