"""What a logged step costs, in time and in bytes of the event file, with 400 parameters.

Run it as `python -m benchmarks.logging`: its name is that of a module of the standard library.
"""

from __future__ import annotations

if __name__ == "logging":
    raise ImportError(
        "A benchmark was started by its path, so its folder hides the standard library's `logging`. "
        "Run `python -m benchmarks.<name>` from the root of the repository."
    )

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from benchmarks._interleaved import Variant, interleave
from benchmarks._report import begin, parser, timing_table
from lightning_gradguard import Guard
from lightning_gradguard.sinks import TensorBoardSink

NUM_LAYERS, WIDTH = 200, 64  # 400 parameters
ROUNDS, WARMUP, MAX_SECONDS = 200, 5, 60.0
BAR_MS = 15.0
NOTHING, SCALARS, ALL = "guard, nothing due", "guard, scalars due", "guard, scalars and histograms due"
NORMS, USUAL = "add_scalar of each norm", "add_scalar and add_histogram of each"


def network(num_layers: int) -> nn.Module:
    """Linear layers in four named stages, with gradients."""
    layers = [nn.Linear(WIDTH, WIDTH) for _ in range(num_layers)]
    model = nn.ModuleDict({f"stage{index}": nn.ModuleList(layers[index::4]) for index in range(4)})
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter) * 1e-3
    return model


class Logged:
    """A way of logging, with an event file of its own.

    Args:
        folder: where that is.
        log: what logs a step.
    """

    def __init__(self, folder: Path, log: Callable[[SummaryWriter], Callable[[], object]]) -> None:
        self._folder = folder
        self._writer = SummaryWriter(str(folder))
        self._log = log(self._writer)
        self._log()  # the first step also writes a description of the page
        self._writer.flush()
        self._before, self._steps = self._size(), 0

    def __call__(self) -> None:
        """Log a step; it is in the file afterwards."""
        self._log()
        self._writer.flush()
        self._steps += 1

    def bytes_per_step(self) -> float:
        """Growth of the file."""
        return (self._size() - self._before) / self._steps

    def close(self) -> None:
        """Close the file."""
        self._writer.close()

    def _size(self) -> int:
        return sum(path.stat().st_size for path in self._folder.iterdir())


def guarded(model: nn.Module, scalars: int, histograms: int | None) -> Callable[[SummaryWriter], Callable[[], object]]:
    """A guard with these intervals."""

    def log(writer: SummaryWriter) -> Callable[[], object]:
        return Guard(
            model.named_parameters(),
            clip=1.0,
            log_every_n_steps=scalars,
            histogram_every_n_steps=histograms,
            sinks=[TensorBoardSink(writer)],
        ).step

    return log


def by_hand(model: nn.Module, *, histograms: bool) -> Callable[[SummaryWriter], Callable[[], object]]:
    """One call of the writer for each parameter."""

    def log(writer: SummaryWriter) -> Callable[[], object]:
        def step() -> None:
            for name, parameter in model.named_parameters():
                writer.add_scalar(f"norm/{name}", parameter.grad.norm(), 0)
                if histograms:
                    writer.add_histogram(name, parameter.grad, 0)

        return step

    return log


def main() -> None:
    """Compare the guard's steps with each other and with logging by hand."""
    chosen = parser(__doc__).parse_args()
    console = begin(chosen)
    model = network(4 if chosen.quick else NUM_LAYERS)
    ways = {
        NOTHING: guarded(model, 0, None),
        SCALARS: guarded(model, 1, None),
        ALL: guarded(model, 1, 1),
        NORMS: by_hand(model, histograms=False),
        USUAL: by_hand(model, histograms=True),
    }
    with tempfile.TemporaryDirectory() as folder:
        logged = {name: Logged(Path(folder) / str(index), log) for index, (name, log) in enumerate(ways.items())}
        timings = interleave(
            {name: Variant(log) for name, log in logged.items()},
            rounds=3 if chosen.quick else ROUNDS,
            warmup=1 if chosen.quick else WARMUP,
            max_seconds=MAX_SECONDS,
        )
        sizes = {name: f"{log.bytes_per_step():,.0f}" for name, log in logged.items()}
        for log in logged.values():
            log.close()
    met = "met" if timings.median(ALL) * 1e3 <= BAR_MS else "missed"
    more = {"bytes": sizes} if chosen.quick else {"bytes": sizes, f"at most {BAR_MS:g} ms": {ALL: met}}
    console.print(timing_table(f"{len(list(model.parameters()))} parameters", timings, [NOTHING], more))


if __name__ == "__main__":
    main()
