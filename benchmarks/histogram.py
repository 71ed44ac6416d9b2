"""Histograms of every gradient: the guard's over `SummaryWriter.add_histogram` for each.

The guard's row is a whole `step()`, norms and verdicts included, with the event in the file at the end of it. What the
histograms add to it is the difference to the row without.
"""

from __future__ import annotations

import tempfile

import torch
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from benchmarks._interleaved import Timings, Variant, interleave
from benchmarks._report import begin, parser, timing_table
from benchmarks._workloads import GPT, MLP, describe
from lightning_gradguard import Guard
from lightning_gradguard.sinks import TensorBoardSink

ROUNDS, WARMUP, MAX_SECONDS = 100, 3, 40.0
BAR = 50
EACH, GUARD, PLAIN = "add_histogram for each", "guard with histograms", "guard without"


def compare(model: nn.Module, device: str, *, quick: bool) -> Timings:
    """Time each way of writing, with the same gradients."""
    model.to(device)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter) * 1e-3
    named = list(model.named_parameters())
    with tempfile.TemporaryDirectory() as folder, SummaryWriter(folder) as writer:

        def guard(histogram_every_n_steps: int | None) -> Variant:
            made = Guard(
                named,
                log_every_n_steps=0,
                histogram_every_n_steps=histogram_every_n_steps,
                sinks=[TensorBoardSink(writer)],
            )
            return Variant(lambda: (made.step(), writer.flush()))

        def add_each() -> None:
            for name, parameter in named:
                writer.add_histogram(name, parameter.grad, 0)
            writer.flush()

        return interleave(
            {EACH: Variant(add_each), GUARD: guard(1), PLAIN: guard(None)},
            rounds=3 if quick else ROUNDS,
            warmup=1 if quick else WARMUP,
            max_seconds=MAX_SECONDS,
            device=device,
        )


def main() -> None:
    """Both models."""
    chosen = parser(__doc__).parse_args()
    console = begin(chosen)
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        for name, model in {"GPT": GPT(1 if chosen.quick else 6), "MLP": MLP(4 if chosen.quick else 200)}.items():
            timings = compare(model, device, quick=chosen.quick)
            added = timings.median(GUARD) - timings.median(PLAIN)
            more = {
                "times faster": {GUARD: str(timings.ratio(EACH, GUARD))},
                f"what they add, at least {BAR}": {GUARD: f"{timings.median(EACH) / added:.1f}"},
            }
            console.print(timing_table(f"{name}, {describe(model)}, {device}", timings, [EACH], more))


if __name__ == "__main__":
    main()
