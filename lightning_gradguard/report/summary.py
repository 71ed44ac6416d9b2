"""What a run came to: counted step by step, and said in one line or two."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace

from lightning_gradguard.alert import Alert
from lightning_gradguard.record import Decision, Measurement, Totals
from lightning_gradguard.wording import counted


def count(
    totals: Totals, measurement: Measurement, decision: Decision, alerts: Sequence[Alert], *, is_clipped: bool
) -> Totals:
    """The counts after one more step."""
    by_kind = totals.alerts_by_kind
    if alerts:
        by_kind = dict(Counter(by_kind) + Counter(alert.kind for alert in alerts))
    return Totals(
        num_steps=totals.num_steps + 1,
        num_skipped=totals.num_skipped + decision.skip,
        num_overflows=totals.num_overflows + measurement.is_scaler_overflow,
        num_clipped=totals.num_clipped + is_clipped,
        num_alerts=totals.num_alerts + len(alerts),
        num_repeats=totals.num_repeats + decision.alerting.count(False),
        alerts_by_kind=by_kind,
    )


def without_last_step(totals: Totals, *, was_clipped: bool) -> Totals:
    """The counts without the last step, which is going to be decided a second time."""
    return replace(totals, num_steps=totals.num_steps - 1, num_clipped=totals.num_clipped - was_clipped)


def add_alert(totals: Totals, alert: Alert) -> Totals:
    """The counts after one more alert that came with no step."""
    by_kind = {**totals.alerts_by_kind, alert.kind: totals.alerts_by_kind.get(alert.kind, 0) + 1}
    return replace(totals, num_alerts=totals.num_alerts + 1, alerts_by_kind=by_kind)


def summarize(totals: Iterable[Totals], stopped_by: Alert | None, *, is_manual: bool = False) -> str:
    """Counts of all optimizers together, and why the run stopped.

    >>> summarize([Totals(num_steps=1200, num_clipped=7, num_alerts=1, alerts_by_kind={"explosion": 1})], None)
    'GradGuard: 1,200 steps, 7 clipped, 0 skipped; alerts: 1 explosion.'
    """
    each = list(totals)
    by_kind: Counter[str] = Counter()
    for entry in each:
        by_kind.update(entry.alerts_by_kind)
    alerts = ", ".join(f"{count:,} {kind}" for kind, count in by_kind.items()) or "none"
    repeats = sum(entry.num_repeats for entry in each)
    silent = f" ({repeats:,} more while they lasted)" if repeats else ""
    overflows = sum(entry.num_overflows for entry in each)
    calibration = f" ({overflows:,} of them while the GradScaler looked for its scale)" if overflows else ""
    num_steps = sum(entry.num_steps for entry in each)
    counts = (
        f"GradGuard: {counted(num_steps, 'step')}, {sum(entry.num_clipped for entry in each):,} clipped, "
        f"{sum(entry.num_skipped for entry in each):,} skipped{calibration}; alerts: {alerts}{silent}."
    )
    if num_steps == 0:
        hint = " Step with `self.optimizers().step()`; Lightning does not tell of steps on `optimizer.optimizer`."
        return f"GradGuard: no optimizer step was seen.{hint if is_manual else ''}"
    return counts if stopped_by is None else f"{counts}\nTraining was stopped: {stopped_by.message}"
