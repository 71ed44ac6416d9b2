"""Alerts as messages: on Slack, Discord, Teams, Telegram, by mail, and wherever else apprise can send them."""

from __future__ import annotations

import importlib
import logging
import os
import re
import socket
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from torch import distributed

from lightning_gradguard.alert import Alert
from lightning_gradguard.policy import Action, ActionName, require_float, to_action
from lightning_gradguard.record import Record

_VARIABLE = "APPRISE_URLS"
_MAX_SHOWN = 5
_MAX_WAITING = 1000
_LOGGERS = ("apprise", "requests", "urllib3")
"""Of packages that write addresses, and the keys in them, into their logs."""


class Service(Protocol):
    """What is used of an object that apprise makes of an address."""

    service_name: str

    def notify(self, **message: Any) -> bool:
        """Send a message; whether it was taken."""


class Notify:
    """Sends alerts to where people are, with run and culprit. It needs the extra `notify`, which brings apprise.

    The first alert is sent at once; those of the next `interval_s` seconds come together in the next message, and what is
    left when training ends is sent then. All of it happens on threads of its own, and on the first rank only. A service
    that fails is tried again with the next message; it can neither disturb the training nor delay its end by more than
    `max_wait_s`. What apprise would write into logs stays out of them, since it can hold keys.

    A message holds what the alert says: names, lines of code, and single values of a batch.

    Args:
        urls: of the services, as apprise writes them: "slack://...", "mailtos://...", "tgram://..."; several in a list,
            or in one string with spaces between. None: those in the environment variable `APPRISE_URLS`, so that no key
            stands in code or in a configuration file.
        level: the mildest action that is worth a message.
        interval_s: seconds from one message to the next, > 0.
        max_wait_s: seconds that the end of training waits for services, > 0.
        run: the run's name in messages. None: the Trainer's log folder; without a Trainer the name of the script.

    Raises:
        ValueError: if an argument is wrong; an address is never part of the message.
        ModuleNotFoundError: where apprise is not installed.

    >>> Notify("json://localhost/key", level="stop")
    Notify(JSON)
    """

    wants_every_step = False

    def __init__(
        self,
        urls: str | Sequence[str] | None = None,
        *,
        level: ActionName | Action = "skip",
        interval_s: float = 60.0,
        max_wait_s: float = 10.0,
        run: str | None = None,
    ) -> None:
        require_float("interval_s", interval_s, above=0.0, remedy="The default is 60.0.")
        require_float("max_wait_s", max_wait_s, above=0.0, remedy="The default is 10.0.")
        self._level = to_action(level, parameter="level")
        addresses = _addresses(urls)
        self._settings: dict[str, Any] = {
            "urls": addresses,
            "level": str(self._level),
            "interval_s": interval_s,
            "max_wait_s": max_wait_s,
            "run": run,
        }
        self._max_wait_s = max_wait_s
        self._own_run = run
        self._run = run or f"{Path(sys.argv[0]).name or 'training'} on {socket.gethostname()}"
        self._outboxes = [_Outbox(service, interval_s) for service in _services(addresses)]

    def begin(self, run: str) -> None:
        """Use this name of the run, unless there is one of the user's."""
        self._run = self._own_run or f"{run} on {socket.gethostname()}"

    def write(self, record: Record) -> None:
        """Have the record's alerts sent; returns at once.

        Raises:
            OSError: if a service did not take an earlier message.
        """
        alerts = [alert for alert in record.alerts if alert.action >= self._level]
        if alerts and _is_first_rank():
            for outbox in self._outboxes:
                outbox.put(self._run, alerts)
        self._raise_errors()

    def close(self) -> None:
        """Send what is left, and wait for it at most `max_wait_s`.

        Raises:
            OSError: if a service did not take it.
        """
        deadline = time.monotonic() + self._max_wait_s
        for outbox in self._outboxes:
            outbox.hurry()
        for outbox in self._outboxes:
            outbox.wait(deadline)
        self._raise_errors()

    def _raise_errors(self) -> None:
        errors = [error for outbox in self._outboxes if (error := outbox.take_error())]
        if errors:
            raise OSError("; ".join(errors))

    def __reduce__(self) -> tuple[partial[Notify], tuple[()]]:
        # Threads stay in the process that they are in; a copy begins with nothing to send.
        return partial(Notify, **self._settings), ()

    def __repr__(self) -> str:
        return f"Notify({', '.join(outbox.name for outbox in self._outboxes)})"


