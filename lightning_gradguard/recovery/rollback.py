"""How a run comes back: the settings of the action "rollback"."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lightning_gradguard.policy import require_float, require_int

SUFFIX = ".ckpt"
PENDING = ".pending"


@dataclass(frozen=True)
class Rollback:
    """When states are kept, and what happens when training goes back to one.

    Attributes:
        every_n_steps: optimizer steps between two snapshots, >= 1. Few: little is lost, and more time is spent copying.
            After each rollback in a row it is halved, down to `confirm_steps`, until there is a new good snapshot.
        confirm_steps: healthy steps after which a snapshot counts as good, >= 0. 0: at once, so that one taken while the
            training already fell apart may be gone back to.
        keep: snapshots that are kept at a time, >= 2: one that is good, and one that has yet to prove it.
        skip_batches: batches that are passed over after a rollback, beside those since the snapshot, >= 0; rounded up to
            whole accumulation windows, and never beyond the end of the epoch.
        lr_factor: by how much every learning rate is multiplied for `cooldown_steps` after a rollback, > 0 and <= 1.
        cooldown_steps: optimizer steps for which it is, >= 0.
        max_rollbacks: rollbacks in a row, that is without a new good snapshot between them, >= 1; where one more were
            needed, training stops, at the last good state.
        directory: where snapshots are kept, as checkpoints that `fit(ckpt_path=...)` resumes from; None: in CPU memory.

    Raises:
        ValueError: for values outside these ranges.

    >>> Rollback(every_n_steps=50, lr_factor=0.5, cooldown_steps=100).keep
    2
    """

    every_n_steps: int = 100
    confirm_steps: int = 20
    keep: int = 2
    skip_batches: int = 10
    lr_factor: float = 1.0
    cooldown_steps: int = 0
    max_rollbacks: int = 5
    directory: str | Path | None = None

    def __post_init__(self) -> None:
        require_int("every_n_steps", self.every_n_steps, at_least=1, remedy="The default is 100.")
        require_int("confirm_steps", self.confirm_steps, at_least=0, remedy="0 trusts every snapshot at once.")
        require_int("keep", self.keep, at_least=2, remedy="One is good while the other has yet to prove it.")
        require_int("skip_batches", self.skip_batches, at_least=0, remedy="0 passes over no more than what has been seen.")
        require_float("lr_factor", self.lr_factor, above=0.0, up_to=1.0, remedy="1.0 leaves learning rates alone.")
        require_int("cooldown_steps", self.cooldown_steps, at_least=0, remedy="0 leaves learning rates alone.")
        require_int("max_rollbacks", self.max_rollbacks, at_least=1, remedy="For no rollbacks use the action 'skip'.")

    def latest(self) -> Path | None:
        """The newest good snapshot in `directory`, for `fit(model, ckpt_path=rollback.latest())`; None without one."""
        found = snapshots_in(self.directory) if self.directory is not None else []
        return found[-1] if found else None


def snapshots_in(directory: str | Path) -> list[Path]:
    """The good snapshots in a folder, oldest first; files half written or not yet confirmed are none."""
    return sorted(Path(directory).glob(f"step-*[0-9]{SUFFIX}"))
