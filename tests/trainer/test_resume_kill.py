"""A run that is killed in the middle of an epoch and resumed decides as one that was not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from resume_script import CLIPPERS, KILL_AFTER, NUM_BATCHES, SAVE_EVERY

pytestmark = pytest.mark.slow  # three processes, each with a fork for each clipper

_SCRIPT = Path(__file__).parent / "resume_script.py"
_FIRST = (KILL_AFTER + 1) // SAVE_EVERY * SAVE_EVERY


def _run(folder: Path, mode: str) -> dict[str, int]:
    path = os.pathsep.join([str(_SCRIPT.parents[1]), os.environ.get("PYTHONPATH", "")])  # for what the Trainer's tests share
    command = [sys.executable, str(_SCRIPT), str(folder), mode]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": path})
    assert done.returncode == 0, done.stderr
    codes = json.loads((folder / "codes.json").read_text())
    assert set(codes.values()) == {-signal.SIGKILL if mode == "killed" else 0}, done.stderr
    return codes


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, Path]:
    """Of runs that were never killed, and of ones that were killed and then resumed."""
    whole, killed = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("killed")
    _run(whole, "whole")
    _run(killed, "killed")
    assert not list(killed.glob("*/killed.json"))
    _run(killed, "resumed")
    return whole, killed


@pytest.mark.parametrize("clipper", CLIPPERS)
def test_run_killed_in_an_epoch_and_resumed_decides_bit_for_bit_as_one_never_killed(clipper, folders):
    """Norms, verdicts, limits, patience, cooldown, clipping, and the weights in the end."""
    whole, killed = folders
    expected = json.loads((whole / clipper / "whole.json").read_text())
    found = json.loads((killed / clipper / "resumed.json").read_text())
    assert len(found["decisions"]) == NUM_BATCHES - _FIRST
    assert found["decisions"] == expected["decisions"][_FIRST:]
    assert found["weights"] == expected["weights"]
    assert found["num_skipped"] == expected["num_skipped"] > 1


def test_checkpoint_of_a_killed_run_loads_as_plain_types(folders):
    """Whoever reads it needs no code of this package."""
    for path in folders[1].glob("*/last.ckpt"):
        assert torch.load(path, weights_only=True)["callbacks"]["GradGuard"]["guards"]
