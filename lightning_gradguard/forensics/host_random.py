"""The global random states of python and numpy, noted at little cost."""

from __future__ import annotations

import ctypes
import random
from typing import Any, NamedTuple

import numpy as np

_NUM_BYTES = 624 * 4
"""Of a Mersenne Twister's numbers, which the position follows; it is only looked at whether they change."""


class HostRandom(NamedTuple):
    """States of python's and numpy's global generators.

    Attributes:
        python: as `random.getstate` gives it.
        numpy: as `numpy.random.get_state` gives it.
    """

    python: Any
    numpy: Any

    def restore(self) -> None:
        """Put them back."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)  # noqa: NPY002 - the global generator is what user code may use


class HostRandomNotes:
    """Notes both states; numpy's, which takes long to read, only where it has changed."""

    def __init__(self) -> None:
        self._numpy: Any = None
        self._seen = b""

    def note(self) -> HostRandom:
        """As they are now. A few microseconds."""
        return HostRandom(random.getstate(), self._note_numpy())

    def _note_numpy(self) -> Any:
        seen = _fingerprint()
        # With one of a pair of normal values left over, a draw would not show.
        if not seen or seen != self._seen or self._numpy is None or self._numpy[3]:
            self._numpy = np.random.get_state()  # noqa: NPY002
            self._seen = seen
        return self._numpy


def _fingerprint() -> bytes:
    """Numbers and position of numpy's global generator; empty where it is no Mersenne Twister."""
    generator = np.random.get_bit_generator()  # type: ignore[attr-defined]  # missing in its stubs
    if not isinstance(generator, np.random.MT19937):
        return b""
    return ctypes.string_at(generator.ctypes.state_address, _NUM_BYTES + 4)
