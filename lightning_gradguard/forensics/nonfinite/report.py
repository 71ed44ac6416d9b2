"""From blame to what people read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from lightning_gradguard.alert import Culprit
from lightning_gradguard.forensics.nonfinite import conditions as when
from lightning_gradguard.forensics.nonfinite.blame import Blame, is_from_outside
from lightning_gradguard.forensics.nonfinite.failure import STEEP, KnownFailure, code
from lightning_gradguard.forensics.nonfinite.known_failures import KNOWN_FAILURES
from lightning_gradguard.forensics.nonfinite.provenance import Provenance
from lightning_gradguard.forensics.nonfinite.source_location import shown_file
from lightning_gradguard.forensics.nonfinite.suspects import Suspects
from lightning_gradguard.forensics.nonfinite.wording import place_in_words, rows_in_words, way_in_words

_NUM_BESIDE_SHOWN = 2
_DATA_REMEDY = (
    "Look at these samples in the data set; check `isfinite` where they are loaded. If they are padding, select the rest "
    "by index: a mask does not keep NaN out of gradients."
)
_WEIGHTS_REMEDY = (
    "It was damaged before this step: an earlier update, a checkpoint, or its initialisation. Go back to the last "
    "checkpoint where it is finite."
)
_STATE_REMEDY = (
    "It was damaged before this step, by an earlier one that has written to it, or from the start. Set it anew where it is "
    "not finite."
)
_FOREIGN_REMEDY = (
    "Look for what changes gradients after the backward pass: `on_after_backward`, a callback, a clipping, scaling or "
    "normalisation of your own (a norm of 0 is divided by), or broken memory."
)
_SAME_LOSS = 1e-4

_OTHERS: tuple[KnownFailure, ...] = (
    KnownFailure(
        "damage of the forward pass",
        frozenset(),
        (when.from_forward,),
        "brought NaN or Inf of the forward pass into the gradients",
    ),
    KnownFailure(
        "number in the code", frozenset(), (when.written_down,), "works with NaN or Inf that is written in the code"
    ),
    KnownFailure(
        "tensor from outside",
        frozenset(),
        (is_from_outside,),
        "was given a tensor from before the step, or from outside of torch, that holds {what}",
    ),
    KnownFailure("out of the finite", frozenset(), (when.fresh,), "gave {what} for finite inputs"),
    KnownFailure("out of infinity", frozenset(), (when.is_nan, when.without_nan), "made NaN of Inf"),
    KnownFailure("anything else", frozenset(), (), "gave {what}"),
)
"""What is said of an operator that is not in the list, or not with these values: no remedy is known."""


def culprit_of(
    blame: Blame,
    suspects: Suspects,
    *,
    rank: int = 0,
    reproduced: bool = False,
    error: float | None = None,
    root: str = "training_step",
) -> Culprit:
    """Put a finding into words.

    Args:
        blame: what was found.
        suspects: the samples.
        rank: the process that it was found on.
        reproduced: whether the replay gave the same gradients.
        error: relative error of the replayed gradients.
        root: the function that runs the step.
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
    flaw = provenance.flaw
    what = " and ".join(name for name, is_there in (("NaN", flaw.has_nan), ("Inf", flaw.has_inf)) if is_there)
    if blame.phase == "data":
        return replace(found, module=provenance.op, message=f"`{provenance.op}` holds {what}{rows}", remedy=_DATA_REMEDY)
    if blame.phase == "weights":
        remedy = _STATE_REMEDY if blame.is_state else _WEIGHTS_REMEDY
        return replace(found, module=provenance.op, message=f"`{provenance.op}` holds {what} already", remedy=remedy)
    failure, cause = explained(provenance)
    op = provenance.op if provenance.is_hook else provenance.node or provenance.op
    line = provenance.location.line
    place = place_in_words(provenance.location, root, is_hook=provenance.is_hook)
    happened = "gave a damaged gradient" if provenance.is_custom else failure.sentence(provenance)
    if cause is not provenance:
        happened += f", where `{cause.op}` {known_failure_of(cause).sentence(cause)}"
    others = beside_in_words(blame.beside, happened)
    message = f"`{op}` {place} {happened}{rows}{others}{way_in_words(blame.way, root)}"
    source = "" if line is None else line.source or ""
    remedies = dict.fromkeys(remedy_of(it, source) for it in (cause, *blame.beside))
    return replace(
        found,
        module=provenance.location.module,
        op=op,
        file=None if line is None else shown_file(line.file),
        line=None if line is None else line.number,
        source=None if line is None else line.source,
        message=message,
        remedy=" ".join(filter(None, remedies)),
        inputs=provenance.inputs,
        before=provenance.before,
        frames=provenance.location.frames,
    )


