"""The line at the end of a run."""

from __future__ import annotations

from raw_loop import records

from lightning_gradguard.record import Totals
from lightning_gradguard.report.summary import summarize


def test_summary_of_several_optimizers_adds_them_up():
    """Steps, clipped, skipped, alerts by kind, and those not shown."""
    one = Totals(num_steps=1000, num_skipped=2, num_clipped=3, num_alerts=2, num_repeats=1, alerts_by_kind={"nonfinite": 2})
    two = Totals(num_steps=500, num_alerts=1, alerts_by_kind={"explosion": 1})
    text = summarize([one, two], None)
    assert text.startswith("GradGuard: 1,500 steps, 3 clipped, 2 skipped")
    assert "alerts: 2 nonfinite, 1 explosion (1 more while they lasted)" in text


def test_summary_without_alerts_says_none():
    """Silence would leave a doubt."""
    assert "alerts: none" in summarize([Totals(num_steps=1)], None)


def test_summary_without_a_step_says_why():
    """Otherwise a guard that never saw one looks like a healthy run."""
    assert "no optimizer step was seen" in summarize([], None)
    assert summarize([Totals()], None) == "GradGuard: no optimizer step was seen."
    assert "self.optimizers().step()" in summarize([Totals()], None, is_manual=True)


def test_summary_of_a_stopped_run_ends_with_the_reason():
    """On a line of its own."""
    (alert,) = records()[3].alerts
    assert summarize([Totals(num_steps=1)], alert).splitlines()[1] == f"Training was stopped: {alert.message}"
