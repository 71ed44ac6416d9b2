"""Alerts as warnings."""

from __future__ import annotations

import logging
import warnings

from lightning_gradguard.errors import GradientWarning
from lightning_gradguard.policy import Action
from lightning_gradguard.record import Record

_logger = logging.getLogger("lightning_gradguard")


class ConsoleSink:
    """Warns of each alert; one whose action is only "log" goes to the logger `lightning_gradguard` instead.

    >>> ConsoleSink().close()
    """

    wants_every_step = False

    def write(self, record: Record) -> None:
        """Show the record's alerts."""
        for alert in record.alerts:
            text = f"{alert.message} {alert.remedy}".rstrip()
            if alert.action > Action.LOG:
                # A place in this file would tell nobody anything; the step takes the line number's place.
                warnings.warn_explicit(text, GradientWarning, "gradguard", alert.step)
            else:
                _logger.info(text)

    def close(self) -> None:
        """Nothing to close."""

    def __repr__(self) -> str:
        return "ConsoleSink()"