def culprit_outside(loss: float, replayed: Sequence[Tensor], again: float, *, rank: int = 0) -> Culprit | None:
    """That damage was made neither in the forward nor in the backward pass; None where a replay does not show as much.

    Args:
        loss: of the step.
        replayed: the gradients of a replay in which nothing was damaged.
        again: its loss.
        rank: the process.
    """
    if not math.isclose(loss, again, rel_tol=_SAME_LOSS) or not all(bool(grad.isfinite().all()) for grad in replayed):
        return None
    return Culprit(
        phase="backward",
        rank=rank,
        cause="foreign",
        message="the same step run again gives the same loss and finite gradients: its forward and backward pass alone do "
        "not make this damage",
        remedy=_FOREIGN_REMEDY,
    )


def known_failure_of(provenance: Provenance) -> KnownFailure:
    """The known failure that an operator fell into, or what is said of any other."""
    key = key_of(provenance)
    known = (failure for failure in KNOWN_FAILURES if key in failure.ops and failure.fits(provenance))
    return next(known, None) or next(failure for failure in _OTHERS if failure.fits(provenance))


def explained(provenance: Provenance) -> tuple[KnownFailure, Provenance]:
    """The known failure of a damaged result, and the one whose remedy helps: for a gradient that met damage of its own
    forward operator that is the forward operator's.
    """
    failure = known_failure_of(provenance)
    if failure is _OTHERS[0]:
        own = [parent for parent in provenance.parents if not parent.is_backward and parent.operands]
        return failure, own[0] if own else provenance
    return failure, provenance


def remedy_of(provenance: Provenance, source: str) -> str:
    """What makes an operator safe, and what it comes from where that has an infinite slope; "" if nothing is known to.

    Args:
        provenance: the damaged result.
        source: the line of code.
    """
    failure = known_failure_of(provenance)
    if not failure.fixes:
        return ""
    remedies = [failure.remedy(key_of(provenance), provenance, source)]
    for operand in provenance.operands:
        is_zero = operand.at is not None and operand.at.value == 0
        if operand.source and is_zero and operand.name != "result":
            safe = code(STEEP[operand.source], operand.source, provenance)
            remedies.append(f"It comes from `{operand.source}`, whose slope is infinite there; there write: `{safe}`.")
    return " ".join(remedies)


def beside_in_words(births: Sequence[Provenance], told: str) -> str:
    """What else failed on the same line; as it ends a sentence.

    Args:
        births: the other damaged results.
        told: what is told of the culprit already.
    """
    sentences = dict.fromkeys(f"`{it.node or it.op}` {known_failure_of(it).sentence(it)}" for it in births)
    more = [sentence for sentence in sentences if not sentence.endswith(told)][:_NUM_BESIDE_SHOWN]
    return "".join(f"; on the same line {sentence}" for sentence in more)


def key_of(provenance: Provenance) -> str:
    """The operator's name without what differs between its variants."""
    if not provenance.is_backward or provenance.is_hook:
        return provenance.op.strip("_").lower()
    name = provenance.node.partition("Backward")[0]
    return "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in name).strip("_")
