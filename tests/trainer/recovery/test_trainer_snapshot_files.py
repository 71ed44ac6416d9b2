"""Snapshots on disk that are damaged, deleted, or a stranger's, when training goes back."""

from __future__ import annotations

import os
import pickle
import warnings

import pytest
import torch
from lightning_package import Callback
from toys import Net, fit, make_batches

from lightning_gradguard import GradGuard, Rollback
from lightning_gradguard.trainer.recovery.snapshot_storage import random_states_in

FAULT, BEFORE = 20, 19


class Runs:
    """Is unpickled by a call."""

    def __reduce__(self):
        return (pytest.fail, ("code of a stranger's file has run",))


class Spoils(Callback):
    """Does something to the newest snapshots just before training goes back."""

    def __init__(self, spoil, rollback, number):
        self.spoil, self.rollback, self.number = spoil, rollback, number
        self.names = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == BEFORE:
            paths = sorted(self.rollback.directory.glob("step-*.ckpt"))
            self.names = [path.name for path in paths]
            for path in paths[-self.number :]:
                self.spoil(path)


def cut(path):
    """Half of the file."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def delete(path):
    """None of it."""
    path.unlink()


def overwrite(path):
    """With bytes of no meaning, and no sign of it from outside."""
    about = path.stat()
    with path.open("r+b") as file:
        file.write(b"x" * about.st_size)
    os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns))


def replace_by_code(path):
    """A file that runs code when it is unpickled."""
    path.unlink()
    path.write_bytes(pickle.dumps(Runs()))


def replace_by_archive_with_code(path):
    """The same as torch writes it."""
    content = torch.load(path, weights_only=True)
    path.unlink()
    torch.save({**content, "more": Runs()}, path)


@pytest.mark.parametrize("spoil", [cut, delete, overwrite, replace_by_code, replace_by_archive_with_code])
@pytest.mark.parametrize(("number", "kinds"), [(1, ["nonfinite", "rollback"]), (3, ["nonfinite", "snapshot"])])
def test_snapshot_that_can_not_be_used_is_passed_over(spoil, number, kinds, tmp_path):
    """An older one is gone back to; without any, the step is skipped and training goes on."""
    rollback = Rollback(every_n_steps=4, confirm_steps=1, keep=3, skip_batches=0, directory=tmp_path / "kept")
    guard = GradGuard(nonfinite="rollback", rollback=rollback, max_bundle_mib=None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(tmp_path, Net({FAULT: "nan"}), Spoils(spoil, rollback, number), guard, batches=make_batches(26))
    assert [alert.kind for alert in guard.alerts] == kinds
    assert guard.num_steps == 26


def test_user_objects_in_the_runs_own_snapshots_come_back(tmp_path):
    """They are this run's own files."""

    class Keeps(Callback):
        seen = None

        def on_save_checkpoint(self, trainer, pl_module, checkpoint):
            checkpoint["own"] = complex

        def on_load_checkpoint(self, trainer, pl_module, checkpoint):
            self.seen = checkpoint["own"]

    keeps = Keeps()
    rollback = Rollback(every_n_steps=4, confirm_steps=1, directory=tmp_path / "kept")
    guard = GradGuard(nonfinite="rollback", rollback=rollback, max_bundle_mib=None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(tmp_path, Net({FAULT: "nan"}), keeps, guard, batches=make_batches(26))
    assert guard.alerts[-1].kind == "rollback"
    assert keeps.seen is complex


@pytest.mark.parametrize("states", [5, [], [5], [{}], [{"python": (3, (1,), None), "numpy": 1, "torch": 2, "cuda": None}]])
def test_damaged_random_states_are_not_used(states):
    """The generators are as they were."""
    before = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert random_states_in({"gradguard_random_states": states}) is None
    assert torch.equal(torch.get_rng_state(), before)
