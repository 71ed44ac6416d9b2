"""A disk that misbehaves for a moment, or for good: one warning for each thing that is lost, and training goes on."""

from __future__ import annotations

import json
import sys
import warnings
from collections import Counter
from contextlib import ExitStack

import pytest
from disk_faults import full, quota, read_only, replaced_by_a_file, small_disk, vanished
from lightning_package import Callback, CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from toys import Net, fit, make_batches

from lightning_gradguard import Alert, GradGuard, Rollback
from lightning_gradguard.errors import GuardWarning, SinkWarning
from lightning_gradguard.files.json_lines import Reader
from lightning_gradguard.forensics.bundle import Bundle
from lightning_gradguard.recovery.quarantine import QuarantineFile

FAULTS = {2: "nan", 6: "nan", 12: "nan", 20: "nan"}
BEGIN, END, NUM_BATCHES = 4, 9, 24
CONDITIONS = [quota, full, read_only, vanished, replaced_by_a_file]
ON_SMALL_DISK = (full, read_only)


class Misbehaves(Callback):
    """Makes the disk misbehave from one batch to another."""

    def __init__(self, condition, folder, end):
        self.condition, self.folder, self.end = condition, folder, end
        self.stack = ExitStack()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == BEGIN:
            self.stack.enter_context(self.condition(self.folder))
        if batch_idx == self.end:
            self.stack.close()


def run(folder, condition, *callbacks, end=END, log=True, **settings):
    """One fit on such a disk: what it raised, if anything, and what was warned of."""
    misbehaves = Misbehaves(condition, folder, end)
    raised = None
    with misbehaves.stack, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            fit(folder, Net(FAULTS, log=log), *callbacks, misbehaves, batches=make_batches(NUM_BATCHES), **settings)
        except Exception as error:  # noqa: BLE001 - what is asked for
            raised = type(error)
    found = [warning for warning in caught if issubclass(warning.category, (SinkWarning, GuardWarning))]
    return raised, Counter(str(warning.message).partition("(")[0] for warning in found)


@pytest.fixture(params=CONDITIONS, ids=lambda condition: condition.__name__)
def condition(request):
    """How the disk misbehaves."""
    return request.param


@pytest.fixture
def folder(condition, tmp_path):
    """Where the run writes."""
    with ExitStack() as stack:
        if condition in ON_SMALL_DISK:
            stack.enter_context(small_disk(tmp_path / "disk"))
        else:
            (tmp_path / "disk").mkdir()
        yield tmp_path / "disk"


def steps_in(folder):
    """Of the alerts in the file."""
    reader = Reader(folder / "gradguard" / "alerts.jsonl", Alert.from_dict)
    return [alert.step for alert in reader.read()]


def test_disk_that_misbehaves_for_a_moment_loses_nothing_that_can_wait(condition, folder):
    """All alerts and quarantined batches are there, later bundles too, and each kind is warned of once at most."""
    guard = GradGuard(quarantine="list", max_bundle_mib=0.01)
    raised, said = run(folder, condition, guard)
    assert raised is None
    assert (guard.num_steps, guard.num_skipped, len(guard.alerts)) == (NUM_BATCHES, 4, 4)
    assert not said or max(said.values()) == 1
    expected = [6, 12, 20] if condition is vanished else [2, 6, 12, 20]
    assert steps_in(folder) == expected
    samples, left_out = QuarantineFile(folder / "gradguard" / "quarantine.jsonl").read()
    lines = (folder / "gradguard" / "quarantine.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(line)["step"] for line in lines if line.endswith("}")] == expected
    assert (samples, left_out.count) == (set(), 0)
    bundles = [Bundle.load(path).alert["step"] for path in (folder / "gradguard").glob("*.bundle.pt")]
    assert sorted(bundles) == ([6, 12, 20] if condition is vanished else [2, 12, 20])
    assert not list(folder.rglob(".*.tmp"))


def test_disk_that_misbehaves_for_good_ends_no_training(condition, folder):
    """Every step is taken."""
    guard = GradGuard(quarantine="list")
    raised, said = run(folder, condition, guard, end=None)
    assert raised is None
    assert (guard.num_steps, guard.num_skipped) == (NUM_BATCHES, 4)
    assert not said or max(said.values()) == 1


@pytest.mark.parametrize("end", [END, None], ids=["moment", "for good"])
def test_event_files_outlive_it_and_so_does_what_the_user_logs(condition, folder, end):
    """Later events of the guard's and of the user's are there, in a new file where need be."""
    raised, said = run(folder, condition, GradGuard(max_bundle_mib=None), end=end, logger=TensorBoardLogger(folder))
    assert raised is None
    assert not said or max(said.values()) == 1
    if end is None:
        return
    (events,) = (EventAccumulator(str(path)).Reload() for path in folder.glob("lightning_logs/version_0"))
    for tag in ("gradguard/global_norm", "train_loss"):
        steps = {event.step for event in events.Scalars(tag)}
        assert steps >= {*range(END + 3, NUM_BATCHES)}
        assert condition is vanished or steps >= {*range(BEGIN)}


def test_csv_logger_ends_well_where_only_the_guard_writes_there(condition, folder):
    """What can't be written of the guard's is given up."""
    raised, _ = run(folder, condition, GradGuard(max_bundle_mib=None), end=None, log=False, logger=CSVLogger(folder))
    assert raised is None


def test_logger_whose_sink_can_not_be_made_is_one_warning(tmp_path):
    """As W&B's without its package; training goes on, with all other sinks."""

    class WandbLogger(CSVLogger):
        """Is told from others by its name."""

    guard = GradGuard()
    with warnings.catch_warnings(record=True) as caught, pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("always")
        patch.setitem(sys.modules, "wandb", None)
        fit(tmp_path, Net(), guard, logger=WandbLogger(tmp_path))
    assert sum("There is no sink for WandbLogger (ModuleNotFoundError" in str(each.message) for each in caught) == 1
    assert guard.num_steps == 12


def test_snapshots_are_kept_again_when_they_can_be(condition, folder):
    """A rollback goes to one of those that are there."""
    rollback = Rollback(every_n_steps=3, confirm_steps=1, directory=folder / "kept")
    raised, _ = run(folder, condition, GradGuard(nonfinite="rollback", rollback=rollback))
    assert raised is None
    assert rollback.latest() is not None
