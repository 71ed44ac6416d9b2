"""Why gradients vanish: rules over what a replay has shown, the surest first."""

from __future__ import annotations

import math

from lightning_gradguard.forensics.flow.evidence import Cause, Evidence
from lightning_gradguard.forensics.flow.fading import RANDOM_START, TOWARDS_ZERO, fading_by_depth
from lightning_gradguard.forensics.flow.flow import Flow, Layer, ancestors_of, source_of
from lightning_gradguard.forensics.flow.recurrence import Recurrence, recurrences

_DEAD = 0.99
_TINY = 1e-6
_DECADES = 2.0
_UNDERFLOW = 1e-30
_UNGATED = "Use an LSTM or GRU (its forget bias at 1), orthogonal recurrent weights, attention, or shorter sequences."
_GATED = "Start with the bias of its {} gate at 1 or above, or use attention or shorter sequences."


def vanishing_causes(evidence: Evidence) -> tuple[Cause, ...]:
    """All causes that fit, the surest first; none where the gradient reaches all layers in a size that can be felt."""
    found = _zero_input(evidence) or _of_no_gradient(evidence)
    if found is not None:
        return (found,)
    if evidence.silent and not _has_underflowed(evidence.flow):
        return ()  # what only makes gradients smaller is not why they are exactly zero
    in_time = _recurrent(evidence)
    by_depth = fading_by_depth(evidence)
    return tuple(cause for cause in (in_time, by_depth) if cause is not None)


def _of_no_gradient(evidence: Evidence) -> Cause | None:
    """Why no gradient arrives at a layer, or hardly one at any."""
    cut_off, last = _first_without_gradient(evidence.flow), _last_without_gradient(evidence.flow)
    found = None
    if cut_off is not None:
        found = _zero_weights(evidence, cut_off) or _dead(evidence, cut_off) or _flat(evidence, cut_off)
    if found is None and last is not None:
        found = _flat(evidence, last)
    if found is None:
        found = _tiny_loss(evidence)
    return _cut(cut_off) if found is None and cut_off is not None and not _has_underflowed(evidence.flow) else found


def _zero_input(evidence: Evidence) -> Cause | None:
    """Weights whose gradient is zero although one arrives at their layer's output, since nothing goes into it."""
    layers = [layer for layer in evidence.flow.of("weights") if layer.weight in evidence.silent]
    if not layers or not all(layer.input_rms == 0.0 and layer.grad_norm for layer in layers):
        return None
    layer = layers[0]
    others = len({it.weight for it in layers}) - 1
    return Cause(
        "input",
        "forward",
        f"all that goes into {layer.name} is zero, and a weight's gradient is its input times the gradient at the output, "
        f"which has a norm of {layer.grad_norm:.2g} there" + (f"; so it is with {others} more" if others else ""),
        "Look at what makes this input: features that are never given, a mask, units that give zero. If the part is not in "
        "use, leave it out, or freeze it by `requires_grad=False`.",
        layer.module,
    )


def _first_without_gradient(flow: Flow) -> Layer | None:
    """The last layer in forward order that trains, gets no gradient or one of zero, and has one behind it that does."""
    layers = [layer for layer in flow.of("weights", "recurrent") if layer.is_trained]
    if not any(layer.grad_norm for layer in layers):
        return None
    return next((layer for layer in reversed(layers[:-1]) if not layer.grad_norm), None)


def _last_without_gradient(flow: Flow) -> Layer | None:
    """The last layer that trains, where none that does has a gradient, although one begins."""
    layers = [layer for layer in flow.of("weights", "recurrent") if layer.is_trained]
    begins = any(layer.grad_norm for layer in flow.layers)
    return layers[-1] if layers and begins and not any(layer.grad_norm for layer in layers) else None


def _has_underflowed(flow: Flow) -> bool:
    """Whether a gradient has become so small before it was zero that it is no cut, but the end of a fade."""
    smallest = min((layer.grad_norm for layer in flow.layers if layer.grad_norm), default=math.inf)
    return smallest < _UNDERFLOW


def _after(flow: Flow, layer: Layer) -> list[Layer]:
    """Layers that get their input from this one, directly or not, nearest first."""
    return [later for later in flow.layers if layer in ancestors_of(later.before)]


