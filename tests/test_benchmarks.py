"""Every benchmark runs alone and prints its table."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NAMES = [*sorted(path.stem for path in (ROOT / "benchmarks").glob("*.py") if not path.stem.startswith("_")), "packages"]
pytestmark = pytest.mark.slow


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.fixture(autouse=True)
def _extra():
    """What the tables and the turns need."""
    pytest.importorskip("rich")
    pytest.importorskip("greenlet")


@pytest.mark.parametrize("name", NAMES)
def test_benchmark_quick_prints_a_table(name: str):
    """In its smallest form, from a fresh interpreter."""
    done = _run("-m", f"benchmarks.{name}", "--quick")
    assert done.returncode == 0, done.stderr
    assert "\u2501" in done.stdout


def test_benchmark_started_by_its_path_says_how_to_start_it():
    """There the folder's `logging` hides the standard library's."""
    done = _run("benchmarks/hook.py")
    assert done.returncode == 1
    assert "python -m benchmarks" in done.stderr
