"""`python -m benchmarks.gpu`, as far as a machine without a GPU can tell."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command."""
    pytest.importorskip("greenlet")
    command = [sys.executable, "-m", "benchmarks.gpu", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_gpu_benchmark_dry_run_passes_its_checks_and_prints_markdown():
    """On a CPU, by the ways that decisions take on a GPU."""
    done = run("--dry-run")
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 0 failed" in done.stdout
    rows = [line.strip() for line in done.stdout.splitlines() if line.startswith("| ")]
    assert sum("| ok " in row for row in rows) >= 10
    assert any(row.startswith("| ResNet-50") for row in rows)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_benchmark_without_a_gpu_says_so():
    """And does not go on on a CPU, as if that were one."""
    done = run()
    assert done.returncode == 2
    assert "There is no CUDA device" in done.stderr
