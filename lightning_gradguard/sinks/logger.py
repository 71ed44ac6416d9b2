"""Scalars and alerts in any logger of Lightning's, through its own interface."""

from __future__ import annotations

import json
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from lightning_gradguard.alert import Alert
from lightning_gradguard.layout import Floats
from lightning_gradguard.policy import Action
from lightning_gradguard.record import Record
from lightning_gradguard.sinks.tags import LoggedNorms, scalars, tag_prefix

_MAX_ALERTS = 1000
"""Each is sent with every new one, so they can't be without end."""


_SECONDS_BETWEEN_ALERTS = 60
"""Of one title, in W&B."""


class MetricsLogger(Protocol):
    """The part of Lightning's `Logger` that is used; `lightning` and `pytorch_lightning` have distinct classes for it."""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Take the metrics of one step."""


class LoggerSink:
    """Passes the scalars of due steps, and of steps with an alert, to a logger.

    An alert is one more scalar, `alerts/<kind>`: how many there are at that step. Loggers that take more get more: see
    `WandbSink` and `MlflowSink`.

    Args:
        logger: CSVLogger, or your own.
        norms: of what norms are logged: "totals", "groups" or "all".
    """

    wants_every_step = False

    def __init__(self, logger: MetricsLogger, *, norms: LoggedNorms = "groups") -> None:
        self._logger = logger
        self._norms: LoggedNorms = norms

    def write(self, record: Record) -> None:
        """Pass the scalars on."""
        if record.scalars_due or record.alerts:
            prefix = tag_prefix(record.position)
            values = scalars(record, self._norms)
            values |= {
                f"alerts/{kind}": float(count) for kind, count in Counter(each.kind for each in record.alerts).items()
            }
            metrics = {f"{prefix}/{name}": value for name, value in values.items()}
            self._logger.log_metrics(metrics, step=record.position.log_step)

    def close(self) -> None:
        """Nothing to close: the logger belongs to the Trainer."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({type(self._logger).__name__})"


class CsvSink(LoggerSink):
    """A CSV file. Rows that can't be written are given up: the logger would try them again when training ends, and end it.

    Args:
        logger: Lightning's CSVLogger.
        norms: which norms are logged.
    """

    def __init__(self, logger: Any, *, norms: LoggedNorms = "groups") -> None:
        super().__init__(logger, norms=norms)
        self._csv = logger

    def write(self, record: Record) -> None:
        """Pass the scalars on."""
        with self._taken_back():
            super().write(record)

    def close(self) -> None:
        """Write out the rows that wait."""
        with self._taken_back():
            self._csv.save()

    @contextmanager
    def _taken_back(self) -> Iterator[None]:
        """Take the guard's columns out of the rows that wait, if they can't be written."""
        try:
            yield
        except OSError:
            rows = self._csv.experiment.metrics
            kept = [{name: value for name, value in row.items() if not name.startswith("gradguard")} for row in rows]
            rows[:] = [row for row in kept if row.keys() - {"step"}]
            raise


class WandbSink(LoggerSink):
    """Weights & Biases: also histograms, the last 1,000 alerts as a table, and alerts from "skip" on as alerts of W&B.

    W&B sends those on to Slack or by mail where the user has asked it to, one of a kind in a minute.

    Args:
        logger: Lightning's WandbLogger.
        histogram: makes what W&B draws from counts and bin edges: `wandb.Histogram`.
        norms: as for `LoggerSink`.
    """

    _COLUMNS = ("step", "kind", "action", "value", "limit", "parameters", "message", "remedy")

    def __init__(self, logger: Any, histogram: Callable[..., Any], *, norms: LoggedNorms = "groups") -> None:
        super().__init__(logger, norms=norms)
        self._wandb = logger
        self._histogram = histogram
        self._rows: deque[list[Any]] = deque(maxlen=_MAX_ALERTS)

    def write(self, record: Record) -> None:
        """Pass everything on that is due."""
        super().write(record)
        step = record.position.log_step
        if record.histograms is not None:
            folder = "gradients" + tag_prefix(record.position).removeprefix("gradguard")
            pairs = zip(record.histograms.names, record.histograms.counts, strict=True)
            drawn = {f"{folder}/{name}": self._draw(counts, record.histograms.edges) for name, counts in pairs}
            self._wandb.log_metrics(drawn, step=step)
        if record.alerts:
            self._rows.extend(_row(alert) for alert in record.alerts)
            self._wandb.log_text(key="gradguard/alerts", columns=list(self._COLUMNS), data=list(self._rows), step=step)
        for alert in record.alerts:
            if alert.action.skips:
                self._tell(alert)

    def _tell(self, alert: Alert) -> None:
        level = "ERROR" if alert.action >= Action.STOP else "WARN"
        text = f"{alert.message} {alert.remedy}".rstrip()
        title = f"GradGuard: {alert.kind}, {alert.action}"
        self._wandb.experiment.alert(title=title, text=text, level=level, wait_duration=_SECONDS_BETWEEN_ALERTS)

    def _draw(self, counts: Floats, edges: Floats) -> Any:
        return self._histogram(np_histogram=(counts, edges))


class MlflowSink(LoggerSink):
    """MLflow: also the last 1,000 alerts, as the artifact `gradguard/alerts.jsonl`. It has no histograms.

    Args:
        logger: Lightning's MLFlowLogger.
    """

    def __init__(self, logger: Any, *, norms: LoggedNorms = "groups") -> None:
        super().__init__(logger, norms=norms)
        self._mlflow = logger
        self._lines: deque[str] = deque(maxlen=_MAX_ALERTS)

    def write(self, record: Record) -> None:
        """Pass everything on that is due."""
        super().write(record)
        if record.alerts:
            self._lines.extend(json.dumps(alert.to_dict(), allow_nan=False) + "\n" for alert in record.alerts)
            self._mlflow.experiment.log_text(self._mlflow.run_id, "".join(self._lines), "gradguard/alerts.jsonl")


def _row(alert: Alert) -> list[Any]:
    names = ", ".join(parameter.name for parameter in alert.parameters)
    action = alert.action.value
    return [alert.step, alert.kind, action, alert.value, alert.limit, names, alert.message, alert.remedy]
