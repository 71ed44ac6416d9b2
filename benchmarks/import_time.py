"""What importing costs, each time in a fresh interpreter."""

from __future__ import annotations

import subprocess
import sys
from functools import partial

from benchmarks._interleaved import Variant, interleave
from benchmarks._report import begin, parser, timing_table

ROUNDS, WARMUP, MAX_SECONDS = 30, 2, 120.0
BAR_MS = 60.0
BARE, PACKAGE = "bare Python", "import lightning_gradguard"
CODE = {
    BARE: "pass",
    PACKAGE: PACKAGE,
    "import torch": "import torch",
    "import lightning.pytorch": "import lightning.pytorch",
    "from lightning_gradguard import GradGuard": "from lightning_gradguard import GradGuard",
}


def _run(code: str) -> None:
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def main() -> None:
    """Compare with bare Python, and the class with what it stands on."""
    chosen = parser(__doc__).parse_args()
    console = begin(chosen)
    names = (BARE, PACKAGE) if chosen.quick else CODE
    timings = interleave(
        {name: Variant(partial(_run, CODE[name])) for name in names},
        rounds=2 if chosen.quick else ROUNDS,
        warmup=1 if chosen.quick else WARMUP,
        max_seconds=MAX_SECONDS,
    )
    bare = timings.median(BARE)
    over = {name: f"{(timings.median(name) - bare) * 1e3:.1f}" for name in names}
    met = "met" if (timings.median(PACKAGE) - bare) * 1e3 <= BAR_MS else "missed"
    more = {"ms over bare Python": over, f"at most {BAR_MS:g} ms": {PACKAGE: met}}
    console.print(timing_table("Import", timings, [BARE], more))


if __name__ == "__main__":
    main()
