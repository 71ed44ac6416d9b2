"""One way of the gradient from a network's output to one of its first layers."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

from lightning_gradguard.forensics.flow.flow import Flow, Layer, Role


@dataclass(frozen=True)
class Path:
    """Layers of which each gets its input from the one before; the gradient runs through them from the last to the first.

    What the layers multiply by along one path comes to the gradient's norm at its beginning over that at its end, exactly.
    Factors of parallel branches are never multiplied with each other.

    Attributes:
        layers: from the input to the output, all with a gradient that is not zero.
    """

    layers: tuple[Layer, ...]

    @property
    def decades(self) -> float:
        """Powers of ten that the gradient's norm rises on the way back; negative where it fades."""
        return _log(self.layers[0]) - _log(self.layers[-1])

    @property
    def factors(self) -> list[tuple[Layer, float]]:
        """What each layer but the first multiplies the gradient's norm by, in powers of ten."""
        return [(layer, _log(before) - _log(layer)) for before, layer in itertools.pairwise(self.layers)]

    def of(self, *roles: Role) -> list[tuple[Layer, float]]:
        """The factors of layers with some roles."""
        return [(layer, decades) for layer, decades in self.factors if layer.role in roles]

    @property
    def weights(self) -> list[Layer]:
        """Layers with weights, from the input on."""
        return [layer for layer in self.layers if layer.role in ("weights", "recurrent")]

    @property
    def growth(self) -> float:
        """How many times larger the inputs of the last layer with weights are than those of the second one."""
        sizes = [layer.input_rms for layer in self.weights[1:] if layer.input_rms > 0.0]
        return sizes[-1] / sizes[0] if sizes else 1.0


def path_from(flow: Flow, start: Layer) -> Path:
    """The way from a layer to the output; where it forks, by where the larger gradient comes from."""
    consumers: dict[Layer, list[Layer]] = {}
    for layer in flow.layers:
        for before in layer.before:
            consumers.setdefault(before, []).append(layer)
    layers = [start]
    while True:
        after = [layer for layer in consumers.get(layers[-1], []) if _has_gradient(layer)]
        if not after:
            return Path(tuple(layers))
        layers.append(max(after, key=lambda layer: layer.grad_norm or 0.0))


def deepest_path(flow: Flow) -> Path | None:
    """The way to the output from the one of the first two layers with weights that has the smaller gradient.

    None where fewer than two layers have a gradient.
    """
    layers = [layer for layer in flow.of("weights", "recurrent") if _has_gradient(layer)]
    if len(layers) < 2:
        return None
    return path_from(flow, min(layers[:2], key=lambda layer: layer.grad_norm or 0.0))


def _has_gradient(layer: Layer) -> bool:
    return layer.grad_norm is not None and 0.0 < layer.grad_norm < math.inf


def _log(layer: Layer) -> float:
    assert layer.grad_norm
    return math.log10(layer.grad_norm)
