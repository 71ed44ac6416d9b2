"""Which samples are to blame: for certain, probably, or none."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lightning_gradguard.forensics.nonfinite.blame import Blame, is_from_outside
from lightning_gradguard.forensics.nonfinite.layout import Layout
from lightning_gradguard.forensics.nonfinite.proof import Proof
from lightning_gradguard.forensics.nonfinite.provenance import Provenance
from lightning_gradguard.forensics.nonfinite.rows import Rows


@dataclass(frozen=True)
class Suspects:
    """Samples of a batch; at most one of both is known.

    Attributes:
        certain: the damage is in values that are theirs alone, or replays prove that it comes from them.
        probable: as far as can be guessed.
    """

    certain: tuple[int, ...] | None = None
    probable: tuple[int, ...] | None = None


def suspects_of(blame: Blame, layout: Layout, rows: Rows | None, proof: Proof | None) -> Suspects:
    """Tell them from the values that are damaged, else from replays.

    Args:
        blame: who made the damage.
        layout: of the batch.
        rows: what has followed the batch's rows; None if nothing has.
        proof: asks replays; None where there can be none.
    """
    followed = None if rows is None else blame.provenance.samples
    if followed == () and _is_beside(blame):
        followed = blame.met
    if is_from_outside(blame.provenance):
        return _of_place(followed or blame.met, layout, proof)
    if layout.size == 1 and blame.phase == "forward" and _gathers(blame.provenance):
        followed = ()  # it may be that there is one sample only, and not which one it is
    if rows is not None and followed:
        # Nothing is gained by taking out most of a batch.
        few = followed if 2 * len(followed) <= max(layout.size, 2) else None
        return Suspects(few) if rows.is_certain else Suspects(probable=few)
    if followed == ():  # what belongs to no sample looks like one by chance
        return Suspects()
    guess = None if blame.is_widespread else blame.guess
    is_open = blame.phase in ("forward", "backward") and not blame.is_widespread and layout.can_exchange
    if proof is None or not is_open or not (layout.is_unique or rows is None or not rows.mixes):
        return Suspects(probable=guess if blame.phase != "weights" else None)
    return _proved(guess, proof)


def _proved(guess: tuple[int, ...] | None, proof: Proof) -> Suspects:
    if guess is not None and proof.holds(guess):
        return Suspects(guess)
    found = proof.find()
    if found is not None:
        return Suspects(found) if proof.holds(found) else Suspects(probable=found)
    return Suspects(probable=guess if proof.is_exhausted else None)


def _of_place(met: tuple[int, ...] | None, layout: Layout, proof: Proof | None) -> Suspects:
    """What has met the values of samples may have to do with these, or with their places only."""
    if proof is None or not layout.can_exchange:
        return Suspects(probable=met)
    return Suspects(met if met and proof.holds(met) else None)


def _gathers(provenance: Provenance) -> bool:
    """Whether it is a mean, a deviation or the like."""
    packet = getattr(torch.ops.aten, provenance.op, None)
    return packet is not None and any(torch.Tag.reduction in getattr(packet, it).tags for it in packet.overloads())


def _is_beside(blame: Blame) -> bool:
    """Whether what was damaged has a row for each sample, although it is made of none, as a weight for each has."""
    return not blame.provenance.needs_grad and bool(blame.met) and blame.provenance.rows == blame.met
