"""The factor that the chain rule multiplies once a step in time."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lightning_gradguard.forensics.flow.flow import Flow, Layer

_MIN_STEPS = 6


@dataclass(frozen=True)
class Recurrence:
    """A layer that is applied step after step.

    Attributes:
        layer: its first call.
        num_steps: how often.
        factor: by which the gradient's norm changes for one step back in time, over those where there is any.
    """

    layer: Layer
    num_steps: int
    factor: float

    @property
    def decades(self) -> float:
        """Powers of ten over all steps."""
        return (self.num_steps - 1) * math.log10(self.factor)


def recurrences(flow: Flow) -> list[Recurrence]:
    """All recurrences of a step, the strongest first."""
    found = [_of(layer, list(layer.times)) for layer in flow.of("recurrent") if len(layer.times) >= _MIN_STEPS]
    calls: dict[int, list[Layer]] = {}
    for layer in flow.of("weights"):
        if layer.weight is not None:
            calls.setdefault(layer.weight, []).append(layer)
    found += [
        _of(layers[0], [layer.grad_norm or 0.0 for layer in layers])
        for layers in calls.values()
        if len(layers) >= _MIN_STEPS
    ]
    return sorted((one for one in found if one is not None), key=lambda one: -abs(one.decades))


def _of(layer: Layer, norms: list[float]) -> Recurrence | None:
    present = [index for index, norm in enumerate(norms) if 0.0 < norm < math.inf]
    if len(present) < 2:
        return None
    first, last = present[0], present[-1]
    return Recurrence(layer, len(norms), (norms[first] / norms[last]) ** (1 / (last - first)))
