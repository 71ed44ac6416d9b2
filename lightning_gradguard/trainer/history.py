"""What outlives a fit: what a user asks a guard afterwards, and what a next fit or a checkpoint goes on from."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any

from lightning_gradguard.alert import Alert
from lightning_gradguard.record import Record, Totals
from lightning_gradguard.saved_state import VERSION, Mending, is_count

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule


@dataclass
class RollbackProgress:
    """What a resumed run has to know of its rollbacks.

    Attributes:
        num_rollbacks: so far.
        cooldown_left: steps for which learning rates are still lowered.
    """

    num_rollbacks: int = 0
    cooldown_left: int = 0


_OF_ROLLBACKS = tuple(entry.name for entry in fields(RollbackProgress))


@dataclass
class History:
    """The past of a guard.

    Attributes:
        guards: state of each optimizer's guard, in plain types.
        totals: counts of each.
        num_replays: steps that have been replayed.
        rollbacks: what has been gone back to.
        left_out: samples in quarantine.
        random: random states that the next fit begins with; None: those that are there.
        alerts: reported findings of all optimizers, oldest first.
        stopped_by: what ended the training; None if nothing did.
        last: the last step.
    """

    guards: list[dict[str, Any]] = field(default_factory=list)
    totals: list[Totals] = field(default_factory=list)
    num_replays: int = 0
    rollbacks: RollbackProgress = field(default_factory=RollbackProgress)
    left_out: set[int] = field(default_factory=set)
    random: dict[str, Any] | None = None
    alerts: list[Alert] = field(default_factory=list)
    stopped_by: Alert | None = None
    last: Record | None = None
    _module: weakref.ref[LightningModule] | None = None

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> History:
        """Read what a checkpoint holds; what is damaged in it starts afresh, with a warning."""
        mending = Mending(state, "the state of GradGuard", known=("guards", "num_replays", "recovery", "quarantine"))
        rollbacks = Mending(
            mending.part("recovery", _is_mapping, {}, may_be_missing=True), "the counts of rollbacks", known=_OF_ROLLBACKS
        )
        history = cls(
            guards=list(mending.part("guards", _is_list, [])),
            num_replays=mending.part("num_replays", is_count, 0, may_be_missing=True),
            rollbacks=RollbackProgress(*(rollbacks.part(name, is_count, 0, may_be_missing=True) for name in _OF_ROLLBACKS)),
            left_out=set(mending.part("quarantine", _is_list_of_counts, [], may_be_missing=True)),
        )
        mending.warn()
        rollbacks.warn()
        return history

    def to_state(self, *, with_rollbacks: bool, with_quarantine: bool) -> dict[str, Any]:
        """For a checkpoint, in plain types."""
        state: dict[str, Any] = {"version": VERSION, "guards": self.guards, "num_replays": self.num_replays}
        if with_rollbacks:
            state["recovery"] = asdict(self.rollbacks)
        if with_quarantine:
            state["quarantine"] = sorted(self.left_out)
        return state

    def belongs_to(self, module: LightningModule) -> bool:
        """Whether it is that of training this module."""
        return self._module is not None and self._module() is module

    def of(self, module: LightningModule) -> History:
        """The same, of training this module."""
        self._module = weakref.ref(module)
        return self

    def __getstate__(self) -> dict[str, Any]:
        # A copy in another process, or of a guard for another Trainer, belongs to no module.
        return {entry.name: getattr(self, entry.name) for entry in fields(self)} | {"_module": None}


def _is_mapping(value: Any) -> bool:
    return isinstance(value, Mapping)


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple))


def _is_list_of_counts(value: Any) -> bool:
    return _is_list(value) and all(map(is_count, value))
