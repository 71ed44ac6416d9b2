"""Many runs at once: one row each, and the curves of some of them in one plot."""

from __future__ import annotations

import math
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import numpy as np
from tensorboard.data.provider import DataProvider

from lightning_gradguard.layout import Floats, Ints
from lightning_gradguard.tensorboard_plugin import views
from lightning_gradguard.tensorboard_plugin.alerts import Alert, done, found, headline, read_alert
from lightning_gradguard.tensorboard_plugin.data import Source, is_current, padded_facts
from lightning_gradguard.tensorboard_plugin.wire import FACTS, PLUGIN_NAME, Tag

MAX_CURVES = 50
MAX_POINTS = 400
"""Of each curve."""
_TAGS_PER_READ = 64
_LIVE_SECONDS = 60.0
"""Of a run that has written something in this time it is said how long ago."""
_COLUMN = {name: index for index, name in enumerate(FACTS)}


class Digest:
    """What is known of a run at a glance: its alerts, and the facts of its steps, as far as they have been read."""

    def __init__(self) -> None:
        self._facts: dict[Tag, tuple[Ints, Floats]] = {}
        self._alerts: dict[Tag, list[Alert]] = {}
        self._written: dict[Tag, float] = {}
        self.last_step: int | None = None
        self.last_time = 0.0

    def pending(self, tags: Mapping[Tag, float], *, is_whole: bool) -> list[Tag]:
        """What has changed: of the alerts, and of the last facts or of all."""
        if not self._written.keys() <= tags.keys():
            self.__init__()  # type: ignore[misc]  # another run has taken this one's place
        facts = [tag for tag in tags if tag.series == "facts"]
        if not is_whole:
            facts = [max(group) for _, group in groupby(sorted(facts, key=_by_optimizer), key=lambda tag: tag.optimizer)]
        wanted = [*facts, *(tag for tag in tags if tag.series == "alerts")]
        self.last_time = max(tags.values(), default=0.0)
        return [tag for tag in wanted if self._written.get(tag) != tags[tag]]

    def take(self, source: Source, tags: Sequence[Tag], written: Mapping[Tag, float]) -> None:
        """Read some tags; each has at most ten events, so all of them are read again."""
        read = source.read([str(tag) for tag in tags])
        for tag in tags:
            events = read.get(str(tag), ())
            if tag.series == "alerts":
                parsed = [(event.step, read_alert(text)) for event in events for text in np.ravel(event.numpy)]
                self._alerts[tag] = [{**alert, "x": step} for step, alert in parsed if alert is not None]
            else:
                rows = [(event.step, facts) for event in events if (facts := padded_facts(event.numpy)) is not None]
                steps = np.array([step for step, _ in rows], dtype=np.int64)
                self._facts[tag] = steps, np.array([facts for _, facts in rows]).reshape(-1, len(FACTS))
            self._written[tag] = written[tag]

    @property
    def alerts(self) -> list[Alert]:
        """Oldest first."""
        return sorted((alert for alerts in self._alerts.values() for alert in alerts), key=lambda alert: alert["time"])

    def steps(self, optimizer: int) -> tuple[Ints, Floats]:
        """The steps of one optimizer without those that a resumed run has taken again, and their facts."""
        tags = sorted(tag for tag in self._facts if tag.optimizer == optimizer and len(self._facts[tag][0]))
        if not tags:
            return np.zeros(0, dtype=np.int64), np.zeros((0, len(FACTS)))
        names = sorted({tag.session for tag in tags})
        firsts = [int(self._facts[next(tag for tag in tags if tag.session == name)][0][0]) for name in names]
        sessions = np.concatenate([np.full(len(self._facts[tag][0]), names.index(tag.session)) for tag in tags])
        steps = np.concatenate([self._facts[tag][0] for tag in tags])
        keep = is_current(sessions, steps, firsts)
        return steps[keep], np.concatenate([self._facts[tag][1] for tag in tags])[keep]

    @property
    def optimizers(self) -> list[int]:
        """Those that have stepped."""
        return sorted({tag.optimizer for tag in self._facts})

    def row(self, name: str) -> dict[str, Any]:
        """What the table shows."""
        alerts = self.alerts
        first = headline(alerts)
        last = [(steps[-1], facts[-1]) for steps, facts in map(self.steps, self.optimizers) if len(steps)]
        end = max((int(step) for step, _ in last), default=None)
        return {
            "name": name,
            **_state(alerts, end, time.time() - self.last_time),
            "last_time": self.last_time,
            "last_step": end,
            "norms": views.plain(np.array([facts[_COLUMN["global_norm"]] for _, facts in last])),
            "loss": views.plain(np.array([facts[_COLUMN["loss"]] for _, facts in last[-1:]])),
            "num_skipped": sum(int(facts[_COLUMN["num_skipped"]]) for _, facts in last),
            "num_clipped": _total([facts[_COLUMN["num_clipped"]] for _, facts in last]),
            "kinds": dict(Counter(str(alert["kind"]) for alert in alerts)),
            "first_alert": min((alert["x"] for alert in alerts), default=None),
            "culprit": None if first is None else brief(first),
        }

    def curves(self, name: str) -> dict[str, Any]:
        """What is drawn of it: of its first optimizer."""
        steps, facts = self.steps(min(self.optimizers, default=0))
        norm = facts[:, _COLUMN["global_norm"]]
        chosen = views.extremes([norm], np.zeros(len(steps), dtype=np.bool_), MAX_POINTS)
        curves = {key: views.plain(facts[chosen, _COLUMN[key]]) for key in ("global_norm", "explosion_limit", "loss")}
        return {"name": name, "steps": steps[chosen].tolist(), **curves}


