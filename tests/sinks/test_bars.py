"""Lines that are written beside progress bars stand alone."""

from __future__ import annotations

import io
import logging
import sys
from contextlib import contextmanager

import pytest

from lightning_gradguard.sinks.bars import bars_aside


@contextmanager
def log():
    """A handler of Lightning's log, which keeps the stream that it was made with."""
    logger = logging.getLogger("lightning.pytorch")
    handler = logging.StreamHandler(sys.stderr)
    logger.addHandler(handler)
    try:
        yield handler
    finally:
        logger.removeHandler(handler)


def say(handler):
    """What a run says when it is over."""
    with bars_aside():
        handler.emit(logging.makeLogRecord({"msg": "12 steps"}))


def test_log_beside_a_bar_of_rich_is_written_above_it(capsys):
    """By the bar's own console, which would write over it otherwise; afterwards all is as it was."""
    live = pytest.importorskip("rich.live")
    from rich.console import Console  # noqa: PLC0415

    terminal = io.StringIO()
    console = Console(file=terminal, force_terminal=True)
    with log() as handler, live.Live("the bar", console=console, auto_refresh=False):
        stream = handler.stream
        say(handler)
        assert handler.stream is stream
    assert "12 steps\n" in terminal.getvalue().replace("\x1b[0m", "")
    assert capsys.readouterr().err == ""


def test_log_without_a_bar_is_left_alone(capsys):
    """The handler writes where it has always written."""
    with log() as handler:
        say(handler)
    assert capsys.readouterr().err == "12 steps\n"
