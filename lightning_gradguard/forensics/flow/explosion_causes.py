"""Why gradients explode: rules over what replays have shown, the surest first."""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import median_high

from lightning_gradguard.forensics.flow.evidence import Cause, Evidence
from lightning_gradguard.forensics.flow.flow import Flow, Layer
from lightning_gradguard.forensics.flow.path import deepest_path
from lightning_gradguard.forensics.flow.recurrence import recurrences

_CHANGED_BY = 0.1
_LARGER = 2.0
_BY_DATA = 3.0
_BY_WEIGHTS = 3.0
_TOP_SHARE = 0.5
_RECURRENT_DECADES = 1.0
_EARLY = 40
_LARGE_GAIN = 2.5
_GROWS = 10.0
_JUMP = 1.3
_EXCESS = 0.01
_RATE = 0.03


def explosion_causes(evidence: Evidence) -> tuple[Cause, ...]:
    """All causes that fit, the surest first; none where the step's gradient is one that healthy steps had too.

    None of them is "the layer with the largest gradient": that was the culprit in 0 of 12 cases.
    """
    changed = _changed(evidence)
    if changed is not None:
        return (changed,)
    usual = evidence.usual
    if usual is not None and usual.holds(evidence.norm):
        return ()
    causes = tuple(cause for rule in _RULES if (cause := rule(evidence)) is not None)
    # What somebody else has written moves the weights as far as a rate that is too high would.
    is_written = any(cause.name == "weights" for cause in causes)
    return tuple(cause for cause in causes if not (is_written and cause.name == "rate"))


def _changed(evidence: Evidence) -> Cause | None:
    """Gradients that are larger than the step's own passes make them."""
    found = evidence.changed
    if found is None or found.error < _CHANGED_BY or found.is_same_forward is False:
        return None
    if not found.norm > _LARGER * found.replayed:
        return None
    same = ", although the loss is the same" if found.is_same_forward else ""
    return Cause(
        "foreign",
        "backward",
        f"the same step run again gives `{found.name}` a gradient of norm {found.replayed:.3g} instead of "
        f"{found.norm:.3g}{same}: its forward and backward pass alone do not make this gradient",
        "Look for what changes gradients after the backward pass: a hook, a callback, a clipping or scaling of your own, a "
        "collective."
        + ("" if found.is_same_forward else " A module that keeps state from batch to batch can have the same effect."),
        found.name,
    )


def _data(evidence: Evidence) -> Cause | None:
    """The step's batch gives a large gradient where another gives an ordinary one on the same weights."""
    before, usual = evidence.healthy_norm, evidence.usual
    # A replay that is not the same step may give more.
    norm = evidence.norm if evidence.measured is None else min(evidence.norm, evidence.measured)
    if not before or not norm > _BY_DATA * before or (usual is not None and usual.has_had(norm)):
        return None
    rise = evidence.rise_of_weights
    if rise is not None and rise > 1.0 and norm / before < rise:
        return None  # the weights have more to do with it than the batch
    same = f"on the same weights the previous healthy batch gives a norm of {before:.3g}, this one {norm:.3g}"
    sample = _sample(evidence, same)
    if sample is None and (numbered := evidence.norm_under_number) is not None and numbered > _BY_DATA * before:
        return Cause(
            "step",
            "forward",
            f"{same}; under the number of this one the healthy batch gives {numbered:.3g} as well: it is what the step does "
            "at this number, and not what is in the batch",
            "Look at what `training_step` does from this batch on: a loss weight or temperature that changes, a module that "
            "is switched or written to, a hook.",
            test="with the other batches the step is as bad from this number on",
        )
    return sample or Cause(
        "batch",
        "data",
        f"{same}{_without_row(evidence)}{_scale_change(evidence.flow, evidence.healthy)}",
        "Look at how this batch was made: a missing normalisation, another source or unit, a changed distribution, a loss "
        "that is scaled differently from here on.",
        "batch",
        test="without this batch the run goes on as before",
    )


