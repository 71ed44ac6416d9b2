"""What ranks tell each other of an exception."""

from __future__ import annotations

import itertools
import pickle
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from torch import distributed

from lightning_gradguard.alert import Alert
from lightning_gradguard.measure.distributed import Ranks
from lightning_gradguard.report.raised import Raised

SECONDS_TO_RAISE = 30.0
"""How long a rank whose exception NaN is the reason of waits for the others to raise one in the same micro-batch."""

_SECONDS_TO_REPLAY = 600.0
_SECONDS_TO_HEAR = 10.0
_SECONDS_BETWEEN = 0.05
_SECONDS_BETWEEN_LOOKS = 1.0

# All ranks have as many fits; where one has not, nobody answers it, which is as if it had raised alone.
_numbers = itertools.count()


@dataclass(frozen=True)
class RaisedOnRank:
    """An exception that NaN or infinity is the reason of.

    Attributes:
        rank: where it was raised.
        raised: the exception.
        can_pass: whether this rank may pass over it.
    """

    rank: int
    raised: Raised
    can_pass: bool


class RankMessages:
    """Messages through the store of torch's process group.

    They are no collectives: where one rank alone raises, the others may be inside one, which they leave when the process
    that raised has ended. So each rank has a thread that looks once a second whether another one has a last word.

    Args:
        ranks: those that train together.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._fit = next(_numbers)
        self._store: Any = distributed.distributed_c10d._get_default_store()  # there is no public way to it
        self._told: Alert | None = None
        self._is_over = threading.Event()
        self._listener = threading.Thread(target=self._listen, name="gradguard-messages", daemon=True)
        self._listener.start()

    def tell_raised(self, batch: int) -> None:
        """Say that this rank's micro-batch of a number has ended in an exception."""
        self._set(self._key(batch, "raised", self._ranks.rank), b"")

    def exchange(self, batch: int, found: RaisedOnRank | None) -> list[RaisedOnRank] | None:
        """Say what this rank's exception was, and hear of those of all others, by rank.

        Returns:
            None if NaN is not the reason of all of them, or not each rank has raised one. Either comes in bounded time.
        """
        self._set(self._key(batch, "found", self._ranks.rank), pickle.dumps(found))
        if found is None or not self._wait(self._keys(batch, "raised"), SECONDS_TO_RAISE):
            return None
        keys = self._keys(batch, "found")
        if not self._wait(keys, _SECONDS_TO_REPLAY):
            return None
        everyone: list[RaisedOnRank | None] = [self._get(key) for key in keys]
        known = [each for each in everyone if each is not None]
        return known if len(known) == len(everyone) else None

    def share(self, batch: int, alert: Alert | None) -> None:
        """Hand the alert about an exception of all ranks to the others."""
        self._set(self._key(batch, "alert"), pickle.dumps(alert))

    def shared(self, batch: int) -> Alert | None:
        """The alert that another rank hands over; None if it does not."""
        key = self._key(batch, "alert")
        alert: Alert | None = self._get(key) if self._wait([key], _SECONDS_TO_REPLAY) else None
        return alert

    def tell_end(self, alert: Alert) -> None:
        """Say why this rank is about to end the run alone; returns when the others have heard it, or after ten seconds."""
        self.stop()
        self._set(self._key("end"), pickle.dumps(alert))
        others = [self._key("heard", rank) for rank in range(self._ranks.size) if rank != self._ranks.rank]
        self._wait(others, _SECONDS_TO_HEAR)

    def told(self) -> Alert | None:
        """Why another rank has ended the run; None if none has said so."""
        if self._told is None and not self._is_over.is_set():
            self._look()
        return self._told

    def stop(self) -> None:
        """No longer listen."""
        self._is_over.set()
        self._listener.join(_SECONDS_TO_HEAR)

    def _listen(self) -> None:
        while not self._is_over.wait(_SECONDS_BETWEEN_LOOKS):
            if not self._look():
                return

    def _look(self) -> bool:
        """Whether to look again."""
        try:
            if not self._store.check([self._key("end")]):
                return True
            self._told = self._get(self._key("end"))
        except RuntimeError:  # whoever holds the store has ended
            return False
        self._set(self._key("heard", self._ranks.rank), b"")
        return False

    def _wait(self, keys: Sequence[str], seconds: float) -> bool:
        """Whether all keys are there in time. The store's own waiting would keep other threads from it."""
        end = time.monotonic() + seconds
        try:
            while not self._store.check(list(keys)):
                if time.monotonic() > end:
                    return False
                time.sleep(_SECONDS_BETWEEN)
        except RuntimeError:
            return False
        return True

    def _set(self, key: str, value: bytes) -> None:
        try:
            self._store.set(key, value)
        except RuntimeError:  # nobody is there to read it
            return

    def _get(self, key: str) -> Any:
        self._store.wait([key], timedelta(seconds=_SECONDS_TO_HEAR))
        return pickle.loads(self._store.get(key))  # noqa: S301 - written by this same code on another rank

    def _keys(self, batch: int, name: str) -> list[str]:
        return [self._key(batch, name, rank) for rank in range(self._ranks.size)]

    def _key(self, *parts: object) -> str:
        return "/".join(map(str, ("gradguard", self._fit, *parts)))
