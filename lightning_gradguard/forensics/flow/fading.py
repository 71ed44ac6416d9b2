"""Why a gradient fades from layer to layer, all figures along one path."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median_high

from lightning_gradguard.forensics.flow.evidence import Cause, Evidence
from lightning_gradguard.forensics.flow.flow import Flow, Layer, source_of
from lightning_gradguard.forensics.flow.path import Path, deepest_path
from lightning_gradguard.forensics.flow.weight_history import WeightGrowth

_SATURATED = 0.5
_TOLD = 0.5  # decades
_DECADES = 2.0
_SHRUNK = 0.7
_PART_OF_DECAY = 0.5
_RELU_DECADES = math.log10(math.sqrt(0.5))

RANDOM_START = "Start from random weights: `torch.nn.init.kaiming_normal_` for ReLU, `xavier_normal_` for tanh."
TOWARDS_ZERO = (
    "Keep what goes into the activation near zero: normalise the inputs, put a normalisation layer in front of it, start "
    "from smaller weights, lower the learning rate."
)


def fading_by_depth(evidence: Evidence) -> Cause | None:
    """A fade from layer to layer, all figures along one path."""
    path = deepest_path(evidence.flow)
    if path is None:
        return None
    by_units, by_weights = losses_of(path)
    lost_units, lost_weights = (-sum(decades for _, decades in part) for part in (by_units, by_weights))
    saturated = [it for it, _ in by_units if it.units is not None and it.units.saturated >= _SATURATED]
    lost_saturated = -sum(decades for it, decades in by_units if it in saturated)
    if saturated and lost_saturated >= max(lost_units / 2, lost_weights, _at_least(path)):
        return _saturated(path, saturated, lost_saturated)
    if not _fades(evidence.flow, path):
        return None
    if lost_units > lost_weights:
        return _activation(evidence, path, by_units)
    return _weak_weights(evidence, path, by_weights) if by_weights else None


def _at_least(path: Path) -> float:
    """Powers of ten that saturated functions must take for it to matter; other layers may make up for a part of it."""
    return _DECADES / 2 if path.decades <= -_DECADES / 2 else _DECADES if path.decades < 0.0 else math.inf


def _fades(flow: Flow, path: Path) -> bool:
    """Whether the gradient of the first two layers is a hundredth of that at the end of the path."""
    end = path.layers[-1]
    first = [layer.grad_norm for layer in flow.of("weights", "recurrent") if layer.grad_norm and layer is not end][:2]
    return bool(end.grad_norm) and max(first, default=math.inf) < (end.grad_norm or 0.0) / 10**_DECADES


def losses_of(path: Path) -> tuple[list[tuple[Layer, float]], list[tuple[Layer, float]]]:
    """What activations and weights multiply by along a path, in powers of ten, against what would keep the size."""
    by_units = [(layer, decades - _usual(layer)) for layer, decades in path.of("activation")]
    by_weights = [(layer, decades + _usual(layer.before[0])) for layer, decades in path.of("weights") if layer.before]
    return by_units, by_weights


def _usual(layer: Layer) -> float:
    """What an activation in order multiplies by, in powers of ten; the weights after a ReLU are meant to make up for it."""
    return _RELU_DECADES if layer.op == "relu" else 0.0


def _fall(path: Path) -> str:
    first, last = path.layers[0], path.layers[-1]
    return f"from {last.name} to {first.name} its norm falls from {last.grad_norm:.2g} to {first.grad_norm:.2g}"


def _rest(path: Path, told: float) -> str:
    """What else is on the path, where it is enough to be missed: the figures of a sentence should multiply to its end."""
    rest = path.decades - told
    return f", and 10^{rest:.1f} by all else" if abs(rest) >= _TOLD else ""


def _place(evidence: Evidence, path: Path) -> str:
    """Where the alert says that the gradient is lost, if that is on the path; else where it begins to be a thousandth."""
    if any(layer.module == evidence.lost_at for layer in path.layers):
        return evidence.lost_at
    begin = path.layers[-1].grad_norm or 0.0
    lost = (layer for layer in reversed(path.weights) if (layer.grad_norm or 0.0) < begin / 1e3)
    return next(lost, path.layers[0]).module


def _saturated(path: Path, found: Sequence[Layer], lost: float) -> Cause:
    worst = max(found, key=lambda layer: layer.units.saturated if layer.units is not None else 0.0)
    assert worst.units is not None
    source = source_of(worst)
    others = f", as in {len(found) - 1} more" if len(found) > 1 else ""
    return Cause(
        "saturation",
        "forward",
        f"{worst.units.saturated:.0%} of the {worst.op} outputs behind {source.name} lie where the slope is below a tenth "
        f"of its best{others}; its inputs have an rms of {worst.input_rms:.3g}. Such functions multiply the gradient by "
        f"10^{-lost:.1f} over all; {_fall(path)}",
        TOWARDS_ZERO,
        source.module,
        test="with inputs a tenth as large in front of the activation the gradient is larger",
    )


def _activation(evidence: Evidence, path: Path, by_units: Sequence[tuple[Layer, float]]) -> Cause:
    ops = {layer.op for layer, _ in by_units}
    what = f"{ops.pop()}s" if len(ops) == 1 else "activation functions"
    slopes = [layer.units.slope for layer, _ in by_units if layer.units is not None]
    slope = f", since its slope is {median_high(slopes):.2g}" if slopes else ""
    raw = path.of("activation")
    units, weights = sum(decades for _, decades in raw), sum(decades for _, decades in path.of("weights"))
    return Cause(
        "activation",
        "backward",
        f"each of {len(raw)} {what} multiplies the gradient by about {10 ** (units / len(raw)):.2g}{slope}: "
        f"10^{units:.1f} over all, against 10^{weights:.1f} by the weights between them{_rest(path, units + weights)}; "
        f"{_fall(path)}",
        "Use ReLU, GELU or SiLU instead, residual connections, or normalisation before the activation.",
        _place(evidence, path),
        test="with ReLU in its place the gradient is larger",
    )


def _weak_weights(evidence: Evidence, path: Path, by_weights: Sequence[tuple[Layer, float]]) -> Cause:
    layers = [layer for layer, _ in by_weights]
    raw = [decades for _, decades in path.of("weights")]
    gain = median_high([layer.gain for layer in layers if layer.gain is not None] or [math.nan])
    small = (
        f"the weights are too small: each of {len(raw)} layers multiplies the gradient by about "
        f"{10 ** (sum(raw) / len(raw)):.2g}, 10^{sum(raw):.1f} over all{_rest(path, sum(raw))}; {_fall(path)}. "
        f"The standard deviation of the weights is {gain:.2g} / sqrt(inputs), "
        "where 1 (tanh) to 1.41 (ReLU) keeps a signal's size"
    )
    place = _place(evidence, path)
    growths = [growth for layer in layers if (growth := evidence.growth_of(layer.weight)) is not None]
    shrunk = [since for growth in growths if (since := growth.since_start) is not None]
    if not evidence.is_from_start or not shrunk:
        return Cause(
            "weights",
            "weights",
            f"{small}; how large they were before the first step is not known",
            "Compare with the weights at the beginning: if they were as small, initialise them larger; if not, look for a "
            "weight decay that is too strong.",
            place,
        )
    if median_high(shrunk) >= _SHRUNK:
        return Cause(
            "init",
            "weights",
            f"{small}, and it was {gain / median_high(shrunk):.2g} before the first step",
            f"{RANDOM_START} Torch's own default is 0.58. Or add normalisation or residual connections.",
            place,
            test="the first step has the same fade at a learning rate of zero",
        )
    return _shrunk(evidence, f"{small}; before the first step it was {gain / median_high(shrunk):.2g}", place, layers)


def _shrunk(evidence: Evidence, small: str, place: str, layers: Sequence[Layer]) -> Cause:
    """Weights that were in order before the first step."""
    growths = [growth for layer in layers if (growth := evidence.growth_of(layer.weight)) is not None]
    decays = [growth.weight_decay for growth in growths if growth.weight_decay > 0.0]
    if not decays:
        return Cause(
            "weights",
            "weights",
            f"{small}, and the optimizer has no weight decay",
            "Look for what makes them smaller: a penalty in the loss, a pruning, a hook that rescales them.",
            place,
        )
    part = _part_of_decay(growths)
    if part is None:
        return Cause(
            "weights",
            "weights",
            f"{small}; the weight decay of {median_high(decays):g} is too weak for that",
            "Look for what else makes them smaller: a penalty in the loss, a pruning, a hook that rescales them.",
            place,
            test="without weight decay they shrink as well",
        )
    return Cause(
        "decay",
        "weights",
        f"{small}. The optimizer's `weight_decay={median_high(decays):g}` {part}",
        "Lower the weight decay, or leave it out where the loss hardly pulls against it. With Adam use AdamW: there a decay "
        "is not divided by the size of the gradient.",
        place,
        test="without weight decay they keep their size",
    )


def _part_of_decay(growths: Sequence[WeightGrowth]) -> str | None:
    """What weight decay has to do with weights that have shrunk; None if it is too weak to have shrunk them."""
    parts = [
        math.log(growth.decayed) / math.log(growth.since_start)
        for growth in growths
        if growth.decayed and growth.since_start and growth.since_start < 1.0
    ]
    if parts:
        shrinks = 10 ** median_high([math.log10(growth.decayed) for growth in growths if growth.decayed])
        return f"alone multiplies them by {shrinks:.2g} in that time" if median_high(parts) >= _PART_OF_DECAY else None
    pulls = [growth.pull for growth in growths if growth.pull is not None]
    if not pulls or median_high(pulls) < 1.0:
        return None
    return f"pulls at them {median_high(pulls):.2g} times as hard as the loss does"
