"""A run that is killed in the middle of an epoch and resumed decides as one that was not."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from resume_script import CLIPPERS, KILL_AFTER, NUM_BATCHES, SAVE_EVERY

_SCRIPT = Path(__file__).parent / "resume_script.py"


def _run(folder: Path, clipper: str, mode: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(_SCRIPT), str(folder), clipper, mode]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("clipper", CLIPPERS)
def test_run_killed_in_an_epoch_and_resumed_decides_bit_for_bit_as_one_never_killed(clipper, tmp_path):
    """Norms, verdicts, limits, patience, cooldown, clipping and the weights; the checkpoint loads as plain types."""
    (tmp_path / "whole").mkdir()
    whole = _run(tmp_path / "whole", clipper, "whole")
    assert whole.returncode == 0, whole.stderr
    killed = _run(tmp_path, clipper, "killed")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (tmp_path / "killed.json").exists()
    torch.load(tmp_path / "last.ckpt", weights_only=True)
    resumed = _run(tmp_path, clipper, "resumed")
    assert resumed.returncode == 0, resumed.stderr
    expected = json.loads((tmp_path / "whole" / "whole.json").read_text())
    found = json.loads((tmp_path / "resumed.json").read_text())
    first = (KILL_AFTER + 1) // SAVE_EVERY * SAVE_EVERY
    assert len(found["decisions"]) == NUM_BATCHES - first
    assert found["decisions"] == expected["decisions"][first:]
    assert found["weights"] == expected["weights"]
    assert found["num_skipped"] == expected["num_skipped"] > 1
