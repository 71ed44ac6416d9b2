"""From the damage that counts back to the operator, batch or weight that it comes from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from lightning_gradguard.forensics.nonfinite.drops import Drop
from lightning_gradguard.forensics.nonfinite.provenance import Provenance
from lightning_gradguard.forensics.nonfinite.samples import Batch

Phase = Literal["data", "weights", "forward", "backward"]


@dataclass(frozen=True)
class Way:
    """How damage of the forward pass that the loss does not show came into the gradients.

    Attributes:
        entry: what the operator of the backward pass made of it.
        drop: where the forward pass had left it behind; None if that was not seen.
    """

    entry: Provenance
    drop: Drop | None


@dataclass(frozen=True)
class Blame:
    """Who made the damage.

    Attributes:
        phase: what kind of thing it is.
        provenance: the damaged tensor.
        guess: bad rows of the batch as the shapes of tensors have them; None if it is not single ones, or they don't tell.
        is_widespread: whether most samples are bad, but not all, so that nothing is to be gained by taking some out.
        met: the samples whose values the damage is first seen in, after its birth; None if they are not known.
        way: how the damage came into the gradients without going through the loss; None where it did, or where it was made
            in the backward pass.
        beside: other births on the same line, that would be left if the culprit were mended.
    """

    phase: Phase
    provenance: Provenance
    guess: tuple[int, ...] | None
    is_widespread: bool = False
    met: tuple[int, ...] | None = None
    way: Way | None = None
    beside: tuple[Provenance, ...] = ()

    def is_like(self, other: Blame) -> bool:
        """Whether another replay has found the same."""
        same = (self.phase, self.provenance.order, self.provenance.op)
        return same == (other.phase, other.provenance.order, other.provenance.op)

    @property
    def is_state(self) -> bool:
        """Whether it is a tensor that the failing step may have damaged itself, before it was replayed."""
        return self.provenance.origin == "state"


def find_culprit(
    losses: Sequence[Provenance], gradients: Sequence[Provenance], batch: Batch, drops: Sequence[Drop] = ()
) -> Blame | None:
    """Walk back from what is really damaged; None if nothing is.

    The first damaged tensor of a step is often innocent (a mask, a masked branch), so only what the loss or the gradients
    descend from counts. A loss that is damaged is looked at before the gradients: these follow from it.

    Args:
        losses: the damaged ones, in order.
        gradients: of parameters, the damaged ones.
        batch: whose rows are samples.
        drops: where damage was left behind in the forward pass.
    """
    roots = losses[:1] or gradients
    if not roots:
        return None
    reached = _ancestry(roots)
    outside = [
        provenance for provenance in reached if provenance.origin in ("data", "weights") and not provenance.is_sentinel
    ]
    for origin in ("data", "weights"):
        used = [provenance for provenance in outside if provenance.origin == origin]
        if used:
            return _blame(min(used, key=lambda provenance: _first_use(provenance, reached)), reached, batch)
    culprit = _born(reached) if losses else _entered(reached)
    if culprit is not None and not losses and (birth := _born_before(culprit)) is not None:
        return replace(_blame(birth, reached, batch), way=Way(culprit, _dropped(birth, drops)))
    if culprit is None:
        states = [provenance for provenance in reached if provenance.origin == "state" and not provenance.is_sentinel]
        culprit = min(states, key=lambda provenance: _first_use(provenance, reached)) if states else _turned(reached, batch)
    return _blame(culprit, reached, batch)


def _ancestry(roots: Iterable[Provenance]) -> list[Provenance]:
    """All damaged tensors that these descend from, and they themselves, oldest first."""
    seen: dict[int, Provenance] = {}
    open_ = list(roots)
    while open_:
        provenance = open_.pop()
        if id(provenance) not in seen:
            seen[id(provenance)] = provenance
            open_.extend(provenance.parents)
    return sorted(seen.values(), key=lambda provenance: provenance.order)


def _first_use(source: Provenance, reached: Sequence[Provenance]) -> int:
    return min((provenance.order for provenance in reached if source in provenance.parents), default=source.order)


def _born(reached: Sequence[Provenance]) -> Provenance | None:
    """The first operator that made damage out of healthy inputs."""
    births = [provenance for provenance in reached if _is_birth(provenance)]
    # Minus infinities that depend on no parameter, and of which fewer rows came to harm, are a mask.
    masks = {id(birth): _harmed_fewer(birth, reached) for birth in births if birth.flaw.is_negative and not birth.needs_grad}
    return next((masks.get(id(birth)) or birth for birth in births), None)


def _is_birth(provenance: Provenance) -> bool:
    return not provenance.parents and not provenance.origin and not provenance.is_sentinel


def _harmed_fewer(source: Provenance, reached: Sequence[Provenance]) -> Provenance | None:
    """The operator that made NaN of only some of the rows with infinities; None if it took all, or none is known."""
    turned = next((provenance for provenance in reached if _turns(provenance) and _descends(provenance, source)), None)
    if turned is None or turned.rows is None or source.rows is None:
        return None
    return turned if set(turned.rows) < set(source.rows) else None


def _turns(provenance: Provenance) -> bool:
    return (
        provenance.flaw.has_nan
        and bool(provenance.parents)
        and not any(parent.flaw.has_nan for parent in provenance.parents)
    )


def _takes_nan(provenance: Provenance) -> bool:
    """Whether it is the first to work with a constant of NaN."""
    is_first = all(parent.origin == "constant" for parent in provenance.parents)
    return provenance.flaw.has_nan and not provenance.origin and is_first


def is_from_outside(provenance: Provenance) -> bool:
    """Whether all damage that went in came from tensors that no operator of the step has made, as numpy's."""
    return bool(provenance.parents) and all(
        parent.origin == "constant" and parent.op in _OUTSIDE for parent in provenance.parents
    )


