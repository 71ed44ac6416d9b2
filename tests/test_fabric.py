"""The example of a Fabric loop over two ranks."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

_EXAMPLE = Path(__file__).parents[1] / "examples" / "fabric.py"


def test_guard_in_a_fabric_loop_skips_on_both_ranks_what_one_has_damaged(tmp_path):
    """Both say the same of it, and the weights end finite and alike."""
    done = subprocess.run([sys.executable, str(_EXAMPLE)], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for rank in (0, 1):
        assert f"rank {rank} skipped step 12: rank 1 saw the damage first" in done.stdout
        pattern = rf"rank {rank}: 20 steps, \d+ clipped, 1 skipped; weights finite: True, largest spread between ranks: 0"
        assert re.search(pattern, done.stdout)