def _sample(evidence: Evidence, same: str) -> Cause | None:
    """One row without whose part the batch is in order."""
    found, rest, before = top_row(evidence.flow), evidence.norm_without_row, evidence.healthy_norm
    if found is None or before is None:
        return None
    row, share, size = found
    probably = "probably " if rest is None else ""
    alone = f"{same}, and row {row} alone {probably}makes {share:.0%} of it ({1 / size:.0%} would be its part)"
    remedy = (
        "Look at this sample: a wrong label, another unit, a broken file. A robust loss (Huber) bounds what one sample "
        "can do."
    )
    if rest is not None and rest <= _BY_DATA * before:
        alone += f"; with another row in its place the norm is {rest:.3g}"
    elif evidence.norm * math.sqrt(max(1.0 - share, 0.0)) > _BY_DATA * before or evidence.is_place is False:
        return None
    elif rest is not None:
        alone += (
            f"; with another row in its place the norm is {rest:.3g}, of which that row makes most: it is how the step "
            "treats this place"
        )
        remedy = f"Look at what the step does with row {row}: a weight, a mask, a target that is made there."
    certain, probable = (None, (row,)) if rest is None else ((row,), None)
    test = "without this row the batch is in order"
    return Cause("sample", "data", alone, remedy, "batch", certain, probable, test)


def top_row(flow: Flow) -> tuple[int, float, int] | None:
    """The row that makes most of the gradient, its share, and the number of rows; None if no single one does."""
    layers = [layer.rows for layer in flow.layers if layer.rows is not None and len(layer.rows) > 2]
    if not layers:
        return None
    rows = max(layers, key=lambda rows: sum(row * row for row in rows))
    total = sum(row * row for row in rows)
    row = max(range(len(rows)), key=lambda index: rows[index])
    share = rows[row] ** 2 / total if total > 0.0 else 0.0
    return (row, share, len(rows)) if share >= max(_TOP_SHARE, 2 / len(rows)) else None


def with_row_replaced(row: int, size: int) -> list[int]:
    """The rows of a batch with one of them replaced by its neighbour.

    >>> with_row_replaced(2, 4)
    [0, 1, 1, 3]
    """
    return [index if index != row else (row - 1 if row else 1) for index in range(size)]


def _without_row(evidence: Evidence) -> str:
    found, rest = top_row(evidence.flow), evidence.norm_without_row
    if found is None or rest is None:
        return ""
    return f", and still {rest:.3g} without row {found[0]}, which has the largest part"


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
        f"about {found.factor:.3g}: its norm is {found.late_norm:.3g} at step {found.late} and {found.early_norm:.3g} at "
        f"step {found.early}",
        f"Start from orthogonal recurrent weights{'' if found.has_gates else ', use an LSTM or GRU'}, or cut the sequence "
        "(truncated back-propagation).",
        found.layer.module,
        test="shorter sequences have smaller gradients",
    )


def _init(evidence: Evidence) -> Cause | None:
    """Weights that were too large before the first step."""
    path = deepest_path(evidence.flow)
    if path is None or not _is_early(evidence) or not evidence.is_from_start:
        return None
    gains = [gain for layer in path.weights if (gain := _gain_at_start(evidence, layer)) is not None]
    if not gains or median_high(gains) < _LARGE_GAIN or max(path.growth, 10**path.decades) < _GROWS:
        return None
    return Cause(
        "init",
        "weights",
        f"the weights were too large before the first step: their standard deviation was {median_high(gains):.2g} / "
        f"sqrt(inputs), where 1 (tanh) to 1.41 (ReLU) keeps a signal's size; over {len(path.weights)} layers the signal "
        f"grows {path.growth:.3g} times on its way forward, and the gradient {10**path.decades:.3g} times on its way back",
        "Initialise with `torch.nn.init.kaiming_normal_` (ReLU) or `xavier_normal_` (tanh), or add normalisation.",
        path.weights[0].module,
        test="the first step has the same gradient at a learning rate of zero",
    )


def _gain_at_start(evidence: Evidence, layer: Layer) -> float | None:
    growth = evidence.growth_of(layer.weight)
    since = None if growth is None else growth.since_start
    return layer.gain / since if layer.gain is not None and since else None


