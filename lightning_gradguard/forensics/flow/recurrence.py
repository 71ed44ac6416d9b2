"""What the chain rule multiplies by at each step back in time."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from lightning_gradguard.forensics.flow.flow import Flow, Layer, ancestors_of

_MIN_STEPS = 6


@dataclass(frozen=True)
class Recurrence:
    """A layer that is applied step after step.

    Attributes:
        layer: its first call.
        num_steps: how often.
        early: the step closest to the beginning at which there is a gradient.
        late: a later one, where the gradient comes from.
        early_norm, late_norm: norm of the gradient at these.
    """

    layer: Layer
    num_steps: int
    early: int
    late: int
    early_norm: float
    late_norm: float

    @property
    def decades(self) -> float:
        """Powers of ten from the late step to the early one."""
        return math.log10(self.early_norm) - math.log10(self.late_norm)

    @property
    def has_gates(self) -> bool:
        """Whether it is an LSTM or a GRU."""
        return self.layer.op.startswith(("lstm", "gru"))

    @property
    def factor(self) -> float:
        """By which the gradient's norm changes for one step back in time, on average over those between."""
        return float(10.0 ** (self.decades / abs(self.late - self.early)))


def recurrences(flow: Flow) -> list[Recurrence]:
    """All recurrences of a step, the strongest first."""
    found = [_of(layer, layer.times) for layer in flow.of("recurrent")]
    calls: dict[str, list[Layer]] = {}
    for layer in flow.of("weights"):
        if layer.weight is not None:
            calls.setdefault(layer.weight, []).append(layer)
    found += [_of(layers[0], [layer.grad_norm or 0.0 for layer in layers]) for layers in calls.values() if _is_chain(layers)]
    return sorted((one for one in found if one is not None), key=lambda one: -abs(one.decades))


def _is_chain(calls: Sequence[Layer]) -> bool:
    """Whether each call gets what the one before made; a network that is applied to several inputs is none."""
    enough = len(calls) >= _MIN_STEPS
    return enough and all(earlier in ancestors_of(later.before) for earlier, later in itertools.pairwise(calls))


def _of(layer: Layer, norms: Sequence[float]) -> Recurrence | None:
    present = [index for index, norm in enumerate(norms) if 0.0 < norm < math.inf]
    if len(norms) < _MIN_STEPS or len(present) < 2:
        return None
    first, last, peak = present[0], present[-1], max(present, key=lambda index: norms[index])
    if layer.is_bidirectional:  # it comes in from both ends
        first = min(present, key=lambda index: norms[index])
    # It fades from its peak on the way back to the first step, or grows from the last step to its peak.
    pairs = [(first, peak), *([] if layer.is_bidirectional else [(peak, last)])]
    found = [Recurrence(layer, len(norms), early, late, norms[early], norms[late]) for early, late in pairs if early != late]
    return max(found, key=lambda one: abs(one.decades), default=None)
