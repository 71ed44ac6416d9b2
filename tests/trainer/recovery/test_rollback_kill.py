"""A run with snapshots on disk survives kill -9 at any moment."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

_SCRIPT = Path(__file__).parent / "kill_script.py"


@pytest.mark.slow
def test_run_killed_at_50_random_points_resumes_every_time_to_the_same_end(tmp_path):
    """Every file but those still being written is whole, and the run goes on from the newest good one."""
    path = os.pathsep.join([str(_SCRIPT.parents[2]), os.environ.get("PYTHONPATH", "")])  # for what the Trainer's tests share
    command = [sys.executable, str(_SCRIPT), str(tmp_path), "50"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": path})
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "results.json").read_text())["results"]
    assert len(results) == 50
    assert all(result["killed"] for result in results)
    assert [result for result in results if result["code_after"] != 0 or not result["same"]] == []
    for result in results:
        step = result["latest"] and int(result["latest"].removeprefix("step-").removesuffix(".ckpt"))
        assert result["begun_at"] == step
