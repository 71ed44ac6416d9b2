"""What a sink is, and why one can't hurt."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from typing import Protocol, runtime_checkable

from lightning_gradguard.errors import SinkWarning, type_and_text
from lightning_gradguard.record import Record

_logger = logging.getLogger("lightning_gradguard")


@runtime_checkable
class Sink(Protocol):
    """Takes records somewhere.

    One that has an attribute `wants_every_step` that is False gets only those with something due or an alert, a skip, or
    anything found, and then healthy steps cost less.
    """

    def write(self, record: Record) -> None:
        """Called after every step; look at `record.scalars_due`, `.histograms` and `.alerts` for what is wanted.

        Alerts that are no findings about gradients, as of a rollback, come with another record of the last step, without
        verdicts; a step of LBFGS that turns bad at a later evaluation comes twice.
        """

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
    """A sink whose failures can't reach the training: the first one is a warning, later ones are counted.

    It gets each record all the same, since a full disk may have room again. How often it failed is said when it is closed.

    Args:
        sink: the one that may fail.
    """

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self.wants_every_step: bool = getattr(sink, "wants_every_step", True)
        self._num_failures = 0

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
        if self._num_failures > 1:
            _logger.warning(
                "%s failed %d times in this run; what it could not take may be missing there.",
                self._name,
                self._num_failures,
            )
        self._num_failures = min(self._num_failures, 1)

    @property
    def _name(self) -> str:
        try:
            return repr(self._sink)
        except Exception:  # noqa: BLE001 - nor must what a sink is called end a training
            return type(self._sink).__name__

    def _fail(self, error: Exception) -> None:
        if isinstance(error, Warning):
            raise error  # The user has turned warnings into errors, so this is what was asked for.
        self._num_failures += 1
        if self._num_failures == 1:
            warnings.warn(
                f"{self._name} failed ({type_and_text(error)}). Training goes on, and it gets the records that "
                "follow; what it can't take may be missing there. Further failures of it are only counted.",
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
