"""From blame to what people read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from lightning_gradguard.alert import Culprit
from lightning_gradguard.forensics.nonfinite.blame import Blame, Way
from lightning_gradguard.forensics.nonfinite.failure import KnownFailure, code
from lightning_gradguard.forensics.nonfinite.known_failures import KNOWN_FAILURES, STEEP
from lightning_gradguard.forensics.nonfinite.provenance import Provenance
from lightning_gradguard.forensics.nonfinite.source_location import SourceLocation
from lightning_gradguard.forensics.nonfinite.suspects import Suspects

_NUM_ROWS_SHOWN, _NUM_BESIDE_SHOWN = 5, 2
_DATA_REMEDY = (
    "Look at these samples in the data set; check `isfinite` where they are loaded. If they are padding, select the rest "
    "by index: a mask does not keep NaN out of gradients."
)
_WEIGHTS_REMEDY = (
    "It was damaged before this step: an earlier update, a checkpoint, or its initialisation. Go back to the last "
    "checkpoint where it is finite."
)


def culprit_of(
    blame: Blame, suspects: Suspects, *, rank: int = 0, reproduced: bool = False, error: float | None = None
) -> Culprit:
    """Put a finding into words.

    Args:
        blame: what was found.
        suspects: the samples.
        rank: the process that it was found on.
        reproduced: whether the replay gave the same gradients.
        error: relative error of the replayed gradients.
    """
    provenance = blame.provenance
    rows = rows_in_words(suspects.certain) or rows_in_words(suspects.probable, " probably")
    found = Culprit(
        phase=blame.phase,
        samples=suspects.certain,
        probable_samples=suspects.probable,
        rank=rank,
        reproduced=reproduced,
        error=error,
    )
    if blame.phase == "data":
        what = "NaN" if provenance.flaw.has_nan else "Inf"
        return replace(found, module=provenance.op, message=f"`{provenance.op}` holds {what}{rows}", remedy=_DATA_REMEDY)
    if blame.phase == "weights":
        what = "NaN" if provenance.flaw.has_nan else "Inf"
        return replace(
            found, module=provenance.op, message=f"`{provenance.op}` holds {what} already", remedy=_WEIGHTS_REMEDY
        )
    cause = _cause_of(provenance)
    op = provenance.op if provenance.is_hook else provenance.node or provenance.op
    line = provenance.location.line
    place = place_in_words(provenance.location, is_hook=provenance.is_hook)
    happened = "gave a damaged gradient" if provenance.is_custom else happened_in_words(provenance)
    if cause is not provenance:
        happened += f", where `{cause.op}` {happened_in_words(cause)}"
    others = beside_in_words(blame.beside, happened)
    message = f"`{op}` {place} {happened}{rows}{others}{way_in_words(blame.way)}"
    source = "" if line is None else line.source or ""
    remedies = dict.fromkeys(_remedy(it, source) for it in (cause, *map(_cause_of, blame.beside)))
    return replace(
        found,
        module=provenance.location.module,
        op=op,
        file=None if line is None else line.file,
        line=None if line is None else line.number,
        source=None if line is None else line.source,
        message=message,
        remedy=" ".join(filter(None, remedies)),
        inputs=provenance.inputs,
        before=provenance.before,
        frames=provenance.location.frames,
    )


def known_failure_of(provenance: Provenance) -> KnownFailure | None:
    """The known failure that an operator fell into; None for any other."""
    key = key_of(provenance)
    return next((failure for failure in KNOWN_FAILURES if key in failure.ops and failure.fits(provenance)), None)


def happened_in_words(provenance: Provenance) -> str:
    """What an operator did, with the values that were there."""
    failure = known_failure_of(provenance)
    return _whatever_happened(provenance) if failure is None else failure.sentence(provenance)


def _remedy(provenance: Provenance, source: str) -> str:
    failure = known_failure_of(provenance)
    if failure is None or not failure.fixes:
        return ""
    return " ".join([failure.remedy(key_of(provenance), provenance, source), *_remedies_before(provenance)])


def _remedies_before(provenance: Provenance) -> Iterator[str]:
    """For what the operands at fault come from, where its slope is infinite."""
    for operand in provenance.operands:
        if operand.source and operand.at is not None and operand.at.value == 0:
            safe = code(STEEP[operand.source], operand.source, provenance)
            yield f"It comes from `{operand.source}`, whose slope is infinite there; there write: `{safe}`."


def _cause_of(provenance: Provenance) -> Provenance:
    """Whose remedy helps: for a gradient that met damage of its own forward operator that is the forward operator."""
    if not provenance.is_backward or known_failure_of(provenance) is not None:
        return provenance
    return next((parent for parent in provenance.parents if not parent.is_backward and parent.operands), provenance)


def beside_in_words(births: Sequence[Provenance], told: str) -> str:
    """What else failed on the same line; as it ends a sentence.

    Args:
        births: the other damaged results.
        told: what is told of the culprit already.
    """
    sentences = dict.fromkeys(f"`{it.node or it.op}` {happened_in_words(it)}" for it in births)
    more = [sentence for sentence in sentences if not sentence.endswith(told)][:_NUM_BESIDE_SHOWN]
    return "".join(f"; on the same line {sentence}" for sentence in more)


def key_of(provenance: Provenance) -> str:
    """The operator's name without what differs between its variants."""
    if not provenance.is_backward or provenance.is_hook:
        return provenance.op.strip("_").lower()
    name = provenance.node.partition("Backward")[0]
    return "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in name).strip("_")


