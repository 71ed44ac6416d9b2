"""What is known about a sick step, before anybody says why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lightning_gradguard.forensics.flow.flow import Flow
from lightning_gradguard.forensics.flow.weight_growth import WeightGrowth


@dataclass(frozen=True)
class Evidence:
    """What one replay of the step, and one of a healthy batch on the same weights, have shown.

    Attributes:
        step: number of the decision, from 0.
        flow: of the sick step.
        norm: global gradient norm of its replay.
        healthy: flow of the previous healthy batch; None where there is none.
        healthy_norm: global gradient norm of that.
        weight_growths: of the weights.
        error: relative difference between the gradients of the step and those of its replay; None if not known.
        differing: the parameter whose gradient differs most, "" if none does.
    """

    step: int
    flow: Flow
    norm: float
    healthy: Flow | None = None
    healthy_norm: float | None = None
    weight_growths: tuple[WeightGrowth, ...] = ()
    error: float | None = None
    differing: str = ""


@dataclass(frozen=True)
class Cause:
    """Why gradients vanish or explode.

    Attributes:
        name: "activation", "batch", "cut", "dead", "foreign", "init", "loss", "normalisation", "rate", "recurrence",
            "sample", "saturation" or "weights".
        phase: "data", "weights", "forward" or "backward".
        message: one sentence, with figures.
        remedy: what to try.
        module: where it is, as far as it is at one place.
        samples: rows of the batch.
    """

    name: str
    phase: str
    message: str
    remedy: str
    module: str = ""
    samples: tuple[int, ...] | None = None


def median(values: Sequence[float]) -> float:
    """The middle one; of an even number the upper."""
    return sorted(values)[len(values) // 2]
