"""The action "rollback" in a Trainer's run: when snapshots are taken, and what happens when one is gone back to."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from lightning_gradguard.detectors import Explosion, NonFinite
from lightning_gradguard.errors import GuardWarning, type_and_text
from lightning_gradguard.policy import Action
from lightning_gradguard.record import Position, Record
from lightning_gradguard.recovery import Entry, LoweredRates, Ring, Rollback, available_bytes
from lightning_gradguard.report.alerting import notice
from lightning_gradguard.trainer.guards import Guards
from lightning_gradguard.trainer.history import RollbackProgress
from lightning_gradguard.trainer.recovery.run_state import RunState
from lightning_gradguard.trainer.recovery.skipping_batches import skip_batches
from lightning_gradguard.trainer.recovery.snapshot_storage import InMemory, OnDisk, SnapshotStorage
from lightning_gradguard.trainer.strategies import engine_of
from lightning_gradguard.wording import counted

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

_DAMAGING = (NonFinite.name, Explosion.name)
"""Findings after which weights may be damaged, whatever is done about them."""

_MAX_RETURNS = 3
"""Rollbacks to one snapshot before an older one is tried: a fault that goes on for a while is not the snapshot's."""


class Recovery:
    """Keeps snapshots of a run, and goes back.

    A rollback leaves the run as if every step since the snapshot had been skipped: the state goes back, the clock goes on.
    See `RunState` for which is which.

    Args:
        rollback: the settings.
        trainer: whose run.
        module: what it trains.
        guards: one for each optimizer.
        rollback_detectors: names of the detectors whose action is "rollback"; what they find puts a snapshot in doubt.
        stop: ends the training.
    """

    def __init__(
        self,
        rollback: Rollback,
        trainer: Trainer,
        module: LightningModule,
        guards: Guards,
        *,
        rollback_detectors: Sequence[str],
        stop: Callable[[], None],
    ) -> None:
        self._settings = rollback
        self._trainer = trainer
        self._guards = guards  # not copied: an optimizer may be replaced
        self._doubtful = {*rollback_detectors, *_DAMAGING}
        self._stop = stop
        self._state = RunState(trainer, module, guards)
        self._storage: SnapshotStorage[Any] = (
            InMemory(self._state) if rollback.directory is None else OnDisk(trainer, self._state, guards, rollback.directory)
        )
        self._ring: Ring[Any] = Ring(rollback.keep, rollback.confirm_steps)
        self._lowered: list[LoweredRates] = []
        self._num_steps = 0
        self._steps_since = 0
        self._num_in_a_row = 0  # not in the checkpoint: what a run begins with is good
        self._has_stepped = False
        self._is_doubtful = False
        self._is_due = False
        self._has_failed = False
        self._is_off = False
        self.progress = RollbackProgress()
        """What a resumed run has to know."""

    def start(self) -> str:
        """Before the first step: look whether there is room, and keep the state that training begins with.

        Returns:
            Where snapshots go and what they take, for the user.
        """
        text = self._storage.describe(self._settings.keep)
        if isinstance(self._storage, InMemory) and not self._agree(self._fits()):
            self._is_off = True
            self._report(
                f"No room for {text}: there is less memory than that. Training goes on without rollback.",
                "Free some memory, or keep snapshots on a disk: `rollback=Rollback(directory=...)`.",
            )
        else:
            self._take(is_first=True)
            if self._ring.entries:
                with _deleting():
                    self._storage.keep_only([entry.content for entry in self._ring.entries])
        if self.progress.cooldown_left:
            self._lower_learning_rates()
        return f"GradGuard keeps {text}, one every {counted(self._settings.every_n_steps, 'step').removeprefix('1 ')}."

    def note(self, record: Record) -> None:
        """A step was decided."""
        self._has_stepped = True
        if record.decision.action is Action.ROLLBACK:
            self._is_due = True
        found = any(verdict.kind in self._doubtful and not verdict.is_advisory for verdict in record.verdicts)
        if found or (record.decision.skip and not record.measurement.is_scaler_overflow):
            self._is_doubtful = True

    def after_batch(self) -> None:
        """A batch is done, with all of its optimizers' steps: go back if need be, else see to the snapshots."""
        if not self._has_stepped:
            return
        is_due, is_doubtful = self._is_due, self._is_doubtful
        self._has_stepped = self._is_due = self._is_doubtful = False
        self._num_steps += 1
        self._cool_down()
        if is_due:
            # A step that the device has decided since belongs to the state that is left, too.
            self._guards.flush()
            self._has_stepped = self._is_due = self._is_doubtful = False
            self._go_back()
            return
        self._steps_since += 1
        if is_doubtful:
            self._give_up(self._ring.drop_pending())
            return
        for entry in self._ring.confirm():
            self._confirm(entry)
        if self._steps_since >= self._interval and self._ring.has_room:
            self._take()

    def detach(self) -> None:
        """Leave the optimizers as they were found."""
        for lowered in self._lowered:
            lowered.close()
        self._lowered = []

    @property
    def _interval(self) -> int:
        """Steps between snapshots: fewer after each rollback in a row, so that frequent faults can't undo all progress."""
        every, shortest = self._settings.every_n_steps, max(self._settings.confirm_steps, 1)
        return max(every >> self._num_in_a_row, min(every, shortest))

    def _take(self, *, is_first: bool = False) -> None:
        if self._is_off:
            return
        self._steps_since = 0
        try:
            step = self._trainer.global_step
            content = self._storage.begin(step) if is_first else self._storage.write(step, self._ring.make_room())
            error = None
        except (OSError, MemoryError, RuntimeError) as failure:
            error = failure
        if not self._agree(error is None):
            self._report_failure(error)
            return
        is_good = is_first or self._settings.confirm_steps == 0
        self._ring.add(self._num_steps, self._storage.confirm(content) if is_good else content, is_good=is_good)

    def _fits(self) -> bool:
        available = available_bytes()
        # Ranks on one machine share its memory.
        needed = self._settings.keep * self._state.num_bytes() * self._trainer.num_devices
        return available is None or needed <= available

    def _agree(self, is_well: bool) -> bool:  # noqa: FBT001 - the one thing that is asked
        return self._trainer.strategy.reduce_boolean_decision(is_well, all=True)

    def _go_back(self) -> None:
        self._give_up(self._ring.drop_pending())
        if (entry := self._ring.good) is not None and entry.num_returns >= _MAX_RETURNS:
            self._give_up(self._ring.drop_last())
        while (entry := self._ring.good) is not None and not self._load(entry):
            self._ring.drop(entry)
        if entry is None:
            self._report(
                "There is no good state to go back to. The step is skipped and training goes on.",
                "Look at the alerts before it: what damages the steps?",
            )
            return
        self._storage.restore(entry.content)
        entry.num_returns += 1
        self.progress.num_rollbacks += 1
        self._num_in_a_row += 1
        back = self._num_steps - entry.step
        self._steps_since = 0
        message = f"Training is back in the state from {counted(back, 'step')} ago"
        if self._num_in_a_row > self._settings.max_rollbacks:
            self._tell(
                Action.STOP,
                f"{message}. It is the rollback number {self._num_in_a_row} without a good state in between, so "
                "training stops.",
                "Look at the alerts before it: what damages each attempt?",
                value=back,
            )
            self._stop()
            return
        num_passed = skip_batches(self._trainer, self._settings.skip_batches)
        self.progress.cooldown_left = self._settings.cooldown_steps
        self._lower_learning_rates()
        also = f", {counted(num_passed, 'batch', 'batches')} passed over" if num_passed else ""
        self._tell(Action.ROLLBACK, f"{message}{also}.", "Nothing, if it stays at this.", value=back)

    def _load(self, entry: Entry[Any]) -> bool:
        """Read a snapshot, on all ranks or on none."""
        if not self._agree(self._storage.is_there(entry.content)):
            return False
        error = None
        try:
            self._storage.load(entry.content)
        except Exception as failure:  # noqa: BLE001 - a damaged file may raise anything
            error = failure
        return self._agree(error is None)

    def _confirm(self, entry: Entry[Any]) -> None:
        error = None
        try:
            entry.content = self._storage.confirm(entry.content)
        except OSError as failure:
            error = failure
        if self._agree(error is None):
            self._num_in_a_row = 0
        else:
            self._ring.drop(entry)
            self._report_failure(error)

    def _give_up(self, contents: Sequence[Any]) -> None:
        with _deleting():
            for content in contents:
                self._storage.remove(content)

    def _lower_learning_rates(self) -> None:
        if self._lowered or not self.progress.cooldown_left or self._settings.lr_factor == 1.0:
            return
        masters = engine_of(self._trainer).master_weights
        optimizers = self._trainer.optimizers if masters is None else [masters.optimizer]
        self._lowered = [LoweredRates(optimizer, self._settings.lr_factor) for optimizer in optimizers]

    def _cool_down(self) -> None:
        if self.progress.cooldown_left:
            self.progress.cooldown_left -= 1
            if not self.progress.cooldown_left:
                self.detach()

    def _report_failure(self, error: Exception | None) -> None:
        reason = "on another rank" if error is None else type_and_text(error)
        self._report(
            f"A snapshot could not be kept ({reason}). Training goes on without it.", "Free some room, or change `rollback`."
        )

    def _report(self, message: str, remedy: str) -> None:
        if not self._has_failed:
            self._tell(Action.WARN, message, f"{remedy} Further failures are not shown.", kind="snapshot")
        self._has_failed = True

    def _tell(self, action: Action, message: str, remedy: str, *, kind: str = "rollback", value: float = 0.0) -> None:
        guard = self._guards[0]
        position = guard.last.position if guard.last is not None else Position(step=0, rank=self._trainer.global_rank)
        guard.notify(notice(position, kind, action, message, remedy, value=value))


@contextmanager
def _deleting() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        warnings.warn(f"A snapshot could not be deleted: {error}.", GuardWarning, stacklevel=3)
