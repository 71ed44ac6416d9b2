"""What `UpdateRatio` costs: one measured update, over a plain training step, and beside a copy of all weights.

A measured update is the sample before the optimizer's step, the ratios after it, their way to the host, and the detector.
After the first hundred steps one step in fifty is measured.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from rich.console import Console
from torch import nn

from benchmarks._interleaved import Timings, Variant, interleave
from benchmarks._report import begin, parser, table
from benchmarks._workloads import GPT, MLP, NUM_CLASSES, SEQUENCE_LENGTH, VOCABULARY
from lightning_gradguard import UpdateRatio
from lightning_gradguard.layout import Layout
from lightning_gradguard.measure.updates import UpdateMeter
from lightning_gradguard.record import Measurement

ROUNDS, WARMUP, MAX_SECONDS = 100, 5, 20.0
EVERY = 50
STEP, SAMPLE, COPY = "training step, AdamW", "measured update", "copy of all matrices, and its norms"
_SMALL = 64


class _Small(nn.Module):
    """Three layers, whose steps take a fraction of a millisecond."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(_SMALL, _SMALL), nn.ReLU(), nn.Linear(_SMALL, _SMALL), nn.ReLU())
        self.head = nn.Linear(_SMALL, NUM_CLASSES)

    def forward(self, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """Cross entropy of the class."""
        return nn.functional.cross_entropy(self.head(self.body(batch[0])), batch[1])


def _time(network: nn.Module, batch: object, *, quick: bool) -> Timings:
    parameters = list(network.parameters())
    optimizer = torch.optim.AdamW(parameters, 1e-4)
    layout = Layout.of([f"layers.{i}.weight" for i in range(len(parameters))], [tuple(it.shape) for it in parameters])
    count = len(parameters)
    still = Measurement(layout, np.ones(count), np.ones(count, dtype=np.bool_), float(count**0.5))
    meter, detector = UpdateMeter(), UpdateRatio()
    matrices = [parameter for parameter in parameters if parameter.ndim >= 2]

    def step() -> None:
        optimizer.zero_grad()
        network(batch).backward()
        optimizer.step()

    def sample() -> None:
        meter.start_(parameters)
        ratios = meter.read_(parameters)
        assert ratios is not None
        detector.observe(replace(still, update_ratios=ratios.double().numpy()))
        detector.needs_update()

    @torch.no_grad()
    def copy() -> None:
        copies = [matrix.detach().clone() for matrix in matrices]
        torch.stack([torch.linalg.vector_norm(it) for it in copies])
        torch.stack([torch.linalg.vector_norm(now - it) for now, it in zip(matrices, copies, strict=True)]).tolist()

    variants = {STEP: Variant(step), SAMPLE: Variant(sample), COPY: Variant(copy)}
    rounds, warmup = (3, 1) if quick else (ROUNDS, WARMUP)
    return interleave(variants, rounds=rounds, warmup=warmup, max_seconds=MAX_SECONDS, device="cpu")


def _cases(*, quick: bool) -> dict[str, tuple[nn.Module, object]]:
    tokens = torch.randint(VOCABULARY, (2, SEQUENCE_LENGTH + 1))
    classes = torch.randint(NUM_CLASSES, (64,))
    return {
        "three layers, 9,000 elements": (_Small(), (torch.randn(64, _SMALL), classes)),
        "MLP, 402 small tensors": (MLP(4) if quick else MLP(), (torch.randn(64, 64), classes)),
        "GPT, 10 M elements in 76 tensors": (GPT(1) if quick else GPT(), tokens),
    }


def costs(console: Console, *, quick: bool) -> None:
    """The table; medians, and in brackets the smallest time, which other processes disturb least."""
    rows = []
    for title, (network, batch) in _cases(quick=quick).items():
        timings = _time(network, batch, quick=quick)
        low = {name: float(np.min(seconds)) for name, seconds in timings.seconds.items()}
        cells = [f"{1e3 * timings.median(name):.3f} ({1e3 * low[name]:.3f})" for name in (STEP, SAMPLE, COPY)]
        shares = [
            f"{timings.median(it) / EVERY / timings.median(STEP):.2%} ({low[it] / EVERY / low[STEP]:.2%})"
            for it in (SAMPLE, COPY)
        ]
        rows.append([title, *cells, *shares])
    columns = ["network", f"{STEP}, ms", f"{SAMPLE}, ms", f"{COPY}, ms", "sample, share of a step", "copy, share of a step"]
    console.print(table(f"UpdateRatio, one step in {EVERY} measured", columns, rows))


def main() -> None:
    """The command."""
    chosen = parser(__doc__).parse_args()
    console = begin(chosen)
    costs(console, quick=chosen.quick)


if __name__ == "__main__":
    main()
