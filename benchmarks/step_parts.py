"""What the guard's share of a small step is made of: Trainers with ever more of it take turns, step by step.

The network is the MLP of three layers of `benchmarks.step`, with fused AdamW, on the CPU; the guard logs as it does there.
"""

from __future__ import annotations

import logging
import tempfile
import time
import warnings
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim import Optimizer

from benchmarks._interleaved import Timings, Variant, interleave
from benchmarks._report import begin, parser, table
from benchmarks._workloads import WORKLOADS
from benchmarks.step import HISTOGRAM_EVERY, MAX_NORM, pausing_trainers
from lightning_gradguard import GradGuard

ROUNDS, WARMUP, MAX_SECONDS = 2500, 100, 60.0
PLAIN = "no clipping"


class Idle(Callback):
    """Has the hooks that the guard has, and does nothing in them."""

    def on_train_batch_start(self, *_: Any) -> None: ...

    def on_before_backward(self, *_: Any) -> None: ...

    def on_before_optimizer_step(self, *_: Any) -> None: ...

    def on_train_batch_end(self, *_: Any) -> None: ...


class Norms(Callback):
    """Takes the norms of all gradients, as any clipping has to."""

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        norms = torch.stack(torch._foreach_norm([parameter.grad for parameter in optimizer.param_groups[0]["params"]]))
        torch.linalg.vector_norm(norms).item()
        norms.tolist()


def guard(**settings: Any) -> dict[str, Any]:
    """Settings of a Trainer with a guard."""
    return {"callbacks": [GradGuard(clip=MAX_NORM, histogram_every_n_steps=HISTOGRAM_EVERY, **settings)]}


def variants() -> dict[str, dict[str, Any]]:
    """Settings of each Trainer."""
    return {
        PLAIN: {},
        f"gradient_clip_val={MAX_NORM}": {"gradient_clip_val": MAX_NORM},
        "a callback that does nothing": {"callbacks": [Idle()]},
        "a callback that takes norms": {"callbacks": [Norms()]},
        "guard without explosion, vanishing, replays": guard(explosion=None, vanishing=None, max_replays=0),
        "guard without replays": guard(max_replays=0),
        "guard": guard(),
    }


def compare(*, quick: bool) -> Timings:
    """Time a step of each."""
    with tempfile.TemporaryDirectory() as folder:
        trainers = pausing_trainers(variants(), WORKLOADS["mlp3"], "fused", accelerator="cpu", folder=folder, quick=quick)
        timings = interleave(
            {name: Variant(trainer.step) for name, trainer in trainers.items()},
            rounds=3 if quick else ROUNDS,
            warmup=2 if quick else WARMUP,
            max_seconds=MAX_SECONDS,
            device="cpu",
            clock=time.perf_counter,
        )
        for trainer in trainers.values():
            trainer.finish()
    return timings


def main() -> None:
    """Print what each adds to a step."""
    chosen = parser(__doc__).parse_args()
    console = begin(chosen)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        timings = compare(quick=chosen.quick)
    rows = [
        (
            name,
            f"{(timings.median(name) - timings.median(PLAIN)) * 1e6:.0f}",
            f"{(timings.mean(name) - timings.mean(PLAIN)) * 1e6:.0f}",
        )
        for name in variants()
    ]
    title = f"MLP of three layers, fused AdamW; us over {PLAIN}, {timings.median(PLAIN) * 1e3:.3f} ms"
    console.print(table(title, ["variant", "median", "mean"], rows))


if __name__ == "__main__":
    main()
