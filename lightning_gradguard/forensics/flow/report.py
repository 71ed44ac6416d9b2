"""The factors of the chain rule as a table, and a cause as a culprit."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_gradguard.alert import Culprit
from lightning_gradguard.forensics.flow.evidence import Cause
from lightning_gradguard.forensics.flow.flow import Flow, Layer

_NUM_ENDS = 12
"""Layers shown at each end of a deep network."""


def table_of(flow: Flow) -> tuple[str, ...]:
    """One line a layer, in Markdown: what comes out of it, the state of its units, and what it multiplies the gradient by.

    >>> table_of(Flow((Layer("0", "linear", "weights", output_rms=0.5, grad_norm=2e-3),)))[2]
    '| `0` | linear | 0.5 |  | 0.002 |  |'
    """
    rows = [_row(layer) for layer in flow.layers]
    left_out = len(rows) - 2 * _NUM_ENDS
    if left_out > 0:
        rows = [*rows[:_NUM_ENDS], f"| ({left_out} more) | | | | | |", *rows[-_NUM_ENDS:]]
    return ("| module | function | output rms | units | gradient norm | times |", "|---|---|---|---|---|---|", *rows)


def _row(layer: Layer) -> str:
    norm = "none" if layer.grad_norm is None else f"{layer.grad_norm:.3g}"
    factor = "" if layer.factor is None else f"{layer.factor:.3g}"
    return f"| `{layer.module}` | {layer.op} | {layer.output_rms:.3g} | {_units(layer)} | {norm} | {factor} |"


def _units(layer: Layer) -> str:
    units = layer.units
    if units is None:
        return "" if layer.gain is None else f"weights {layer.gain:.2g}/sqrt(n)"
    state = [f"slope {units.slope:.2g}"]
    if units.dead:
        state.append(f"{units.dead:.0%} dead")
    if units.saturated:
        state.append(f"{units.saturated:.0%} saturated")
    return ", ".join(state)


def culprit_of(
    causes: Sequence[Cause], flow: Flow, *, rank: int, error: float | None, tolerance: float, num_ranks: int = 1
) -> Culprit | None:
    """The surest cause as a culprit, with what would tell it from others that fit; None if nothing was found.

    Args:
        causes: the surest first.
        flow: of the step.
        rank: the process.
        error: relative difference between the step's gradients and those of the replay; None if not known.
        tolerance: up to which they count as the same.
        num_ranks: processes that share the batch, of which this one has looked at its own part.
    """
    if not causes:
        return None
    first = causes[0]
    # The alert's own norm is that of the average over all ranks.
    part = (
        ""
        if num_ranks == 1
        else f"in rank {rank}'s part of the batch, before gradients are averaged over {num_ranks} ranks: "
    )
    return Culprit(
        phase=first.phase,
        module=first.module,
        samples=first.samples,
        probable_samples=first.probable_samples,
        rank=rank,
        reproduced=error is not None and error <= tolerance,
        error=error,
        message=part + _in_words(causes),
        remedy=first.remedy,
        cause=first.name,
        factors=table_of(flow),
    )


def _in_words(causes: Sequence[Cause]) -> str:
    first, *rest = causes
    if not rest:
        return first.message
    others = "; or ".join(f"{cause.name}: {cause.message}" for cause in rest)
    tests = "; ".join(f"if it is {cause.name}, {cause.test}" for cause in causes if cause.test)
    return f"{first.message}. It can also be {others}" + (f". To tell them apart: {tests}" if tests else "")
