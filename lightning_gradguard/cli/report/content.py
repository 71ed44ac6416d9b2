"""What a report says of a run, in plain values: from its event files, and from `alerts.jsonl` where there are none."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from lightning_gradguard.files.json_lines import Reader
from lightning_gradguard.tensorboard_plugin.alerts import CONSEQUENCES, Alert, complete, full, headline, seen, short
from lightning_gradguard.tensorboard_plugin.bundles import bundle_of
from lightning_gradguard.tensorboard_plugin.data import Series
from lightning_gradguard.tensorboard_plugin.log_folder import read_runs

MAX_LISTED = 200
"""Alerts in the table; the counts have all."""
MAX_EXPLAINED = 5
"""Alerts that are told at length: those with different causes."""

T = TypeVar("T")

_INCIDENT: dict[str, Any] = dict.fromkeys(("epoch", "batch_idx", "step", "reason", "samples"))


@dataclass(frozen=True, eq=False)
class RunReport:
    """One run.

    Attributes:
        name: of its folder, below the one that was given.
        series: its steps by optimizer; empty where there are no event files of it.
        alerts: all of them, oldest first; `x` is the step on the axis.
        settings: of the guard, in words.
        incidents: the lines of `quarantine.jsonl`.
        folder: where it lies.
    """

    name: str
    series: Mapping[int, Series]
    alerts: Sequence[Alert]
    settings: Mapping[str, str]
    incidents: Sequence[Mapping[str, Any]]
    folder: Path

    @property
    def headline(self) -> Alert | None:
        """The alert to begin with."""
        return headline(self.alerts)

    @property
    def optimizer(self) -> int | None:
        """The optimizer whose pictures are shown: that of the headline, else the first."""
        wanted = None if self.headline is None else self.headline["optimizer"]
        return wanted if wanted in self.series else min(self.series, default=None)

    @property
    def steps(self) -> Steps:
        """What its steps came to."""
        snapshots = [series.snapshot() for series in self.series.values() if len(series.snapshot().steps)]
        clipped = sum(float(it.fact("num_clipped")[-1]) for it in snapshots)
        skipped = sorted({int(step) for it in snapshots for step in it.steps[it.fact("skipped") > 0]})
        return Steps(
            num_logged=sum(len(it.steps) for it in snapshots),
            first=min((int(it.steps[0]) for it in snapshots), default=None),
            last=max((int(it.steps[-1]) for it in snapshots), default=None),
            num_clipped=int(clipped) if math.isfinite(clipped) else None,
            num_skipped=sum(int(it.fact("num_skipped")[-1]) for it in snapshots),
            skipped=skipped,
        )

    @property
    def kinds(self) -> dict[str, int]:
        """Alerts by kind."""
        return dict(Counter(str(alert["kind"]) for alert in self.alerts))

    @property
    def verdict(self) -> str:
        """What the run came to, in a sentence or two; nothing that was not logged."""
        alert = self.headline
        if alert is None:
            seen_up_to = "" if self.steps.last is None else f" up to step {self.steps.last:,}"
            return f"No alerts{seen_up_to}."
        ended = [it for it in self.alerts if it["action"] in ("stop", "raise")]
        counts = ", ".join(f"{count:,} {kind}" for kind, count in self.kinds.items())
        start = f"Training was stopped at step {ended[-1]['x']:,} by {ended[-1]['kind']}" if ended else f"Alerts: {counts}"
        culprit = alert["culprit"]
        cause = str(culprit["message"]) if culprit and culprit.get("message") else seen(alert).rstrip(".")
        where = f" in optimizer {alert['optimizer']}" if len(self.series) > 1 else ""
        return f"{start}. The one to begin with is the {alert['kind']} at step {alert['x']:,}{where}: {cause}."

    @property
    def explained(self) -> list[dict[str, Any]]:
        """The alerts that differ in their cause, the one to begin with first."""
        first = self.headline
        causes = [alert for alert in self.alerts if alert["kind"] not in CONSEQUENCES and alert is not first]
        chosen: dict[tuple[Any, ...], Alert] = {}
        for alert in [first, *causes] if first is not None else []:
            culprit = alert["culprit"] or {}
            chosen.setdefault(
                (alert["kind"], *(culprit.get(key) for key in ("op", "file", "line", "module", "cause"))), alert
            )
        best = list(chosen.values())[:MAX_EXPLAINED]
        return [full(alert, self.alerts) | {"bundle": bundle_of(self.folder, alert)} for alert in best]

    @property
    def listed(self) -> list[dict[str, Any]]:
        """The first alerts, in brief."""
        return [short(alert) for alert in self.alerts[:MAX_LISTED]]

    @property
    def remedies(self) -> list[str]:
        """What to try, the most telling first, each once."""
        texts = [(alert["culprit"] or {}).get("remedy") or alert["remedy"] for alert in self.explained]
        return list(dict.fromkeys(str(text) for text in texts if text))

    def to_dict(self) -> dict[str, Any]:
        """Everything but the curves, for scripts."""
        return {
            "run": self.name,
            "verdict": self.verdict,
            "settings": dict(self.settings),
            "steps": vars(self.steps),
            "alerts_by_kind": self.kinds,
            "alerts": [full(alert, self.alerts) for alert in self.alerts[:MAX_LISTED]],
            "num_alerts": len(self.alerts),
            "quarantined": list(self.incidents),
            "remedies": self.remedies,
        }


@dataclass(frozen=True)
class Steps:
    """What the steps of a run came to, over all optimizers.

    Attributes:
        num_logged: steps in the event files.
        first, last: the ends of the axis; None without event files.
        num_clipped, num_skipped: totals of the run, steps that are not logged included; None where it is not known.
        skipped: which ones were skipped.
    """

    num_logged: int = 0
    first: int | None = None
    last: int | None = None
    num_clipped: int | None = 0
    num_skipped: int = 0
    skipped: list[int] = field(default_factory=list)


def read(log_dir: Path) -> list[RunReport]:
    """The runs in a folder and below it, by name; of an `alerts.jsonl` its run.

    Raises:
        OSError: if a file can't be read.
    """
    if log_dir.is_file():
        log_dir = log_dir.resolve().parent.parent
    runs = {name: (dict(run.series), list(run.alerts.values())) for name, run in read_runs(log_dir)}
    for path in log_dir.rglob("gradguard/alerts.jsonl"):
        runs.setdefault(path.parent.parent.relative_to(log_dir).as_posix(), ({}, []))
    return [_run(log_dir, name, *runs[name]) for name in sorted(runs)]


def _run(log_dir: Path, name: str, series: Mapping[int, Series], alerts: Sequence[Alert]) -> RunReport:
    folder = log_dir / name
    known = {(alert["time"], alert["kind"]) for alert in alerts}
    written = [
        {**alert, "x": alert["step"], "id": f"line-{number}"}
        for number, alert in enumerate(_lines(folder / "gradguard" / "alerts.jsonl", complete), 1)
        if (alert["time"], alert["kind"]) not in known
    ]
    settings = next((each.settings for each in series.values() if each.settings), {})
    everything = sorted([*alerts, *written], key=lambda alert: alert["time"])
    incidents = list(_lines(folder / "gradguard" / "quarantine.jsonl", _INCIDENT.__or__))
    return RunReport(name, series, everything, settings, incidents, folder)


def _lines(path: Path, parse: Callable[[dict[str, Any]], T]) -> Iterator[T]:
    """The whole lines of a file of JSON; a run that is being written, or was killed, may have left half of one."""
    if path.is_file():
        yield from Reader(path, parse).read()
