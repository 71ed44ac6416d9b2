"""`kill_and_resume`, which users try their own module with."""

from __future__ import annotations

import math
import signal
from multiprocessing import Pipe

import pytest
import torch
from testing_trainings import failing, forgetful, instant, with_a_trainer

from lightning_gradguard import Alert
from lightning_gradguard.files.json_lines import Reader
from lightning_gradguard.forensics.bundle import Bundle
from lightning_gradguard.testing import KillReport, Outcome, differences, kill_and_resume, kills


def test_training_that_resumes_comes_to_the_same_end(tmp_path):
    """Weights, the guard's state and the counts, bit for bit."""
    report = kill_and_resume(with_a_trainer, tmp_path, num_kills=2)
    assert report.survived, str(report)
    assert len(report.outcomes) == 2
    assert str(report) == "2 of 2 killed trainings came to the same end, bit for bit."


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("number", [1, 100])
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_training_that_is_told_to_stop_leaves_whole_files_and_resumes_to_the_same_end(number, name, tmp_path):
    """By Ctrl-C, or by a cluster, at random moments."""
    report = kill_and_resume(with_a_trainer, tmp_path, num_kills=number, signal_number=getattr(signal, name))
    assert report.survived, str(report)
    for path in tmp_path.rglob("alerts.jsonl"):
        reader = Reader(path, Alert.from_dict)
        assert {alert.kind for alert in reader.read()} == {"nonfinite"}
        assert reader.left_out.count == 0
    for path in tmp_path.rglob("*.bundle.pt"):
        assert Bundle.load(path).alert["kind"] == "nonfinite"
    assert not list(tmp_path.rglob(".*.tmp"))


def test_training_that_does_not_is_found_out(tmp_path):
    """One that counts how often it was begun."""
    report = kill_and_resume(forgetful, tmp_path, num_kills=1)
    assert not report.survived
    assert report.outcomes[0].differences == (": 1 against 2",)
    assert "0 of 1 killed trainings" in str(report)


def test_training_that_ends_with_an_error_is_one(tmp_path):
    """Its exit code is said."""
    with pytest.raises(RuntimeError, match="exit code 3"):
        kill_and_resume(failing, tmp_path, num_kills=1)


def test_training_that_is_over_too_soon_is_an_error(tmp_path, monkeypatch):
    """Nothing was killed, so nothing is known."""
    monkeypatch.setattr(kills, "_MAX_TRIES", 1)
    with pytest.raises(RuntimeError, match="let it take more steps"):
        kills._Runs(instant).killed(tmp_path / "a", 60.0, None)


def test_function_that_no_other_process_can_import_is_an_error(tmp_path):
    """A function in a function."""
    with pytest.raises((AttributeError, TypeError), match=r"[Cc]an't pickle|local object"):
        kill_and_resume(lambda folder: 1, tmp_path)


class Unreadable:
    """A training that another process gets, but can't make of what it gets."""

    def __call__(self, folder):
        """Never begins."""

    def __reduce__(self):
        return failing, (None,)


def test_training_whose_process_can_not_be_started_is_an_error(tmp_path):
    """Rather than to wait for it."""
    with pytest.raises(RuntimeError, match="could not be started"):
        kills._Runs(Unreadable()).to_the_end(tmp_path)


def test_arguments_out_of_range_are_refused(tmp_path):
    """No kills at all, and a folder that something would be gone on from."""
    with pytest.raises(ValueError, match="`num_kills` must be an integer >= 1, got 0"):
        kill_and_resume(instant, tmp_path, num_kills=0)
    (tmp_path / "last.ckpt").write_text("")
    with pytest.raises(ValueError, match="`folder` must be empty"):
        kill_and_resume(instant, tmp_path)


def test_differences_are_named():
    """In trees of all sorts; NaN is NaN, and minus zero is not zero."""
    nan = torch.tensor([math.nan, 1.0])
    assert differences([nan, math.nan, {"a": (1, "b")}], [nan.clone(), math.nan, {"a": (1, "b")}]) == []
    assert differences({"a": [1, 2]}, {"a": [1, 2, 3], "b": 1}) == [
        "['b'] is in one of them only",
        "['a']: 2 against 3 entries",
    ]
    assert differences(torch.zeros(2), torch.tensor([-0.0, 0.0])) == [": 1 of 2 elements differs"]
    assert differences(torch.zeros(2), torch.zeros(2, 1)) == [": torch.float32 [2] against torch.float32 [2, 1]"]
    assert differences(1, 1.0) == [": 1 against 1.0"]


def test_report_shows_the_first_differences_and_counts_the_others():
    """A large module has thousands."""
    report = KillReport(1.0, (Outcome(0.5, tuple(f"w{number}" for number in range(9))),))
    assert str(report).splitlines()[-1] == "killed after 0.50 s: 4 more differences"


def _asks_about_ctrl_c(folder):
    return {"hears": signal.getsignal(signal.SIGINT) is signal.default_int_handler}


def test_training_hears_ctrl_c_where_a_background_job_would_not(tmp_path, request):
    """Such a job ignores it, and so does what it starts."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    here, there = Pipe(duplex=False)
    kills._run(_asks_about_ctrl_c, tmp_path, there)
    assert here.recv() == "begun"
    assert torch.load(tmp_path / kills._RESULT, weights_only=True) == {"hears": True}
