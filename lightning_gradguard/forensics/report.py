"""From blame to what people read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from lightning_gradguard.forensics.blame import Blame
from lightning_gradguard.forensics.tensors import Range
from lightning_gradguard.forensics.traps import fault_of, trap_of
from lightning_gradguard.record import Culprit

_NUM_ROWS_SHOWN = 5
_DATA_REMEDY = (
    "Look at these samples in the data set; check `isfinite` where they are loaded. If they are padding, select the rest "
    "by index: a mask does not keep NaN out of gradients."
)
_WEIGHTS_REMEDY = (
    "It was damaged before this step: an earlier update, a checkpoint, or its initialisation. Go back to the last "
    "checkpoint where it is finite."
)


def culprit_of(blame: Blame, *, rank: int = 0, reproduced: bool = False, error: float | None = None) -> Culprit:
    """Put a finding into words.

    Args:
        blame: what was found.
        rank: the process that it was found on.
        reproduced: whether the replay gave the same gradients.
        error: relative error of the replayed gradients.
    """
    taint = blame.taint
    rows = rows_in_words(blame.samples)
    found = Culprit(phase=blame.phase, samples=blame.samples, rank=rank, reproduced=reproduced, error=error)
    if blame.phase == "data":
        what = "NaN" if taint.flaw.has_nan else "Inf"
        return replace(found, module=taint.op, message=f"`{taint.op}` holds {what}{rows}", remedy=_DATA_REMEDY)
    if blame.phase == "weights":
        what = "NaN" if taint.flaw.has_nan else "Inf"
        return replace(found, module=taint.op, message=f"`{taint.op}` holds {what} already", remedy=_WEIGHTS_REMEDY)
    trap = trap_of(taint)
    op = taint.op if taint.is_hook else taint.node or taint.op
    line = taint.place.line
    where = f"in `{taint.place.module}`" if taint.place.module else "in `training_step`"
    place = f"{where}, {line}," if line is not None else where
    span = fault_of(taint)
    happened = trap.happened.format(value=_value(span), span=taint.inputs[0] if taint.inputs else "no tensor")
    message = f"`{op}` {place} {happened}{rows}"
    if taint.is_custom:
        message = f"`{op}` {place} gave a damaged gradient{rows}"
    return replace(
        found,
        module=taint.place.module,
        op=op,
        file=None if line is None else line.file,
        line=None if line is None else line.number,
        source=None if line is None else line.source,
        message=message,
        remedy=trap.remedy,
        inputs=taint.inputs,
        before=taint.before,
    )


def _value(span: Range | None) -> str:
    return "a value outside its domain" if span is None else str(span)


def rows_in_words(rows: Sequence[int] | None) -> str:
    """As it ends a sentence.

    >>> rows_in_words((3,)), rows_in_words((3, 7)), rows_in_words(None)
    (' in row 3', ' in rows 3 and 7', '')
    """
    if not rows:
        return ""
    if len(rows) == 1:
        return f" in row {rows[0]}"
    shown = [str(row) for row in rows[:_NUM_ROWS_SHOWN]]
    if len(rows) > _NUM_ROWS_SHOWN:
        return f" in rows {', '.join(shown)} and {len(rows) - _NUM_ROWS_SHOWN} more"
    return f" in rows {', '.join(shown[:-1])} and {shown[-1]}"