def _zero_weights(evidence: Evidence, cut_off: Layer) -> Cause | None:
    layer = next((later for later in _after(evidence.flow, cut_off) if later.gain == 0.0), None)
    if layer is None:
        return None
    growth = evidence.growth_of(layer.weight)
    zero = f"all weights of {layer.name} are zero, so the chain rule multiplies by zero there"
    if growth is not None and growth.start:
        return Cause(
            "weights",
            "weights",
            f"{zero}; they had a norm of {growth.start:.3g} when this run began",
            "Look for what sets them to zero: pruning, a mask, a hook, a checkpoint loaded halfway. Go back to the last "
            "good checkpoint.",
            layer.module,
        )
    return Cause(
        "init",
        "weights",
        zero,
        f"{RANDOM_START} Zero is for biases, and for the last layer of a residual branch.",
        layer.module,
    )


def _dead(evidence: Evidence, cut_off: Layer) -> Cause | None:
    after = [it for it in _after(evidence.flow, cut_off) if it.units is not None and it.units.dead >= _DEAD]
    if not after:
        return None
    layer = after[-1]
    assert layer.units is not None
    source = source_of(layer)
    behind = "" if source is cut_off else f", so none arrives at {cut_off.name}"
    return Cause(
        "dead",
        "forward",
        f"{layer.units.dead:.0%} of the units behind {source.name} give zero for every sample of the batch, and what is "
        f"zero passes no gradient on{behind}",
        "Dead ReLU units don't come back by themselves. Take back the step that pushed them down (a lower learning rate, a "
        "warm-up), start biases at zero, or use a leaky ReLU or GELU.",
        source.module,
    )


def _flat(evidence: Evidence, cut_off: Layer) -> Cause | None:
    """Activations so far from zero that their slope is none at all."""
    after = (it for it in _after(evidence.flow, cut_off) if it.units is not None and it.grad_norm)
    layer = next((it for it in after if it.units is not None and it.units.slope == 0.0 and it.units.saturated == 1.0), None)
    if layer is None:
        return None
    source = source_of(layer)
    return Cause(
        "saturation",
        "forward",
        f"all {layer.op} outputs behind {source.name} lie where its slope is rounded to zero; its inputs have an rms of "
        f"{layer.input_rms:.3g}",
        TOWARDS_ZERO,
        source.module,
    )


def _tiny_loss(evidence: Evidence) -> Cause | None:
    output = evidence.flow.output
    if output is None or not output.grad_norm or output.grad_norm >= _TINY:
        return None
    return Cause(
        "loss",
        "backward",
        f"the gradient is tiny where it begins: its norm is {output.grad_norm:.2g} at the output of {output.name} already",
        "Look at the loss: a constant factor far below 1, a target that is met exactly, a probability that is 1. Multiply "
        "it, or scale it as a GradScaler does where a part runs in fp16.",
        output.module,
    )


def _cut(layer: Layer) -> Cause:
    how = "no gradient" if layer.grad_norm is None else "a gradient of exactly zero"
    return Cause(
        "cut",
        "backward",
        f"{how} arrives at the output of {layer.name}, while other layers have one, and no layer of dead units or zero "
        "weights is in between",
        "Look at what is done with its output: `detach()`, `no_grad`, `.data`, `argmax` or rounding cut a gradient; a gate, "
        "mask or loss weight of zero does too. If it is meant to be frozen, set `requires_grad=False`.",
        layer.module,
    )


def _recurrent(evidence: Evidence) -> Cause | None:
    found = next((one for one in recurrences(evidence.flow) if one.decades < -_DECADES), None)
    return None if found is None else vanishing_in_time(found)


def vanishing_in_time(found: Recurrence) -> Cause:
    """The cause, for a recurrence whose gradient fades."""
    zero = "" if found.early == 0 or found.layer.is_bidirectional else ", and exactly zero before"
    gate = "forget" if found.layer.op.startswith("lstm") else "update"
    remedy = _GATED.format(gate) if found.has_gates else _UNGATED
    return Cause(
        "recurrence",
        "backward",
        f"{found.layer.name} is applied {found.num_steps} times, and each step back in time multiplies the gradient by "
        f"about {found.factor:.3g}: its norm is {found.late_norm:.2g} at step {found.late} and {found.early_norm:.2g} at "
        f"step {found.early}{zero}",
        f"{remedy} Where only the last few steps matter to the task, nothing needs to be done.",
        found.layer.module,
        test="shorter sequences have larger gradients at their beginning",
    )
