"""What the tests with a Trainer share beside `toys.py`."""

from __future__ import annotations

import logging

import pytest
from lightning_package import logs


@pytest.fixture
def summary(caplog):
    """The guard's closing words, one text per run."""
    loggers = logs()
    before = [(logger.level, logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.INFO)
        logger.propagate = True
        logger.addHandler(caplog.handler)
    yield lambda: list(
        dict.fromkeys(text for text in caplog.messages if text.startswith("GradGuard:") and "holds batches" not in text)
    )
    for logger, (level, propagate) in zip(loggers, before, strict=True):
        logger.setLevel(level)
        logger.propagate = propagate
        logger.removeHandler(caplog.handler)
