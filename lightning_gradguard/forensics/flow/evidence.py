"""What is known about a step that vanishes or explodes, before anybody says why."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_gradguard.forensics.flow.flow import Flow
from lightning_gradguard.forensics.flow.norm_history import Usual
from lightning_gradguard.forensics.flow.weight_history import WeightGrowth


@dataclass(frozen=True)
class Changed:
    """How the gradients of a step differ from those of its replay.

    Attributes:
        error: relative difference of all.
        name: the parameter that differs most; "" if none does.
        norm: of its gradient.
        replayed: norm of the same in the replay.
        is_same_forward: whether the replay gave the loss of the step; None if that is not known.
    """

    error: float
    name: str = ""
    norm: float = 0.0
    replayed: float = 0.0
    is_same_forward: bool | None = None


@dataclass(frozen=True)
class Evidence:
    """What one replay of the step, and one of a healthy batch on the same weights, have shown.

    Attributes:
        step: number of the decision, from 0.
        flow: of the step.
        norm: global gradient norm of its replay.
        healthy: flow of the previous healthy batch; None where there is none.
        healthy_norm: global gradient norm of that on the weights as they are now.
        norm_without_row: norm of the step's replay with the row that counts most replaced by another.
        is_place: whether in that replay the row that was put there has the largest part as well; None if not known.
        usual: gradient norms of the healthy steps before; None without any.
        weight_growths: of the weights.
        is_from_start: whether the weights have been seen before their first step.
        changed: how the gradients differ from those of the replay; None if not known.
        measured: gradient norm of the step itself; None where it can't be compared with a replay's.
        norm_under_number: that of the healthy batch, if the step is told that it has the number of its own batch.
        lost_at: the module that the alert says the gradient is lost at; "" if it says none.
        silent: names of parameters that the alert is about because their gradient is exactly zero.
        num_ranks: processes that share the batch; all norms here are of one rank's part, but those of `usual`.
    """

    step: int
    flow: Flow
    norm: float
    healthy: Flow | None = None
    healthy_norm: float | None = None
    norm_without_row: float | None = None
    is_place: bool | None = None
    usual: Usual | None = None
    weight_growths: tuple[WeightGrowth, ...] = ()
    is_from_start: bool = False
    changed: Changed | None = None
    measured: float | None = None
    norm_under_number: float | None = None
    lost_at: str = ""
    silent: tuple[str, ...] = ()
    num_ranks: int = 1

    def growth_of(self, name: str | None) -> WeightGrowth | None:
        """How a weight has moved."""
        return next((growth for growth in self.weight_growths if growth.name == name), None)

    @property
    def rise_of_weights(self) -> float | None:
        """How many times its usual norm the healthy batch's gradient has by now; None if not known."""
        if self.usual is None or self.healthy_norm is None or not self.usual.norm > 0.0:
            return None
        return self.healthy_norm / self.usual.norm


@dataclass(frozen=True)
class Cause:
    """Why gradients vanish or explode.

    Attributes:
        name: "activation", "batch", "cut", "dead", "decay", "foreign", "init", "input", "loss", "normalisation", "rate",
            "recurrence", "sample", "saturation", "step" or "weights".
        phase: "data", "weights", "forward" or "backward".
        message: one sentence, with figures.
        remedy: what to try.
        module: where it is, as far as it is at one place.
        samples: rows of the batch, where a replay has shown that it is these.
        probable_samples: rows that it may be, where none has.
        test: what shows whether it is this cause, where another fits too.
    """

    name: str
    phase: str
    message: str
    remedy: str
    module: str = ""
    samples: tuple[int, ...] | None = None
    probable_samples: tuple[int, ...] | None = None
    test: str = ""