_OUTSIDE = ("", "lift_fresh", "lift_fresh_copy")
"""Operators that make a tensor of numbers that others have worked out; "" is none at all."""


def _descends(provenance: Provenance, source: Provenance) -> bool:
    return any(ancestor is source for ancestor in _ancestry([provenance]))


def _entered(reached: Sequence[Provenance]) -> Provenance | None:
    """The first operator of the backward pass at which damage came into the gradients.

    What went in may be damaged, in a branch that the forward pass masked: zero times infinity is NaN.
    """
    entries = [
        provenance
        for provenance in reached
        if provenance.is_backward and not any(parent.is_backward for parent in provenance.parents)
    ]
    own = [provenance for provenance in entries if not _comes_from_state(provenance)]
    return own[0] if own else None


def _born_before(entry: Provenance) -> Provenance | None:
    """The operator of the forward pass whose damage a backward operator has taken in.

    None if there is none, or if the backward operator belongs to it: then that is the culprit itself.
    """
    before = _ancestry(entry.parents)
    birth = _born(before) or next(
        (provenance for provenance in before if _turns(provenance) or _takes_nan(provenance)), None
    )
    if birth is None or (birth.needs_grad and birth.sequence == entry.sequence):
        return None
    return birth


def _dropped(birth: Provenance, drops: Sequence[Drop]) -> Drop | None:
    """Where the forward pass has left behind what descends from a birth; rather where all of it went in than a part."""
    own = [drop for drop in drops if drop.order > birth.order and _descends(drop.dropped, birth)]
    return next((drop for drop in own if not drop.is_partial), own[0] if own else None)


def _comes_from_state(provenance: Provenance) -> bool:
    return any(source.origin == "state" and not source.is_sentinel for source in _ancestry([provenance]))


def _turned(reached: Sequence[Provenance], batch: Batch) -> Provenance:
    """What made damage of infinities that somebody has put there on purpose, or of a constant."""
    turned = next((provenance for provenance in reached if _turns(provenance) or _takes_nan(provenance)), None)
    data = next((provenance for provenance in reached if provenance.origin == "data"), None)
    if data is not None and (turned is None or not set(turned.rows or ()) < set(data.rows or range(batch.size))):
        return data
    if turned is not None:
        return turned
    made = [provenance for provenance in reached if provenance.op and provenance.origin in ("", "constant")]
    own = [provenance for provenance in made if not provenance.origin]
    taken = next((provenance for provenance in own if is_from_outside(provenance)), None)
    if taken is not None and not taken.flaw.is_negative:  # which would be a mask
        return taken
    # Infinity that never became NaN: where it was no longer one element among many.
    reduced = next((provenance for provenance in own if provenance.shrinks), None)
    return reduced or (own or made or list(reached))[0]


def _blame(culprit: Provenance, reached: Sequence[Provenance], batch: Batch) -> Blame:
    phase: Phase = "backward" if culprit.is_backward else "forward"
    if culprit.origin in ("data", "weights", "state"):
        phase = "data" if culprit.origin == "data" else "weights"
    if phase in ("data", "weights"):
        return Blame(phase, culprit, _rows(culprit, reached, batch) if phase == "data" else None)
    rows = _rows(culprit, reached, batch)
    is_widespread = rows is not None and 2 * len(rows) > max(batch.size, 2)
    guess = None if is_widespread else rows
    return Blame(phase, culprit, guess, is_widespread, met=_met(culprit, reached), beside=_beside(culprit, reached))


def _beside(culprit: Provenance, reached: Sequence[Provenance]) -> tuple[Provenance, ...]:
    if culprit.location.line is None:
        return ()
    same = (provenance for provenance in reached if provenance.location.line == culprit.location.line)
    others = (it for it in same if it is not culprit and it.is_backward == culprit.is_backward)
    return tuple(provenance for provenance in others if _is_birth(provenance))


def _met(culprit: Provenance, reached: Sequence[Provenance]) -> tuple[int, ...] | None:
    later = (it for it in reached if it.order > culprit.order and it.samples and _descends(it, culprit))
    return next((it.samples for it in later), None)


def _rows(culprit: Provenance, reached: Sequence[Provenance], batch: Batch) -> tuple[int, ...] | None:
    """Bad rows of the first tensor on the way that has rows."""
    if culprit.rows is not None:
        return culprit.rows if batch.is_some(culprit.rows) else None
    for provenance in reached:
        if provenance.order > culprit.order and provenance.rows is not None and _descends(provenance, culprit):
            return provenance.rows if batch.is_some(provenance.rows) else None
    return None