def _whatever_happened(provenance: Provenance) -> str:
    """Of an operator that no known failure fits: what is certain all the same."""
    made = "NaN" if provenance.flaw.has_nan else "Inf"
    if _is_given(provenance):
        return f"was given {made} as a number"
    if not provenance.parents:
        return f"made {made} out of finite inputs"
    taken = "NaN" if any(parent.flaw.has_nan for parent in provenance.parents) else "Inf"
    of = " of the forward pass" if provenance.is_backward and not any(it.is_backward for it in provenance.parents) else ""
    return f"gave {made} as it was given {taken}{of}"


def _is_given(provenance: Provenance) -> bool:
    """Whether NaN or infinity is written down as an argument."""
    return provenance.is_sentinel and not provenance.parents and not provenance.origin


def place_in_words(location: SourceLocation, *, is_hook: bool = False) -> str:
    """As in "in `head`, model.py:11,"."""
    where = f"in a hook on a tensor of `{location.module or 'training_step'}`" if is_hook else f"in {_caller(location)}"
    return where if location.line is None else f"{where}, {location.line},"


def _caller(location: SourceLocation) -> str:
    """The module; where it is a helper's line, that too."""
    helper = location.frames[0].function if location.frames else ""
    name = helper.rpartition(".")[2]
    if name.startswith("<") or name in ("", "forward", "training_step"):  # the module says as much
        helper = ""
    if not location.module:
        return f"`{helper or 'training_step'}`"
    return f"`{location.module}`" + (f" (`{helper}`)" if helper else "")


def way_in_words(way: Way | None) -> str:
    """How damage came into the gradients that the loss does not show; as it ends a sentence."""
    if way is None:
        return ""
    entry = f"`{way.entry.node}` {place_in_words(way.entry.location)}".rstrip(",")
    if way.drop is None:
        return f"; the loss does not show it, but it comes into the gradients through {entry}"
    drop = f"`{way.drop.op}` {place_in_words(way.drop.location)}"
    left = "leaves it out of the loss" if way.drop.op in _SELECTING or way.drop.is_partial else "gives a finite result"
    return f"; {drop} {left}, but it comes into the gradients through {entry}"


_SELECTING = ("index", "index_select", "gather", "masked_fill", "masked_select", "nan_to_num", "where")
"""Operators of which a finite result of damaged input means that the damage was not selected."""


def rows_in_words(rows: Sequence[int] | None, how: str = "") -> str:
    """As it ends a sentence.

    >>> rows_in_words((3,)), rows_in_words((3, 7), " probably"), rows_in_words(None)
    (' in row 3', ', probably in rows 3 and 7', '')
    """
    if not rows:
        return ""
    begin = f",{how} in" if how else " in"
    if len(rows) == 1:
        return f"{begin} row {rows[0]}"
    shown = [str(row) for row in rows[:_NUM_ROWS_SHOWN]]
    if len(rows) > _NUM_ROWS_SHOWN:
        return f"{begin} rows {', '.join(shown)} and {len(rows) - _NUM_ROWS_SHOWN} more"
    return f"{begin} rows {', '.join(shown[:-1])} and {shown[-1]}"
