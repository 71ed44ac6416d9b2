"""Alerts as warnings, each on lines of its own, also beside a progress bar."""

from __future__ import annotations

import logging
import os
import re
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from lightning_gradguard.alert import KEPT, KINDS, Alert
from lightning_gradguard.errors import GradientWarning
from lightning_gradguard.policy import Action
from lightning_gradguard.record import Record
from lightning_gradguard.sinks.bars import bars_aside

_logger = logging.getLogger("lightning_gradguard")

_NUM_FULL, _NUM_SHOWN, _INTERVAL = 3, 10, 10
"""Alerts of a kind that are shown with culprit and remedy, that are shown at all, and of which one is shown afterwards."""

_FORMATTERS = ("warnings", "_py_warnings", "lightning", "lightning_fabric", "pytorch_lightning")
"""Whose way to show a warning is the usual one; Lightning has replaced Python's."""

_STRONG, _WARNING, _PLAIN = "\x1b[1;31m", "\x1b[1;33m", "\x1b[0m"


class ConsoleSink:
    """Warns of each alert; one whose action is only "log" goes to the logger `lightning_gradguard` instead.

    The warning's text is the whole alert. What is shown of it is short: headline, culprit, remedy; from the fourth of a kind
    on the headline alone, from the eleventh on each tenth. What ends the run is always shown. Where somebody has replaced
    `warnings.formatwarning` it is shown as they show it.

    >>> ConsoleSink().close()
    """

    wants_every_step = False

    def __init__(self) -> None:
        self._num_of_kind: Counter[str] = Counter()

    def write(self, record: Record) -> None:
        """Show the record's alerts."""
        for alert in record.alerts:
            text = f"{alert.message} {alert.remedy}".rstrip()
            if alert.action <= Action.LOG:
                _logger.info(text)
                continue
            self._num_of_kind[alert.kind] += 1
            warning = GradientWarning(text)
            with bars_aside(), _shown_as(warning, self._shown(alert)):
                # A place in this file would tell nobody anything; the step takes the line number's place.
                warnings.warn_explicit(warning, GradientWarning, "gradguard", alert.step)

    def close(self) -> None:
        """Nothing to close."""

    def _shown(self, alert: Alert) -> str:
        """What is shown of an alert; "": nothing."""
        number = self._num_of_kind[alert.kind]
        if number <= _NUM_FULL or alert.action >= Action.STOP:
            return in_short(alert)
        if number > _NUM_SHOWN and number % _INTERVAL:
            return ""
        (headline, *_) = in_short(alert).splitlines()
        rest = f" From here on one in {_INTERVAL} of this kind is shown; files and loggers get all."
        return f"{headline}{rest if number == _NUM_SHOWN else ''}\n"

    def __repr__(self) -> str:
        return "ConsoleSink()"


def in_short(alert: Alert, *, coloured: bool | None = None) -> str:
    """Headline, culprit and remedy, a line each.

    Args:
        alert: what is shown.
        coloured: whether with escape codes for colours; None: where the terminal shows them.
    """
    culprit = alert.culprit
    message = alert.message.partition(KEPT)[0]
    lines = [message if culprit is None else message.replace(f"; {culprit.in_words}", "", 1)]
    if culprit is not None:
        lines.append(f"  {culprit.in_words}")
    if alert.remedy:
        lines.append(f"  try: {alert.remedy}")
    name = alert.kind if culprit is None or not culprit.cause else culprit.cause
    if alert.kind in KINDS:
        lines.append(f"  more: gradguard explain {name}")
    headline, *rest = (_printable(line) for line in lines)
    what, colon, found = headline.partition(": ")
    if _has_colours() if coloured is None else coloured:
        what = f"{_STRONG if alert.action >= Action.STOP else _WARNING}GradGuard: {what}{_PLAIN}"
    else:
        what = f"GradGuard: {what}"
    return "\n".join((f"{what}{colon}{found}", *rest, ""))


def _printable(line: str) -> str:
    """A line without anything that a terminal would act on."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", " ", line)


def _has_colours() -> bool:
    is_captured = warnings.showwarning.__module__ not in _FORMATTERS  # by `logging`, as a rule for a file
    if is_captured or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return False
    # Notebooks show colours, and say that they are no terminal. Rich's bars stand in for the stream.
    stream = getattr(sys.stderr, "rich_proxied_file", sys.stderr)
    return stream is not None and (stream.isatty() or type(stream).__module__.startswith("ipykernel"))


@contextmanager
def _shown_as(warning: Warning, text: str) -> Iterator[None]:
    """Have Python show this text where it shows this warning. Whoever records warnings gets the warning as it is."""
    usual = warnings.formatwarning
    if usual.__module__.partition(".")[0] not in _FORMATTERS:
        yield
        return

    def formatted(
        message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
    ) -> str:
        # Other threads may warn of other things in the meantime.
        return text if message is warning else usual(message, category, filename, lineno, line)

    warnings.formatwarning = formatted
    try:
        yield
    finally:
        if warnings.formatwarning is formatted:
            warnings.formatwarning = usual
