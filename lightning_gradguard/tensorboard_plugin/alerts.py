"""Alerts as the tab and the report show them: the one to begin with, its cause, and what happened around it."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lightning_gradguard.tensorboard_plugin.source import frames

Alert = Mapping[str, Any]

ALERTS_PER_PAGE = 100
_MAX_NAMED = 50

CONSEQUENCES = ("rollback", "snapshot", "checkpoint")
"""Kinds that report what was done, not what was wrong."""

_STRENGTH = {"raise": 3, "stop": 3, "rollback": 2, "skip": 2, "warn": 1, "log": 0}

_DEFAULTS: dict[str, Any] = {
    "time": 0.0,
    "step": 0,
    "epoch": None,
    "batch_idx": None,
    "micro_batch": 0,
    "optimizer": 0,
    "rank": 0,
    "kind": "",
    "action": "",
    "value": "NaN",
    "limit": "NaN",
    "parameters": (),
    "culprit": None,
    "message": "",
    "remedy": "",
}


_CULPRIT: dict[str, Any] = {
    **dict.fromkeys(("phase", "module", "op", "message", "remedy", "cause"), ""),
    **dict.fromkeys(("inputs", "before", "factors", "frames"), ()),
    **dict.fromkeys(("file", "line", "source", "samples", "probable_samples", "error")),
    "rank": 0,
    "reproduced": False,
}
_PARAMETER: dict[str, Any] = {"name": "", "norm": "NaN", "num_nan": 0, "num_inf": 0}


def read_alert(text: str | bytes) -> dict[str, Any] | None:
    """An alert from its JSON; None if it is none."""
    try:
        found = json.loads(text)
        return complete(found) if isinstance(found, dict) else None
    except (ValueError, RecursionError):
        return None


def complete(found: Mapping[str, Any]) -> dict[str, Any]:
    """An alert with what another version of the package may have left out; what is there is of the right kind then.

    Raises:
        ValueError: if it lacks a number where one is needed.
    """
    alert = {key: found.get(key, default) for key, default in _DEFAULTS.items()} | dict(found)
    numbers = ("time", "step", "optimizer", "rank", "micro_batch")
    if not all(isinstance(alert[key], (int, float)) for key in numbers):
        raise ValueError("a number is none")
    given = alert["parameters"] if isinstance(alert["parameters"], (list, tuple)) else ()
    alert["parameters"] = [_PARAMETER | it for it in given if isinstance(it, dict)]
    alert["culprit"] = _culprit(alert["culprit"])
    return alert


def _culprit(given: Any) -> dict[str, Any] | None:
    if not isinstance(given, dict):
        return None
    texts = {key for key, default in _CULPRIT.items() if default == ""}
    lists = {"inputs", "before", "factors", "frames", "samples", "probable_samples"}
    fitting = {
        key: value
        for key, value in given.items()
        if (key not in texts or isinstance(value, str)) and (key not in lists or isinstance(value, (list, tuple)))
    }
    return _CULPRIT | fitting


def headline(alerts: Sequence[Alert]) -> Alert | None:
    """The alert to begin with: of the gravest that were not a consequence, the first whose cause is known best.

    >>> nan, back = {"kind": "nonfinite", "action": "rollback"}, {"kind": "rollback", "action": "rollback"}
    >>> headline([{**_DEFAULTS, **nan}, {**_DEFAULTS, **back}])["kind"]
    'nonfinite'
    """
    causes = [alert for alert in alerts if alert["kind"] not in CONSEQUENCES] or list(alerts)

    def weight(alert: Alert) -> tuple[int, bool, int]:
        culprit = alert["culprit"] or {}
        known = 0 if not culprit else 2 if culprit.get("line") else 1
        return _STRENGTH.get(alert["action"], 0), alert["kind"] == "nonfinite", known

    return max(causes, key=weight, default=None)  # the first of several


def alerts_page(alerts: Sequence[Alert], kind: str | None, offset: int) -> dict[str, Any]:
    """A page of alerts, newest first, and how many there are of each kind."""
    chosen = [alert for alert in reversed(alerts) if kind is None or alert["kind"] == kind]
    page = chosen[max(offset, 0) : max(offset, 0) + ALERTS_PER_PAGE]
    return {
        "kinds": Counter(alert["kind"] for alert in alerts),
        "total": len(chosen),
        "offset": max(offset, 0),
        "page_size": ALERTS_PER_PAGE,
        "alerts": [short(alert) for alert in page],
    }


def short(alert: Alert) -> dict[str, Any]:
    """What a line of the table shows."""
    names = [parameter["name"] for parameter in alert["parameters"]]
    keys = ("id", "x", "step", "epoch", "batch_idx", "optimizer", "kind", "action", "time", "value", "limit", "message")
    culprit = alert["culprit"]
    brief = culprit and {key: culprit.get(key) for key in ("phase", "cause", "module", "op", "file", "line", "message")}
    return {key: alert[key] for key in keys} | {
        "where": names[0] if names else None,
        "culprit": brief,
        "found": found(alert),
        "seen": seen(alert),
        "done": done(alert),
    }


def full(alert: Alert, alerts: Sequence[Alert]) -> dict[str, Any]:
    """Everything about one alert, with the ones before and after it."""
    ids = [other["id"] for other in alerts]
    place = ids.index(alert["id"])
    culprit = alert["culprit"]
    if culprit is not None:
        culprit = {**culprit, "table": table(culprit.get("factors") or ()), "frames": frames(culprit)}
    reason = reason_of_rollback(alert, alerts)
    return {
        **short(alert),
        **alert,
        "reason": reason and short(reason),
        "parameters": alert["parameters"][:_MAX_NAMED],
        "num_parameters": len(alert["parameters"]),
        "culprit": culprit,
        "number": place + 1,
        "before": ids[place - 1] if place else None,
        "after": ids[place + 1] if place + 1 < len(ids) else None,
    }


def found(alert: Alert) -> str:
    """The message without its first words, which say where: the step is counted otherwise there than on the x axis.

    >>> found({**_DEFAULTS, "kind": "explosion", "step": 3, "message": "Explosion at step 3 (epoch 0): it is large."})
    'it is large.'
    """
    message = str(alert["message"])
    start, _, rest = message.partition(": ")
    return rest if rest and start.startswith(f"{str(alert['kind']).capitalize()} at step ") else message


def seen(alert: Alert) -> str:
    """What was seen, as a sentence without the cause, where that is known and stands beside it."""
    text = found(alert)
    if (alert["culprit"] or {}).get("message"):
        text = re.split(r"; (?:culprit|cause): ", text, maxsplit=1)[0].rstrip(".") + "."
    return text[:1].upper() + text[1:]


def done(alert: Alert) -> str:
    """What was done, in words."""
    if alert["kind"] == "rollback":
        return _way_back(alert)
    if alert["kind"] in CONSEQUENCES:
        return "reported"
    return {
        "log": "written down only",
        "warn": "warned of, the step was applied",
        "skip": "the step was skipped",
        "rollback": "the step was skipped and training went back",
        "stop": "the step was skipped and the run stopped",
        "raise": "the step was skipped and the run ended with an error",
    }.get(alert["action"], str(alert["action"]))


def _way_back(alert: Alert) -> str:
    """From which step to which a rollback went: its value counts the steps that were taken back, its own included."""
    value, last = alert["value"], alert.get("x", alert["step"])
    if not isinstance(value, (int, float)) or value < 1:
        return "training went back"
    good = int(last - value)
    return f"from step {last:,} back to the state " + (f"after step {good:,}" if good >= 0 else "before the first step")


def reason_of_rollback(alert: Alert, alerts: Iterable[Alert]) -> Alert | None:
    """The finding that a rollback answers: the last one of its step, or of the steps just before."""
    asked = [
        other
        for other in alerts
        if other["action"] == "rollback" and other["kind"] not in CONSEQUENCES and other["time"] <= alert["time"]
    ]
    return asked[-1] if asked and alert["kind"] == "rollback" else None


def table(lines: Sequence[str]) -> list[list[str]]:
    """The cells of a Markdown table, its first row the titles.

    >>> table(["| a | b |", "|---|---|", "| `x` | 1 |"])
    [['a', 'b'], ['`x`', '1']]
    """
    rows = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in lines if line.strip()]
    return [row for row in rows if not all(set(cell) <= set("-: ") and cell for cell in row)]
