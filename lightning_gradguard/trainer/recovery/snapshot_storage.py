"""Where snapshots are kept: in CPU memory, or as checkpoints on disk."""

from __future__ import annotations

import copy
import inspect
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from torch import distributed as dist

from lightning_gradguard.errors import GuardWarning
from lightning_gradguard.files.torch_files import UnreadableError, load_plain
from lightning_gradguard.measure.distributed import Ranks
from lightning_gradguard.pipeline import Pipeline
from lightning_gradguard.recovery.host import available_bytes
from lightning_gradguard.recovery.rollback import PENDING, SUFFIX, snapshots_in
from lightning_gradguard.recovery.snapshot_files import delete, identity, rename
from lightning_gradguard.trainer.conflicts import ConflictError
from lightning_gradguard.trainer.packages import tell_of_checkpoint
from lightning_gradguard.trainer.recovery.run_state import RunState, random_states, set_random_states
from lightning_gradguard.trainer.strategies import engine_of
from lightning_gradguard.wording import counted

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

RANDOM_KEY = "gradguard_random_states"
"""Where a snapshot on disk holds the random states of all ranks, first rank first."""

T = TypeVar("T")


class SnapshotStorage(Protocol[T]):
    """Keeps snapshots. All ranks call the same methods at the same points."""

    def describe(self, num_snapshots: int) -> str:
        """Where they go, and what that takes."""

    def begin(self, step: int) -> T:
        """Keep the state that training begins with."""

    def write(self, step: int, reuse: T | None) -> T:
        """Keep the present state.

        Args:
            step: how many steps have been taken.
            reuse: an earlier snapshot, which is given up.

        Raises:
            OSError, MemoryError, RuntimeError: where there is no room.
        """

    def confirm(self, content: T) -> T:
        """A snapshot has turned out good."""

    def remove(self, content: T) -> None:
        """A snapshot is given up."""

    def is_there(self, content: T) -> bool:
        """Whether a snapshot looks as if it could be brought back."""

    def load(self, content: T) -> None:
        """Read a snapshot, and change nothing yet.

        Raises:
            Exception: whatever a damaged file gives.
        """

    def keep_only(self, contents: Sequence[T]) -> None:
        """Give up whatever else there is."""

    def restore(self, content: T) -> None:
        """Bring a snapshot back that has been loaded; the clock goes on."""


class InMemory:
    """Snapshots in CPU memory, each rank's own.

    Args:
        state: what is kept.
    """

    def __init__(self, state: RunState) -> None:
        self._state = state
        self._spare: dict[str, Any] | None = None

    def describe(self, num_snapshots: int) -> str:
        """How much memory they take on this rank."""
        size = num_snapshots * self._state.num_bytes() / 1e6
        return f"{counted(num_snapshots, 'snapshot')} in CPU memory, {size:,.1f} MB a rank"

    def begin(self, step: int) -> dict[str, Any]:
        """Copy it; the optimizers have no state yet as a rule."""
        return self.write(step, None)

    def write(self, step: int, reuse: dict[str, Any] | None) -> dict[str, Any]:  # noqa: ARG002 - of the protocol
        """Copy the state; into memory that has been used before where there is such."""
        memory, self._spare = reuse or self._spare, None
        available = None if memory else available_bytes()
        if available is not None and (needed := self._state.num_bytes()) > available:
            raise MemoryError(f"{needed / 1e6:,.1f} MB are needed, {available / 1e6:,.1f} MB are there")
        return self._state.take(memory)

    def confirm(self, content: dict[str, Any]) -> dict[str, Any]:
        """Nothing to do."""
        return content

    def remove(self, content: dict[str, Any]) -> None:
        """Keep the memory for the next one."""
        self._spare = content

    def is_there(self, content: dict[str, Any]) -> bool:
        """It always is."""
        return bool(content)

    def load(self, content: dict[str, Any]) -> None:
        """It is in memory."""

    def keep_only(self, contents: Sequence[dict[str, Any]]) -> None:
        """There is nothing else."""

    def restore(self, content: dict[str, Any]) -> None:
        """Copy it back."""
        self._state.put_back(content)


