"""The global random states of python and numpy, noted and put back."""

# ruff: noqa: NPY002 - it is the global generator that is noted

from __future__ import annotations

import random

import numpy as np
import pytest

from lightning_gradguard.forensics import host_random
from lightning_gradguard.forensics.host_random import HostRandomNotes


@pytest.fixture(autouse=True)
def _as_before():
    """Other tests draw from the same generators."""
    python, generator, numpy = random.getstate(), np.random.get_bit_generator(), np.random.get_state()
    yield
    random.setstate(python)
    np.random.set_bit_generator(generator)
    np.random.set_state(numpy)


def draw():
    """From both, of each kind."""
    return random.random(), random.gauss(0.0, 1.0), np.random.rand(), np.random.randn()


@pytest.mark.parametrize("is_known", [True, False])
def test_states_that_were_noted_give_the_same_numbers_again(is_known, monkeypatch):
    """Also where it isn't known how the interpreter keeps python's."""
    if not is_known:
        monkeypatch.setattr(host_random, "_has_known_layout", lambda generator: False)
    notes = HostRandomNotes()
    for _ in range(3):
        noted = notes.note()
        drawn = draw()
        noted.restore()
        assert draw() == drawn


def test_state_of_another_generator_of_numpys_is_noted():
    """Somebody may have set one; where it keeps its numbers is not known."""
    notes = HostRandomNotes()
    notes.note()
    np.random.set_bit_generator(np.random.PCG64(5))
    noted = notes.note()
    drawn = draw()
    noted.restore()
    assert draw() == drawn


def test_generator_of_another_kind_has_no_known_layout():
    """A subclass may hold anything."""

    class Own(random.Random):
        pass

    assert not host_random._has_known_layout(Own())
    assert not host_random._has_known_layout(random.SystemRandom())
