"""Lines beside progress bars."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TextIO, cast

_LOGS = ("", "lightning.pytorch", "lightning.fabric", "pytorch_lightning", "lightning_fabric")
"""Where there may be handlers of what Lightning logs; "": of all logs."""


@contextmanager
def bars_aside() -> Iterator[None]:
    """Have what is written to standard error in the meantime appear on lines of its own, above the bars that are there.

    tqdm's are taken off the terminal for a moment. Rich moves its own for what comes through the object that it has put in
    the place of `sys.stderr`; a handler of logs has kept the stream itself, and gets that object, too.
    """
    tqdm = sys.modules.get("tqdm")
    off = nullcontext() if tqdm is None or sys.stderr is None else tqdm.tqdm.external_write_mode(file=sys.stderr)
    stream = getattr(sys.stderr, "rich_proxied_file", None)
    handlers = [] if stream is None else list(_handlers_of(stream))
    with off:
        try:
            for handler in handlers:
                handler.setStream(sys.stderr)
            yield
        finally:
            for handler in handlers:
                handler.setStream(cast("TextIO", stream))


def _handlers_of(stream: object) -> Iterator[logging.StreamHandler[TextIO]]:
    for name in _LOGS:
        for handler in logging.getLogger(name).handlers:
            if isinstance(handler, logging.StreamHandler) and handler.stream is stream:
                yield handler