class OnDisk:
    """Snapshots as Lightning's checkpoints, from which a killed run is resumed as well.

    A file has its name only once it is whole and on the disk; until it is confirmed its name ends with ".pending".

    Args:
        trainer: whose state is kept.
        state: the same, for what a checkpoint doesn't cover.
        guards: one for each optimizer.
        directory: for the files; made if it is not there.

    Raises:
        ConflictError: if the folder holds another run's snapshots.
    """

    def __init__(self, trainer: Trainer, state: RunState, guards: Sequence[Pipeline], directory: str | Path) -> None:
        self._trainer = trainer
        self._state = state
        self._guards = guards
        self._directory = Path(directory).resolve()
        self._own: set[tuple[int, ...]] = set()
        # The first rank's finding, since it may have begun to write when another one looks.
        others = trainer.strategy.broadcast([path.name for path in snapshots_in(directory)])
        if others and not trainer.ckpt_path:
            raise ConflictError(
                f"`directory` must hold no snapshots of another run, got {str(directory)!r} with {others[-1]}. To go on "
                "from there pass `ckpt_path=rollback.latest()` to `fit`; else name another folder, or empty this one."
            )

    def describe(self, num_snapshots: int) -> str:
        """How much room they take."""
        size = num_snapshots * self._state.num_bytes() / 1e6
        return f"{counted(num_snapshots, 'snapshot')} in {self._directory}, {size:,.1f} MB"

    def begin(self, step: int) -> Path:
        """A resumed run begins with the checkpoint that it was resumed from."""
        if not self._trainer.ckpt_path:
            return self.write(step, None)
        path = Path(self._trainer.ckpt_path).resolve()
        self._own.add(identity(path))  # `fit` has just read it
        return path

    def write(self, step: int, reuse: Path | None) -> Path:
        """Save a checkpoint, and give it its name when it is whole."""
        if reuse is not None:
            self.remove(reuse)
        whole = self._directory / f"step-{step:09d}{SUFFIX}{PENDING}"
        part = whole.with_suffix(".part")
        checkpoint = self._trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
        checkpoint[RANDOM_KEY] = _of_all_ranks(random_states())
        try:
            self._save(checkpoint, part)
        except (OSError, RuntimeError) as error:
            self.remove(part)
            # torch says only at which position it failed; why, the file has said before.
            raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None
        if self._trainer.is_global_zero:
            rename(part, whole)
            self._own.add(identity(whole))
        return whole

    def _save(self, checkpoint: dict[str, Any], path: Path) -> None:
        if engine_of(self._trainer).saves_folders:
            self._trainer.strategy.save_checkpoint(checkpoint, path)
            self._trainer.strategy.barrier()
        elif self._trainer.is_global_zero:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())

    def confirm(self, content: Path) -> Path:
        """Give it the name that says so."""
        good = content.with_suffix("")
        if content != good and content.suffix == PENDING:
            if self._trainer.is_global_zero:
                rename(content, good)
            return good
        return content

    def remove(self, content: Path) -> None:
        """Delete it, if it is of our own."""
        if self._trainer.is_global_zero and content.parent == self._directory:
            delete(content)

    def is_there(self, content: Path) -> bool:
        """Nobody has deleted it, or put a file in its place that runs code when it is read; the first rank looks."""
        try:
            if self._trainer.is_global_zero and identity(content) not in self._own:
                load_plain(content)
            content.stat()
        except (OSError, UnreadableError):
            return False
        return True

    def load(self, content: Path) -> None:
        """Read it. What the user's own code has put into a file of this run's may be any object."""
        connector = self._trainer._checkpoint_connector
        path_before = connector._ckpt_path
        # The argument is new in Lightning 2.6; before, everything is read.
        takes = "weights_only" in inspect.signature(connector.resume_start).parameters
        try:
            connector.resume_start(content, **({"weights_only": False} if takes else {}))
        finally:
            connector._ckpt_path = path_before

    def restore(self, content: Path) -> None:  # noqa: ARG002 - of the protocol
        """Bring back what was read. Metrics of the epoch begin afresh, since no checkpoint holds them."""
        connector = self._trainer._checkpoint_connector
        path_before = connector._ckpt_path
        settings = [[dict(group) for group in optimizer.param_groups] for optimizer in self._trainer.optimizers]
        checkpoint = connector._loaded_checkpoint
        states = checkpoint["callbacks"].get("GradGuard", {"guards": []})["guards"]
        connector.restore_model()
        tell_of_checkpoint(self._trainer, checkpoint)
        connector.restore_precision_plugin_state()
        connector.restore_optimizers()
        connector.resume_end()
        connector._ckpt_path = path_before
        for optimizer, groups in zip(self._trainer.optimizers, settings, strict=True):
            for group, before in zip(optimizer.param_groups, groups, strict=True):
                group.update({key: value for key, value in before.items() if key != "params"})
            optimizer.zero_grad(set_to_none=True)
        for guard, state in zip(self._guards, states, strict=False):  # none if the run was resumed from one without a guard
            guard.return_to(copy.deepcopy(state))
        self._state.reset_metrics()

    def keep_only(self, contents: Sequence[Path]) -> None:
        """Delete what an earlier part of this run, or one that was killed, has left here."""
        if self._trainer.is_global_zero:
            kept = set(contents)
            for pattern in (f"step-*[0-9]{SUFFIX}", f"step-*{PENDING}", "step-*.part"):
                for path in self._directory.glob(pattern):
                    if path not in kept:
                        delete(path)


def _of_all_ranks(states: dict[str, Any]) -> list[dict[str, Any]]:
    ranks = Ranks.current()
    if ranks.size == 1:
        return [states]
    found: list[Any] = [None] * ranks.size
    dist.all_gather_object(found, states)
    return found


def random_states_in(checkpoint: Mapping[str, Any]) -> dict[str, Any] | None:
    """This rank's random states in a snapshot; None in other checkpoints, and for as many ranks as there were not then."""
    ranks, states = Ranks.current(), checkpoint.get(RANDOM_KEY, [])
    if not isinstance(states, list) or len(states) != ranks.size:
        return None
    present = random_states()
    try:
        set_random_states(states[ranks.rank])
    except Exception as error:  # noqa: BLE001 - a damaged state may raise anything
        warnings.warn(
            f"The random states in the checkpoint are damaged ({type(error).__name__}) and not used.",
            GuardWarning,
            stacklevel=2,
        )
        return None
    finally:
        set_random_states(present)
    found: dict[str, Any] = states[ranks.rank]
    return found
