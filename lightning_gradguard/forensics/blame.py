"""From the damage that counts back to the operator, batch or weight that it comes from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from lightning_gradguard.forensics.samples import Batch
from lightning_gradguard.forensics.taint import Taint

Phase = Literal["data", "weights", "forward", "backward"]


@dataclass(frozen=True)
class Blame:
    """Who made the damage.

    Attributes:
        phase: what kind of thing it is.
        taint: the damaged tensor.
        samples: bad rows of the batch; None if it is not single ones, or can't be told from the tensors.
        is_widespread: whether most samples are bad, but not all, so that nothing is to be gained by taking some out.
    """

    phase: Phase
    taint: Taint
    samples: tuple[int, ...] | None
    is_widespread: bool = False

    @property
    def is_state(self) -> bool:
        """Whether it is a tensor that the failing step may have damaged itself, before it was replayed."""
        return self.taint.origin == "state"


def find_culprit(losses: Sequence[Taint], gradients: Sequence[Taint], batch: Batch) -> Blame | None:
    """Walk back from what is really damaged; None if nothing is.

    The first damaged tensor of a step is often innocent (a mask, a masked branch), so only what the loss or the gradients
    descend from counts. A loss that is damaged is looked at before the gradients: these follow from it.

    Args:
        losses: the damaged ones, in order.
        gradients: of parameters, the damaged ones.
        batch: whose rows are samples.
    """
    roots = losses[:1] or gradients
    if not roots:
        return None
    reached = _ancestry(roots)
    outside = [taint for taint in reached if taint.origin in ("data", "weights") and not taint.is_sentinel]
    for origin in ("data", "weights"):
        used = [taint for taint in outside if taint.origin == origin]
        if used:
            return _blame(min(used, key=lambda taint: _first_use(taint, reached)), reached, batch)
    culprit = _born(reached) if losses else _entered(reached)
    if culprit is None:
        states = [taint for taint in reached if taint.origin == "state" and not taint.is_sentinel]
        culprit = min(states, key=lambda taint: _first_use(taint, reached)) if states else _turned(reached, batch)
    return _blame(culprit, reached, batch)


def _ancestry(roots: Iterable[Taint]) -> list[Taint]:
    """All damaged tensors that these descend from, and they themselves, oldest first."""
    seen: dict[int, Taint] = {}
    open_ = list(roots)
    while open_:
        taint = open_.pop()
        if id(taint) not in seen:
            seen[id(taint)] = taint
            open_.extend(taint.parents)
    return sorted(seen.values(), key=lambda taint: taint.order)


def _first_use(source: Taint, reached: Sequence[Taint]) -> int:
    return min((taint.order for taint in reached if source in taint.parents), default=source.order)


def _born(reached: Sequence[Taint]) -> Taint | None:
    """The first operator that made damage out of healthy inputs."""
    births = [taint for taint in reached if not taint.parents and not taint.origin and not taint.is_sentinel]
    # Minus infinities that depend on no parameter, and of which fewer rows came to harm, are a mask.
    masks = {id(birth): _harmed_fewer(birth, reached) for birth in births if birth.flaw.is_negative and not birth.needs_grad}
    return next((masks.get(id(birth)) or birth for birth in births), None)


def _harmed_fewer(source: Taint, reached: Sequence[Taint]) -> Taint | None:
    """The operator that made NaN of only some of the rows with infinities; None if it took all, or none is known."""
    turned = next((taint for taint in reached if _turns(taint) and _descends(taint, source)), None)
    if turned is None or turned.rows is None or source.rows is None:
        return None
    return turned if set(turned.rows) < set(source.rows) else None


def _turns(taint: Taint) -> bool:
    return taint.flaw.has_nan and bool(taint.parents) and not any(parent.flaw.has_nan for parent in taint.parents)


def _takes_nan(taint: Taint) -> bool:
    """Whether it is the first to work with a constant of NaN."""
    is_first = all(parent.origin == "constant" for parent in taint.parents)
    return taint.flaw.has_nan and not taint.origin and is_first


def _descends(taint: Taint, source: Taint) -> bool:
    return any(ancestor is source for ancestor in _ancestry([taint]))


def _entered(reached: Sequence[Taint]) -> Taint | None:
    """The first operator of the backward pass at which damage came into the gradients.

    What went in may be damaged, in a branch that the forward pass masked: zero times infinity is NaN.
    """
    entries = [taint for taint in reached if taint.is_backward and not any(parent.is_backward for parent in taint.parents)]
    own = [taint for taint in entries if not _comes_from_state(taint)]
    return own[0] if own else None


def _comes_from_state(taint: Taint) -> bool:
    return any(source.origin == "state" and not source.is_sentinel for source in _ancestry([taint]))


def _turned(reached: Sequence[Taint], batch: Batch) -> Taint:
    """What made damage of infinities that somebody has put there on purpose, or of a constant."""
    turned = next((taint for taint in reached if _turns(taint) or _takes_nan(taint)), None)
    data = next((taint for taint in reached if taint.origin == "data"), None)
    if data is not None and (turned is None or not set(turned.rows or ()) < set(data.rows or range(batch.size))):
        return data
    if turned is not None:
        return turned
    made = [taint for taint in reached if taint.op and taint.origin in ("", "constant")]
    own = [taint for taint in made if not taint.origin]
    # Infinity that never became NaN: where it was no longer one element among many.
    reduced = next((taint for taint in own if taint.shrinks), None)
    return reduced or (own or made or list(reached))[0]


def _blame(culprit: Taint, reached: Sequence[Taint], batch: Batch) -> Blame:
    phase: Phase = "backward" if culprit.is_backward else "forward"
    if culprit.origin in ("data", "weights", "state"):
        phase = "data" if culprit.origin == "data" else "weights"
    if phase in ("data", "weights"):
        return Blame(phase, culprit, _rows(culprit, reached, batch) if phase == "data" else None)
    rows = _rows(culprit, reached, batch)
    is_widespread = rows is not None and 2 * len(rows) > max(batch.size, 2)
    return Blame(phase, culprit, None if is_widespread else rows, is_widespread)


def _rows(culprit: Taint, reached: Sequence[Taint], batch: Batch) -> tuple[int, ...] | None:
    """Bad rows of the first tensor on the way that has rows."""
    if culprit.rows is not None:
        return culprit.rows if batch.is_some(culprit.rows) else None
    for taint in reached:
        if taint.order > culprit.order and taint.rows is not None and _descends(taint, culprit):
            return taint.rows if batch.is_some(taint.rows) else None
    return None