def _is_early(evidence: Evidence) -> bool:
    """Whether the network has hardly been trained, so that what it began with is still there."""
    rise = evidence.rise_of_weights
    return evidence.step < _EARLY and (rise is None or rise < _BY_WEIGHTS)


def _unnormalised(evidence: Evidence) -> Cause | None:
    path = deepest_path(evidence.flow)
    if path is None or not _is_early(evidence) or evidence.flow.of("norm"):
        return None
    weights = list({layer.weight: layer for layer in path.weights if layer.weight is not None}.values())
    gains = [layer.gain for layer in weights if layer.gain is not None]
    if len(weights) < 8 or path.growth < _GROWS or not gains or median_high(gains) >= _LARGE_GAIN:
        return None
    return Cause(
        "normalisation",
        "forward",
        f"activations grow {path.growth:.3g} times over {len(weights)} layers, none of which is a normalisation, although "
        f"the weights have an ordinary size (standard deviation {median_high(gains):.2g} / sqrt(inputs))",
        "Put LayerNorm, RMSNorm or BatchNorm in front of each block, or let residual branches start small (zero the last "
        "layer of each, or divide by the square root of their number).",
        test="with a normalisation in front of each block the first gradient is smaller",
    )


def _written(evidence: Evidence) -> Cause | None:
    """Weights that have moved farther than all updates together can have carried them."""
    rise = evidence.rise_of_weights
    if rise is not None and rise < _LARGER:
        return None  # they have, but another batch does not mind
    jumped = [growth for growth in evidence.weight_growths if growth.jump > _JUMP and growth.before is not None]
    pushed = [growth for growth in evidence.weight_growths if growth.excess > _EXCESS * growth.norm]
    if not jumped and not pushed:
        return None
    worst = max(jumped or pushed, key=lambda growth: growth.jump if jumped else growth.excess / growth.norm)
    count = len({growth.name for growth in [*jumped, *pushed]}) - 1
    others = f" ({count} more like it)" if count else ""
    if jumped:
        how = (
            f"`{worst.name}` has gone from a norm of {worst.before:.3g} to {worst.norm:.3g} within {worst.num_steps} "
            f"steps{others}; all updates of the optimizer in that time together make it larger by {worst.reach:.3g} at most"
        )
    else:
        how = (
            f"the last step has moved `{worst.name}` by {worst.update / worst.norm:.2g} of its norm{others}, of which the "
            f"optimizer's update does not explain {worst.excess / worst.update:.0%}"
        )
    return Cause(
        "weights",
        "weights",
        how,
        "Something else writes to the weights: a decay of your own with a wrong sign, a hook or callback, a checkpoint "
        "loaded halfway, broken memory. Compare the weights right after `optimizer.step()` with those before the next "
        "forward pass, and go back to the last good checkpoint.",
        worst.name,
        test="the weights differ between the end of `optimizer.step()` and the next forward pass",
    )


def _rate(evidence: Evidence) -> Cause | None:
    """Steps that move weights far, and a healthy batch whose gradient has become large by them."""
    rise = evidence.rise_of_weights
    matrices = [growth for growth in evidence.weight_growths if growth.is_matrix]
    if rise is None or rise < _BY_WEIGHTS or not matrices or evidence.usual is None:
        return None
    worst = max(matrices, key=lambda growth: growth.rate)
    if worst.rate < _RATE:
        return None
    return Cause(
        "rate",
        "weights",
        f"the last step that was applied changed `{worst.name}` by {worst.rate:.2g} of its norm (a thousandth is usual), "
        "and on the weights as they are now the previous healthy batch gives a gradient of norm "
        f"{evidence.healthy_norm:.3g} instead of a usual {evidence.usual.norm:.3g}"
        + ("" if evidence.num_ranks == 1 else " of the average over all ranks"),
        "Lower the learning rate, or warm it up for longer.",
        worst.name,
        test="a tenth of the learning rate ends it",
    )


_RULES: tuple[Callable[[Evidence], Cause | None], ...] = (_data, _recurrent, _init, _unnormalised, _written, _rate)
