"""Lines that are written beside progress bars stand alone."""

from __future__ import annotations

import io
import logging
import sys

import pytest

from lightning_gradguard.sinks.bars import bars_aside


@pytest.fixture
def log(capsys):
    """A log as Lightning's, whose handler has kept the stream that it was made with."""
    logger = logging.getLogger("lightning.pytorch")
    handler = logging.StreamHandler(sys.stderr)
    logger.addHandler(handler)
    yield handler
    logger.removeHandler(handler)


def test_log_beside_a_bar_of_rich_is_written_above_it(log, capsys):
    """By the bar's own console, which would write over it otherwise; afterwards all is as it was."""
    live = pytest.importorskip("rich.live")
    from rich.console import Console  # noqa: PLC0415

    terminal, stream = io.StringIO(), log.stream
    with live.Live("the bar", console=Console(file=terminal, force_terminal=True), auto_refresh=False):
        with bars_aside():
            log.emit(logging.makeLogRecord({"msg": "12 steps"}))
        assert log.stream is stream
    assert "12 steps\n" in terminal.getvalue().replace("\x1b[0m", "")
    assert capsys.readouterr().err == ""


def test_log_without_a_bar_is_left_alone(log, capsys):
    """The handler writes where it has always written."""
    with bars_aside():
        log.emit(logging.makeLogRecord({"msg": "12 steps"}))
    assert capsys.readouterr().err == "12 steps\n"
