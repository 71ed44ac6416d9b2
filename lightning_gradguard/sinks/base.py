"""What a sink is, and why one can't hurt."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Protocol, runtime_checkable

from lightning_gradguard.errors import SinkWarning
from lightning_gradguard.record import Record


@runtime_checkable
class Sink(Protocol):
    """Takes records somewhere."""

    def write(self, record: Record) -> None:
        """Called after every step; look at `record.scalars_due`, `.histograms` and `.alerts` for what is wanted."""

    def close(self) -> None:
        """Called at the end of training, however it ends; a later `write` may follow and has to work."""


class FunctionSink:
    """A function of the user's, called with every record.

    >>> seen = []
    >>> sink = FunctionSink(lambda record: seen.append(record.measurement.global_norm))
    """

    def __init__(self, function: Callable[[Record], object]) -> None:
        self._function = function

    def write(self, record: Record) -> None:
        """Call the function."""
        self._function(record)

    def close(self) -> None:
        """Nothing to close."""

    def __repr__(self) -> str:
        return f"FunctionSink({getattr(self._function, '__qualname__', self._function)})"


class SafeSink:
    """A sink whose failures can't reach the training: the first one is a warning, later ones are silent.

    It is tried again at each record, since a full disk may have room again.

    Args:
        sink: the one that may fail.
    """

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self._has_failed = False

    def write(self, record: Record) -> None:
        """Pass a record on."""
        try:
            self._sink.write(record)
        except Exception as error:  # noqa: BLE001 - whatever a sink does, training goes on
            self._fail(error)

    def close(self) -> None:
        """Close the sink."""
        try:
            self._sink.close()
        except Exception as error:  # noqa: BLE001 - whatever a sink does, training goes on
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        if isinstance(error, Warning):
            raise error  # The user has turned warnings into errors, so this is what was asked for.
        if not self._has_failed:
            self._has_failed = True
            warnings.warn(
                f"{self._sink!r} failed ({type(error).__name__}: {error}). Training goes on; "
                "records may be missing there. Further failures of it are not shown.",
                SinkWarning,
                stacklevel=2,
            )


def to_sink(value: Sink | Callable[[Record], object]) -> Sink:
    """Take a sink, or a function of one argument.

    Raises:
        ValueError: for anything else.
    """
    if isinstance(value, Sink):
        return value
    if callable(value):
        return FunctionSink(value)
    raise ValueError(
        f"`sinks` must hold objects with `write(record)` and `close()`, or functions of a record, got {value!r}."
    )
