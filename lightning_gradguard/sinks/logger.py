"""Scalars in any logger of Lightning's, through its own interface."""

from __future__ import annotations

from typing import Protocol

from lightning_gradguard.record import Record
from lightning_gradguard.sinks.tags import scalars, tag_prefix


class MetricsLogger(Protocol):
    """The part of Lightning's `Logger` that is used; `lightning` and `pytorch_lightning` have distinct classes for it."""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Take the metrics of one step."""


class LoggerSink:
    """Passes the scalars of due steps, and of steps with an alert, to a logger.

    Args:
        logger: CSVLogger, WandbLogger, MLFlowLogger, or your own.
    """

    def __init__(self, logger: MetricsLogger) -> None:
        self._logger = logger

    def write(self, record: Record) -> None:
        """Pass the scalars on."""
        if record.scalars_due or record.alerts:
            prefix = tag_prefix(record.position)
            metrics = {f"{prefix}/{name}": value for name, value in scalars(record).items()}
            self._logger.log_metrics(metrics, step=record.position.log_step)

    def close(self) -> None:
        """Nothing to close: the logger belongs to the Trainer."""

    def __repr__(self) -> str:
        return f"LoggerSink({type(self._logger).__name__})"