class Overview:
    """The runs of an experiment, read for a moment at each request.

    Args:
        provider: TensorBoard's.
        context: of the request.
        experiment: its id.
        digests: what is known of each run; kept between requests.
        lock: taken while they change.
    """

    def __init__(
        self, provider: DataProvider, context: Any, experiment: str, digests: dict[str, Digest], lock: threading.Lock
    ) -> None:
        self._provider = provider
        self._context = context
        self._experiment = experiment
        self._digests = digests
        self._lock = lock

    def table(self, seconds: float) -> dict[str, Any]:
        """A row for each run, and how much of them has been read."""
        with self._lock:
            listed = self._listed()
            progress = self._sync(listed, seconds, is_whole=False)
            return {"runs": [self._digests[name].row(name) for name in sorted(listed)], "progress": progress}

    def curves(self, names: Sequence[str], seconds: float) -> dict[str, Any]:
        """The curves of some runs, as far as they have been read."""
        with self._lock:
            everything = self._listed()
            listed = {name: everything[name] for name in names[:MAX_CURVES] if name in everything}
            progress = self._sync(listed, seconds, is_whole=True)
            return {"runs": [self._digests[name].curves(name) for name in listed], "progress": progress}

    def _listed(self) -> dict[str, dict[Tag, float]]:
        listed = self._provider.list_tensors(self._context, experiment_id=self._experiment, plugin_name=PLUGIN_NAME)
        tags = {
            name: {tag: about.max_wall_time for text, about in series.items() if (tag := Tag.parse(text)) is not None}
            for name, series in listed.items()
        }
        return {name: found for name, found in tags.items() if found}

    def _sync(self, listed: Mapping[str, Mapping[Tag, float]], seconds: float, *, is_whole: bool) -> float:
        deadline = time.monotonic() + seconds
        waiting = {
            name: self._digests.setdefault(name, Digest()).pending(tags, is_whole=is_whole) for name, tags in listed.items()
        }
        expected = left = sum(map(len, waiting.values()))
        for name, pending in waiting.items():
            source = Source(self._provider, self._context, self._experiment, name)
            for begin in range(0, len(pending), _TAGS_PER_READ):
                if time.monotonic() > deadline:
                    return round(min(1 - left / expected, 0.99), 3)
                part = pending[begin : begin + _TAGS_PER_READ]
                self._digests[name].take(source, part, listed[name])
                left -= len(part)
        return 1.0


def brief(alert: Alert) -> str:
    """An alert in a few words: the cause, or what was found where."""
    culprit = alert["culprit"]
    if culprit is None:
        names = [parameter["name"] for parameter in alert["parameters"]]
        return f"{alert['kind']}{f' in {names[0]}' if names else ''}"
    where = culprit.get("module") or ("the batch" if culprit["phase"] == "data" else "training_step")
    what = culprit.get("cause") or culprit.get("op") or culprit["phase"]
    return f"{what} in {where}"


def _state(alerts: Sequence[Alert], last_step: int | None, age: float) -> dict[str, Any]:
    ended = [alert for alert in alerts if alert["action"] in ("stop", "raise")]
    if ended and last_step is not None and last_step <= ended[-1]["x"] + 1:
        return {"state": f"stopped by {ended[-1]['kind']}", "why": f"{found(ended[-1])} {done(ended[-1])}", "is_live": False}
    if age < _LIVE_SECONDS:
        return {"state": f"wrote {max(age, 0):.0f} s ago", "why": "The run may have ended since.", "is_live": True}
    return {"state": "no news", "why": "It has ended, or nothing has been due since.", "is_live": False}


def _total(counts: Sequence[float]) -> int | None:
    """Their sum; None where one of them is not known."""
    total = sum(counts)
    return int(total) if math.isfinite(total) else None


def _by_optimizer(tag: Tag) -> tuple[int, Tag]:
    return tag.optimizer, tag
