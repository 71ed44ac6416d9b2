"""Where a run's own files go, in folders that are not what one expects."""

from __future__ import annotations

import os

import pytest
from lightning_package import Callback
from toys import Net, fit, make_batches

from lightning_gradguard import Alert, GradGuard
from lightning_gradguard.errors import GradientWarning
from lightning_gradguard.files.json_lines import Reader
from lightning_gradguard.forensics.bundle import Bundle

pytestmark = pytest.mark.filterwarnings("ignore::lightning_gradguard.errors.GradientWarning")


def _steps(path):
    return [alert.step for alert in Reader(path, Alert.from_dict).read()]


def test_program_that_changes_its_directory_has_all_alerts_in_one_file(tmp_path, monkeypatch):
    """Though its log_dir is relative."""
    (tmp_path / "first").mkdir()
    (tmp_path / "second").mkdir()
    monkeypatch.chdir(tmp_path / "first")

    class Moves(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 3:
                os.chdir(tmp_path / "second")

    fit("logs", Net({1: "nan", 6: "nan"}), GradGuard(), Moves(), batches=make_batches(8))
    (path,) = tmp_path.rglob("alerts.jsonl")
    assert path.is_relative_to(tmp_path / "first" / "logs")
    assert _steps(path) == [1, 6]
    assert len(list(path.parent.glob("*.bundle.pt"))) == 2


@pytest.mark.parametrize(("root", "place"), [("memory://bucket/run", "memory/bucket/run"), ("file:{}/run", "run")])
def test_files_of_a_run_whose_folder_is_an_address_are_on_this_machine(root, place, tmp_path, monkeypatch):
    """Where lines can be appended."""
    monkeypatch.chdir(tmp_path)
    fit(root.format(tmp_path), Net({1: "nan"}), GradGuard(), batches=make_batches(4))
    (path,) = tmp_path.rglob("alerts.jsonl")
    assert path == tmp_path / place / "gradguard" / "alerts.jsonl"
    assert _steps(path) == [1]


def test_second_run_in_a_folder_leaves_the_files_of_the_first(tmp_path):
    """Both had a bad step of the same number."""
    for width in (1.0, 2.0):
        batches = make_batches(4)
        batches.batches[1][1].mul_(width)
        with pytest.warns(GradientWarning, match="gradguard replay"):
            fit(tmp_path, Net({1: "nan"}), GradGuard(), batches=batches)
    paths = sorted((tmp_path / "gradguard").glob("*.bundle.pt"))
    assert [path.name for path in paths] == ["nonfinite-step1-2.bundle.pt", "nonfinite-step1.bundle.pt"]
    second, first = (Bundle.load(path).batches[0]["batch"][1] for path in paths)
    assert second.equal(2.0 * first)
    alerts = [*Reader(tmp_path / "gradguard" / "alerts.jsonl", Alert.from_dict).read()]
    assert ["step1-2.bundle.pt" in alert.message for alert in alerts] == [False, True]
