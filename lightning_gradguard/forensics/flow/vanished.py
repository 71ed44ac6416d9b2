"""Why gradients vanish: rules over what a replay has shown, the surest first."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from lightning_gradguard.forensics.flow.evidence import Cause, Evidence, median
from lightning_gradguard.forensics.flow.flow import Flow, Layer
from lightning_gradguard.forensics.flow.recurrence import recurrences

_DEAD = 0.99
_SATURATED = 0.5
_TINY = 1e-6
_DECADES = 2.0
_RELU_SLOPE = math.sqrt(0.5)


def vanished(evidence: Evidence) -> tuple[Cause, ...]:
    """All causes that fit, the surest first."""
    return tuple(cause for rule in _RULES if (cause := rule(evidence)) is not None)


def _dead(evidence: Evidence) -> Cause | None:
    found = [layer for layer in evidence.flow.of("activation") if layer.units is not None and layer.units.dead >= _DEAD]
    if not found:
        return None
    layer = found[-1]
    assert layer.units is not None
    source = _source(layer)
    return Cause(
        "dead",
        "forward",
        f"{layer.units.dead:.0%} of the units behind {source.name} give zero for every sample of the batch, and what is "
        "zero "
        "passes no gradient on",
        "Dead ReLU units don't come back by themselves. Take back the step that pushed them down (a lower learning rate, a "
        "warm-up), start biases at zero, or use a leaky ReLU or GELU.",
        source.module,
    )


def _no_weights(evidence: Evidence) -> Cause | None:
    layer = next((layer for layer in reversed(evidence.flow.of("weights")) if layer.gain == 0.0), None)
    if layer is None:
        return None
    return Cause(
        "init",
        "weights",
        f"all weights of {layer.name} are zero, so the chain rule multiplies by zero there",
        "Start from random weights: `torch.nn.init.kaiming_normal_` for ReLU, `xavier_normal_` for tanh. Zero is for "
        "biases, "
        "and for the last layer of a residual branch.",
        layer.module,
    )


def _saturated(evidence: Evidence) -> Cause | None:
    found = [
        layer
        for layer in evidence.flow.of("activation")
        if layer.units is not None and layer.units.saturated >= _SATURATED and layer.before
    ]
    if not found:
        return None
    worst = max(found, key=lambda layer: layer.units.saturated if layer.units is not None else 0.0)
    assert worst.units is not None
    source = _source(worst)
    others = f", as in {len(found) - 1} more" if len(found) > 1 else ""
    return Cause(
        "saturation",
        "forward",
        f"{worst.units.saturated:.0%} of the {worst.op} outputs behind {source.name} lie where the slope is below a "
        "tenth of its "
        f"best{others}; its inputs have an rms of {worst.input_rms:.3g}",
        "Keep what goes into the activation near zero: normalise the inputs, put a normalisation layer in front of it, "
        "start "
        "from smaller weights, lower the learning rate.",
        source.module,
    )


def _tiny_loss(evidence: Evidence) -> Cause | None:
    output = evidence.flow.output
    if output is None or output.grad_norm is None or output.grad_norm >= _TINY:
        return None
    return Cause(
        "loss",
        "backward",
        f"the gradient is tiny where it begins: its norm is {output.grad_norm:.2g} at the output of {output.name} already",
        "Look at the loss: a constant factor far below 1, a target that is met exactly, a probability that is 1. "
        "Multiply it, or "
        "scale it as a GradScaler does where a part runs in fp16.",
        output.module,
    )


def _recurrent(evidence: Evidence) -> Cause | None:
    found = next((one for one in recurrences(evidence.flow) if one.decades < -_DECADES), None)
    if found is None:
        return None
    return Cause(
        "recurrence",
        "backward",
        f"{found.layer.name} is applied {found.num_steps} times, and each step back in time multiplies the gradient by "
        f"{found.factor:.3g}: 10^{found.decades:.1f} over all of them",
        "Use an LSTM or GRU (its forget bias at 1), orthogonal recurrent weights, attention, or shorter sequences.",
        found.layer.module,
    )


def _cut(evidence: Evidence) -> Cause | None:
    weights = evidence.flow.of("weights", "recurrent")
    reached = [layer for layer in weights if layer.grad_norm]
    missed = [layer for layer in weights if not layer.grad_norm and weights.index(layer) < len(weights) - 1]
    if not reached or not missed:
        return None
    last = missed[-1]
    how = "no gradient" if last.grad_norm is None else "a gradient of exactly zero"
    return Cause(
        "cut",
        "backward",
        f"{how} arrives at the output of {last.name}, while later layers have one, and no unit in between is dead or "
        "saturated",
        "Look at what is done with its output: `detach()`, `no_grad`, `.data`, `argmax` or rounding cut a gradient; a "
        "gate, mask or "
        "loss weight of zero does too. If it is meant to be frozen, set `requires_grad=False`.",
        last.module,
    )


def _by_depth(evidence: Evidence) -> Cause | None:
    by_units, by_weights = losses_of(evidence.flow)
    lost_units, lost_weights = (-sum(math.log10(factor) for _, factor in part) for part in (by_units, by_weights))
    if lost_units + lost_weights < _DECADES / 2:
        return None
    if lost_units > lost_weights:
        worst = by_units[0][0]
        slopes = [layer.units.slope for layer, _ in by_units if layer.units is not None]
        slope = f", since its slope is {median(slopes):.2g} at most places" if slopes else ""
        typical = median([factor for _, factor in by_units])
        return Cause(
            "activation",
            "backward",
            f"each of {len(by_units)} {worst.op}s multiplies the gradient by about {typical:.2g}{slope}: "
            f"10^{-lost_units:.1f} over "
            f"all, against 10^{-lost_weights:.1f} by the weights between them",
            "Use ReLU, GELU or SiLU instead, residual connections, or normalisation before the activation.",
            worst.module,
        )
    layer = min(by_weights, key=lambda pair: pair[1])[0]
    typical = median([factor for _, factor in by_weights])
    gain = median([layer.gain for layer, _ in by_weights if layer.gain is not None] or [math.nan])
    return Cause(
        "init",
        "weights",
        f"the weights are too small: each of {len(by_weights)} layers multiplies the gradient by about {typical:.2g}, 10^"
        f"{-lost_weights:.1f} over all. Their standard deviation is {gain:.2g} / sqrt(inputs), where 1 (tanh) to 1.41 "
        "(ReLU) keeps "
        "its size",
        "Initialise with `torch.nn.init.kaiming_normal_` (ReLU) or `xavier_normal_` (tanh) instead of what is there "
        "(torch's "
        "default is 0.58), or add normalisation or residual connections.",
        layer.module,
    )


_RULES: tuple[Callable[[Evidence], Cause | None], ...] = (
    _no_weights, _dead, _saturated, _recurrent, _tiny_loss, _cut, _by_depth,
)  # fmt: skip


def losses_of(flow: Flow) -> tuple[list[tuple[Layer, float]], list[tuple[Layer, float]]]:
    """What activations and what layers of weights multiply the gradient by, against what would keep its size."""
    by_units = [(layer, factor / _usual(layer)) for layer, factor in _factors(flow) if layer.role == "activation"]
    by_weights = [(layer, factor * _usual(layer.before[0])) for layer, factor in _factors(flow) if layer.role == "weights"]
    return by_units, by_weights


def _factors(flow: Flow) -> Iterator[tuple[Layer, float]]:
    for layer in flow.layers:
        if layer.factor and math.isfinite(layer.factor):
            yield layer, layer.factor


def _usual(layer: Layer) -> float:
    """What an activation in order multiplies by; the weights after a ReLU are meant to make up for it."""
    return _RELU_SLOPE if layer.op == "relu" else 1.0


def _source(layer: Layer) -> Layer:
    """The layer of weights in front of an activation."""
    return next((before for before in layer.before if before.role != "activation"), layer)
