"""Tables of labelled trainings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import nn

from benchmarks.detection.trainings.base import ONSET, Kind, Training
from benchmarks.detection.trainings.data import digits, sampled
from benchmarks.detection.trainings.networks import cross_entropy

CHECKED: dict[str, Kind] = {}
"""Written and labelled before the first rules; they only checked them."""

MISTAKEN: dict[str, Kind] = {}
"""Kinds that the first rules got wrong, and others like them; written and labelled before the second rules."""

FURTHER: dict[str, Kind] = {}
"""Written and labelled after the second rules, in kinds that no earlier table has."""

FURTHER_HEALTHY: dict[str, Kind] = {}
"""Healthy ones, as new."""

NOT_ON_THE_LIST = "not on the list"
"""The label of a training with a fault that no cause on the list describes: to name one is false."""

NO_CAUSE = ""
"""The label of a training in which nothing is wrong."""

Build = Callable[[], Training]


class Register(Protocol):
    """Puts a training into a table."""

    def __call__(self, cause: str, *, onset: int | None = None) -> Callable[[Build], Build]:
        """The cause is what should be named; the fault begins at step `onset`."""


def register(table: dict[str, Kind], symptom: str) -> Register:
    """A decorator for trainings with one symptom: "vanishing" (from the first step on) or "explosion" (later)."""

    def of(cause: str, *, onset: int | None = None) -> Callable[[Build], Build]:
        start = (0 if symptom == "vanishing" else ONSET) if onset is None else onset

        def add(build: Build) -> Build:
            table[build.__name__] = Kind(build.__name__, build, cause, (symptom,), start)
            return build

        return add

    return of


def on_digits(network: nn.Module, optimizer: torch.optim.Optimizer, size: int = 32) -> Training:
    """A classifier of digits, trained on batches of so many."""
    return Training(network, optimizer, sampled(digits(), size), cross_entropy(network))
