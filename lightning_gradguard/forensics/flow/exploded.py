"""Why gradients explode: rules over what replays have shown, the surest first."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from lightning_gradguard.forensics.flow.evidence import Cause, Evidence, median
from lightning_gradguard.forensics.flow.flow import Flow, Layer
from lightning_gradguard.forensics.flow.recurrence import recurrences

_FOREIGN = 0.1
_BY_DATA = 3.0
_TOP_SHARE = 0.5
_RECURRENT_DECADES = 1.0
_EARLY = 40
_LARGE_GAIN = 2.5
_JUMP = 1.3
_RATE = 0.03


def exploded(evidence: Evidence) -> tuple[Cause, ...]:
    """All causes that fit, the surest first.

    None of them is "the layer with the largest gradient": that was the culprit in 0 of 12 cases.
    """
    return tuple(cause for rule in _RULES if (cause := rule(evidence)) is not None)


def _foreign(evidence: Evidence) -> Cause | None:
    if evidence.error is None or evidence.error < _FOREIGN:
        return None
    return Cause(
        "foreign",
        "backward",
        f"the same step run again gives other gradients (they differ by {evidence.error:.2g} of their norm, most in "
        f"`{evidence.differing}`), so they were not made by its forward and backward pass alone",
        "Look for what changes gradients after the backward pass: a hook, a callback, a custom clipping or scaling, a "
        "collective. A "
        "module that keeps state from batch to batch can have the same effect.",
        evidence.differing,
    )


def _data(evidence: Evidence) -> Cause | None:
    before = evidence.healthy_norm
    if before is None or not evidence.norm > _BY_DATA * before:
        return None
    ratio = f"on the same weights the previous healthy batch gives a norm of {before:.3g}, this one {evidence.norm:.3g}"
    found = _top_row(evidence.flow)
    if found is not None:
        row, share, size = found
        return Cause(
            "sample",
            "data",
            f"{ratio}, and row {row} alone makes {share:.0%} of it ({1 / size:.0%} would be its part)",
            "Look at this sample: a wrong label, another unit, a broken file. A robust loss (Huber) or clipping bounds "
            "what one "
            "sample can do.",
            "batch",
            (row,),
        )
    change = _scale_change(evidence.flow, evidence.healthy)
    return Cause(
        "batch",
        "data",
        f"{ratio}; no single row makes it{change}",
        "Look at how this batch was made: a missing normalisation, another source or unit, a changed distribution. Clip "
        "with "
        '`clip=`, or skip with `explosion="skip"`, until it is found.',
        "batch",
    )


def _top_row(flow: Flow) -> tuple[int, float, int] | None:
    """The row that makes most of the gradient, its share, and the number of rows; None if no single one does."""
    layers = [layer.rows for layer in flow.layers if layer.rows is not None and len(layer.rows) > 2]
    if not layers:
        return None
    rows = max(layers, key=lambda rows: sum(row * row for row in rows))
    total = sum(row * row for row in rows)
    row = max(range(len(rows)), key=lambda index: rows[index])
    share = rows[row] ** 2 / total if total > 0.0 else 0.0
    return (row, share, len(rows)) if share >= max(_TOP_SHARE, 2 / len(rows)) else None


def _scale_change(flow: Flow, healthy: Flow | None) -> str:
    if healthy is None or not flow.layers or not healthy.layers:
        return ""
    now, before = flow.layers[0].input_rms, healthy.layers[0].input_rms
    if not (math.isfinite(now) and math.isfinite(before) and before > 0.0 and not 0.5 < now / before < 2.0):
        return ""
    return f". Its inputs have an rms of {now:.3g} instead of {before:.3g}"


def _recurrent(evidence: Evidence) -> Cause | None:
    found = next((one for one in recurrences(evidence.flow) if one.decades > _RECURRENT_DECADES), None)
    if found is None:
        return None
    return Cause(
        "recurrence",
        "backward",
        f"{found.layer.name} is applied {found.num_steps} times, and each step back in time multiplies the gradient by "
        f"{found.factor:.3g}: {10**found.decades:.3g} times over all of them",
        "Clip with `clip=1.0`, start from orthogonal recurrent weights, use an LSTM or GRU, or cut the sequence (truncated "
        "back-propagation).",
        found.layer.module,
    )


def _moved(evidence: Evidence) -> Cause | None:
    found = [growth for growth in evidence.weight_growths if growth.jump > _JUMP and growth.before]
    if not found:
        return None
    worst = max(found, key=lambda growth: growth.jump)
    assert worst.before
    others = f", and {len(found) - 1} others like it" if len(found) > 1 else ""
    return Cause(
        "weights",
        "weights",
        f"`{worst.name}` has grown from a norm of {worst.before:.3g} to {worst.norm:.3g} within {worst.num_steps} "
        f"steps{others}; the "
        f"optimizer's updates (of norm {worst.update:.2g}) don't explain it",
        "Something else writes to the weights: a wrong sign in a decay, a hook, a checkpoint loaded halfway, a broken "
        "memory. Go "
        "back to the last good checkpoint.",
        worst.name,
    )


def _init(evidence: Evidence) -> Cause | None:
    gains = [layer.gain for layer in evidence.flow.of("weights") if layer.gain is not None]
    # Updates may have made them large since.
    grown = median(
        [growth.norm / growth.before for growth in evidence.weight_growths if growth.before and growth.is_matrix] or [1.0]
    )
    if evidence.step >= _EARLY or not gains or median(gains) / max(grown, 1.0) < _LARGE_GAIN:
        return None
    growth = _growth(evidence.flow.of("weights"))
    return Cause(
        "init",
        "weights",
        f"the weights are too large from the start: their standard deviation is {median(gains):.2g} / sqrt(inputs), "
        "where 1 (tanh) "
        f"to 1.41 (ReLU) keeps a signal's size; over {len(gains)} layers it grows {growth:.3g} times",
        "Initialise with `torch.nn.init.kaiming_normal_` (ReLU) or `xavier_normal_` (tanh), or add normalisation.",
    )


def _unnormalised(evidence: Evidence) -> Cause | None:
    weights = list({layer.weight: layer for layer in evidence.flow.of("weights") if layer.weight is not None}.values())
    growth = _growth(weights)
    if evidence.flow.of("norm") or len(weights) < 8 or growth < 10.0:
        return None
    gains = [layer.gain for layer in weights if layer.gain is not None]
    if gains and median(gains) >= _LARGE_GAIN:
        return None
    return Cause(
        "normalisation",
        "forward",
        f"activations grow {growth:.3g} times over {len(weights)} layers, none of which is a normalisation, although the "
        "weights "
        f"have an ordinary size (standard deviation {median(gains or [math.nan]):.2g} / sqrt(inputs))",
        "Put LayerNorm, RMSNorm or BatchNorm in front of each block, or let residual branches start small (zero the last "
        "layer of "
        "each, or divide by the square root of their number).",
    )


def _growth(weights: Sequence[Layer]) -> float:
    sizes = [layer.input_rms for layer in weights[1:] if layer.input_rms > 0.0]
    return sizes[-1] / sizes[0] if sizes else 1.0


def _rate(evidence: Evidence) -> Cause | None:
    matrices = [growth for growth in evidence.weight_growths if growth.is_matrix]
    if not matrices:
        return None
    worst = max(matrices, key=lambda growth: growth.rate)
    if worst.rate < _RATE:
        return None
    return Cause(
        "rate",
        "weights",
        f"the last update changed `{worst.name}` by {worst.rate:.2g} of its norm; a thousandth is usual, and the "
        "previous healthy "
        "batch gives as large a gradient on these weights",
        "Lower the learning rate, or warm it up for longer; clipping with `clip=` bounds a single step.",
        worst.name,
    )


_RULES: tuple[Callable[[Evidence], Cause | None], ...] = (
    _foreign, _data, _recurrent, _init, _unnormalised, _moved, _rate,
)  # fmt: skip
