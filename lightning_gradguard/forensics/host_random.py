"""The global random states of python and numpy, noted at little cost."""

from __future__ import annotations

import ctypes
import random
import struct
from typing import Any, NamedTuple

import numpy as np

_NUM_WORDS = 624
"""Numbers of a Mersenne Twister, 4 bytes each."""


class HostRandom(NamedTuple):
    """States of python's and numpy's global generators.

    Attributes:
        python: as `random.getstate` gives it, or the bytes that it is made of.
        gauss: what python keeps of a pair of normal values, where `python` is bytes.
        numpy: as `numpy.random.get_state` gives it.
    """

    python: Any
    gauss: float | None
    numpy: Any

    def restore(self) -> None:
        """Put them back."""
        state = self.python
        if isinstance(state, bytes):
            index, *numbers = struct.unpack(_FORMAT, state)
            state = (random.Random.VERSION, (*numbers, index), self.gauss)
        random.setstate(state)
        np.random.set_state(self.numpy)  # noqa: NPY002 - the global generator is what user code may use


class HostRandomNotes:
    """Notes both states; numpy's, which takes long to read, only where it has changed."""

    def __init__(self) -> None:
        self._numpy: Any = None
        self._seen = b""
        self._python = _python_generator()
        self._python_words = _words(id(self._python) + _OFFSET) if _has_known_layout(self._python) else None
        self._generator: Any = None
        self._numpy_words: memoryview | None = None

    def note(self) -> HostRandom:
        """As they are now. A microsecond or two."""
        # `getstate` makes 625 integers of them.
        if self._python_words is None:
            return HostRandom(random.getstate(), None, self._note_numpy())
        return HostRandom(self._python_words.tobytes(), self._python.gauss_next, self._note_numpy())

    def _note_numpy(self) -> Any:
        generator = np.random.get_bit_generator()  # type: ignore[attr-defined]  # missing in its stubs
        if generator is not self._generator:
            # Numbers and position, in another order than python's; only of a Mersenne Twister is known where they are.
            self._generator, self._numpy_words = generator, None
            if isinstance(generator, np.random.MT19937):
                self._numpy_words = _words(generator.ctypes.state_address)
        seen = b"" if self._numpy_words is None else self._numpy_words.tobytes()
        # With one of a pair of normal values left over, a draw would not show.
        if not seen or seen != self._seen or self._numpy is None or self._numpy[3]:
            # As a tuple, of which the fourth is that one; numpy warns where another generator is asked for such a tuple.
            is_twister = self._numpy_words is not None
            self._numpy = np.random.get_state() if is_twister else np.random.get_state(legacy=False)  # noqa: NPY002
            self._seen = seen
        return self._numpy


_FORMAT = f"=I{_NUM_WORDS}I"
"""How CPython keeps a generator (Modules/_randommodule.c): the index, then the numbers."""
_NUM_BYTES = struct.calcsize(_FORMAT)
_OFFSET = object.__basicsize__


def _python_generator() -> Any:
    return random.getstate.__self__  # type: ignore[attr-defined]  # a bound method of the global generator


def _has_known_layout(generator: Any) -> bool:
    """Whether the bytes behind a generator's header are its index and numbers, as in CPython, which is looked at."""
    if type(generator) is not random.Random or type(generator).__basicsize__ < _OFFSET + _NUM_BYTES:
        return False
    _, (*numbers, index), _ = generator.getstate()
    return ctypes.string_at(id(generator) + _OFFSET, _NUM_BYTES) == struct.pack(_FORMAT, index, *numbers)


def _words(address: int) -> memoryview:
    """The bytes at an address, as they are whenever they are looked at."""
    return memoryview((ctypes.c_char * _NUM_BYTES).from_address(address))