class _Outbox:
    """What one service still has to be told, and the thread that tells it: there is one while there is something to tell.

    Args:
        service: takes messages; may fail or hang.
        interval_s: seconds from one message to the next.
    """

    def __init__(self, service: Service, interval_s: float) -> None:
        self.name = str(service.service_name)
        self._service = service
        self._interval_s = interval_s
        self._changed = threading.Condition()
        self._waiting: list[Alert] = []
        self._run = ""
        self._next_at = 0.0
        self._thread: threading.Thread | None = None
        self._hanging: threading.Thread | None = None
        self._in_a_hurry = False
        self._error = ""

    def put(self, run: str, alerts: Sequence[Alert]) -> None:
        """Have alerts sent."""
        with self._changed:
            self._run = run
            self._waiting = [*self._waiting, *alerts][-_MAX_WAITING:]
            if self._thread is None:
                # One that hangs must not keep the process from ending.
                self._thread = threading.Thread(target=self._send_all, name="gradguard-notify", daemon=True)
                self._thread.start()

    def hurry(self) -> None:
        """Wait for the interval's end no longer."""
        with self._changed:
            self._in_a_hurry = True
            self._changed.notify_all()

    def wait(self, deadline: float) -> None:
        """Wait until all is sent, or given up; at most until then, and not again for a service that hung before."""
        with self._changed:
            if self._thread is None or self._thread is not self._hanging:
                self._changed.wait_for(lambda: self._thread is None, max(deadline - time.monotonic(), 0.0))
                if self._thread is not None:
                    self._error = f"{self.name} did not answer in time"
            self._hanging = self._thread
            self._in_a_hurry = False

    def take_error(self) -> str:
        """What has gone wrong since the last time; "": nothing."""
        with self._changed:
            error, self._error = self._error, ""
        return error

    def _send_all(self) -> None:
        while alerts := self._next():
            is_taken = self._send(alerts)
            with self._changed:
                self._next_at = time.monotonic() + self._interval_s
                if not is_taken:
                    self._error = f"{self.name} did not take a message"
                    if not self._in_a_hurry:
                        self._waiting = [*alerts, *self._waiting][-_MAX_WAITING:]

    def _next(self) -> list[Alert]:
        """The alerts of the next message, when its time has come; where there are none the thread is at its end."""
        with self._changed:
            while self._waiting:
                left = self._next_at - time.monotonic()
                if self._in_a_hurry or left <= 0.0:
                    alerts, self._waiting = self._waiting, []
                    return alerts
                self._changed.wait(left)
            self._thread = None
            self._changed.notify_all()
            return []

    def _send(self, alerts: Sequence[Alert]) -> bool:
        strongest = max(alerts, key=lambda alert: alert.action)
        title, body = in_words(self._run, alerts)
        try:
            with _unlogged():
                return self._service.notify(
                    title=title,
                    body=body,
                    body_format="text",
                    notify_type="failure" if strongest.action >= Action.STOP else "warning",
                )
        except Exception:  # noqa: BLE001 - whatever a service does; and what it says may hold the key
            return False


def in_words(run: str, alerts: Sequence[Alert]) -> tuple[str, str]:
    """Title and body of a message about at least one alert; of many the gravest are told, in their order."""
    strongest = max(alerts, key=lambda alert: alert.action)
    title = f"GradGuard: {strongest.kind} at step {strongest.step}, {strongest.action} ({run})"
    shown = sorted(range(len(alerts)), key=lambda index: -alerts[index].action.severity)[:_MAX_SHOWN]
    paragraphs = [_paragraph(alerts[index]) for index in sorted(shown)]
    left = len(alerts) - len(shown)
    more = [f"And {left:,} more; alerts.jsonl has them all."] if left else []
    return title, "\n\n".join([*paragraphs, *more, f"Run: {run}"])


def _paragraph(alert: Alert) -> str:
    return f"{alert.message}\nTry: {alert.remedy}" if alert.remedy else alert.message


def _addresses(urls: str | Sequence[str] | None) -> list[str]:
    given = os.environ.get(_VARIABLE, "") if urls is None else urls
    # As apprise's own command takes them: several in a string, with spaces or commas between; a comma may be part of one.
    found = re.split(r"[\s,]+(?=[A-Za-z][\w.+-]*://)", given.strip()) if isinstance(given, str) else list(given)
    if not any(found) or not all(isinstance(address, str) for address in found):
        where = f"the environment variable {_VARIABLE}, where there is none" if urls is None else "`urls`"
        raise ValueError(
            f'`urls` must be addresses of services, got none from {where}. For example "mailtos://user:password@example.com".'
        )
    return found


def _services(addresses: Sequence[str]) -> list[Service]:
    try:
        apprise = importlib.import_module("apprise")
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            '`Notify` needs apprise, which the extra `notify` brings: pip install "lightning-gradguard[notify]"',
            name="apprise",
        ) from None
    asset = apprise.AppriseAsset(app_id="GradGuard", app_desc="GradGuard")
    with _unlogged(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of packages that its plugins import; nobody here can mend them
        made = [apprise.Apprise.instantiate(address, asset=asset) for address in addresses]
    for number, (address, service) in enumerate(zip(addresses, made, strict=True), start=1):
        if service is None:
            scheme = re.match(r"([A-Za-z][\w.+-]*)://", address)
            begins = f", which begins with {scheme.group(1)}://" if scheme else ""
            raise ValueError(
                f"`urls` must be addresses that apprise can read, got one that it can't: number {number}{begins}. "
                "It is not shown, since it may hold a key. apprise's list of services says how each is written."
            )
    return made


@contextmanager
def _unlogged() -> Iterator[None]:
    """Keep what this thread does in apprise, and in what that uses, out of the logs."""
    this_thread = threading.get_ident()

    def is_of_another(record: logging.LogRecord) -> bool:
        return record.thread != this_thread

    names = [*_LOGGERS, *(name for name in list(logging.root.manager.loggerDict) if name.partition(".")[0] in _LOGGERS)]
    loggers = [logging.getLogger(name) for name in names]
    for logger in loggers:
        logger.addFilter(is_of_another)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(is_of_another)


def _is_first_rank() -> bool:
    """A Trainer has sinks on the first rank alone; a loop of one's own has them on all."""
    return not (distributed.is_available() and distributed.is_initialized()) or distributed.get_rank() == 0
