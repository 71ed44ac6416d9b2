"""What a run came to, in one line or two."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from lightning_gradguard.record import Alert, Totals


def summarize(totals: Iterable[Totals], stopped_by: Alert | None) -> str:
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
    silent = f" ({repeats:,} more inside their cooldown)" if repeats else ""
    num_steps = sum(entry.num_steps for entry in each)
    counts = (
        f"GradGuard: {num_steps:,} steps, {sum(entry.num_clipped for entry in each):,} clipped, "
        f"{sum(entry.num_skipped for entry in each):,} skipped; alerts: {alerts}{silent}."
    )
    if num_steps == 0:
        return (
            "GradGuard: no optimizer step was seen. In manual optimization step with `self.optimizers().step()`; Lightning "
            "does not tell of steps on `optimizer.optimizer`."
        )
    return counts if stopped_by is None else f"{counts}\nTraining was stopped: {stopped_by.message}"
