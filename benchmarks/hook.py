"""What happens inside the guard on a step that logs nothing, over one `torch._foreach_norm` of the same gradients.

The guard's time is that of `before_backward(loss)` and `step()` together. `Guard` judges each step at once, since its `step`
returns a record; in a Trainer healthy steps are judged several together, so that is measured, too. The optimizer is SGD
without momentum and with a learning rate of zero, whose step is not timed; it has to run where the guard leaves the clipping
to it (fused).
"""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Sequence
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from benchmarks._interleaved import Timings, Variant, interleave
from benchmarks._report import begin, parser, table, timing_table
from benchmarks._workloads import GPT, MLP
from lightning_gradguard import GradGuard, Guard
from lightning_gradguard.act.buffers import Buffers
from lightning_gradguard.environment import Environment
from lightning_gradguard.measure.parameters import WatchedParameters
from lightning_gradguard.pipeline import Pipeline
from lightning_gradguard.record import Position
from lightning_gradguard.settings import Settings

ROUNDS, WARMUP = 300, 10
MAX_SECONDS, MAX_SECONDS_OF_BARS = 5.0, 12.0
NUM_TENSORS = (10, 30, 100, 300, 1_000, 3_000, 10_000)
SMALL_NUMEL = 1_024
NUM_ELEMENTS = (10**4, 10**5, 10**6, 10**7, 10**8, int(10**8.5))
TENSORS_FOR_ELEMENTS = 80
BARS = {"GPT, 10 M elements in 76 tensors": 1.5, "MLP, 402 small tensors": 1.5, "100 M elements in 80 tensors": 1.3}
CPU_ROUNDS, CPU_BAR = 40, 1.3
"""The bar is for the guard's CPU time where it clips many small tensors, over that of torch's own clipping."""
QUICK_LIMIT = 100_000
FLOOR, GUARD, IN_TRAINER = "_foreach_norm", "guard, nothing to clip", "in a Trainer, nothing to clip"
CLIPPING, TORCH_CLIPPING = "guard, clips", "clip_grad_norm_, clips"


class Case:
    """Gradients of these shapes, and what is done with them.

    Args:
        shapes: of the parameters.
        device: where they are.
    """

    def __init__(self, shapes: Sequence[tuple[int, ...]], device: str) -> None:
        self.device = device
        self.parameters = [nn.Parameter(torch.empty(shape, device=device)) for shape in shapes]
        for parameter in self.parameters:
            parameter.grad = torch.randn_like(parameter)
        self.norm = self._norm()
        self.loss = torch.ones((), device=device)

    @property
    def grads(self) -> list[Tensor]:
        """The gradients as they are now."""
        return [parameter.grad for parameter in self.parameters if parameter.grad is not None]

    def floor(self) -> Variant:
        """One pass of norms."""
        grads = self.grads
        return Variant(lambda: torch._foreach_norm(grads), prepare=self._unclip)

    def torch_clip(self) -> Variant:
        """Clipping to half the norm, as torch does it."""
        return Variant(lambda: nn.utils.clip_grad_norm_(self.parameters, self.norm / 2), prepare=self._unclip)

    def guard(self, max_norm: float, *, fused: bool) -> Variant:
        """The guard with everything that is on by default."""
        optimizer = torch.optim.SGD(self.parameters, lr=0.0, fused=fused, foreach=not fused)
        named = [(f"layers.{index}.weight", parameter) for index, parameter in enumerate(self.parameters)]
        guard = Guard(named, optimizer=optimizer, clip=max_norm, log_every_n_steps=0, histogram_every_n_steps=None)
        pending = False

        def run() -> None:
            nonlocal pending
            guard.before_backward(self.loss)
            guard.step()
            pending = True

        def prepare() -> None:
            nonlocal pending
            if pending and fused:
                optimizer.step()
            pending = False
            self._unclip()

        return Variant(run, prepare)

    def in_trainer(self, max_norm: float) -> Variant:
        """What `GradGuard` has for each optimizer, with nothing to clip."""
        named = [(f"layers.{index}.weight", parameter) for index, parameter in enumerate(self.parameters)]
        defaults: dict[str, Any] = {
            name: it.default
            for name, it in inspect.signature(GradGuard).parameters.items()
            if name in inspect.signature(Settings.of).parameters
        }
        settings = Settings.of(**defaults | {"clip": max_norm, "histogram_every_n_steps": None}).fresh()
        optimizer = torch.optim.SGD(self.parameters, lr=0.0)
        environment = Environment(log_every_n_steps=0, buffers=Buffers(), can_defer=True)
        pipeline = Pipeline(settings, WatchedParameters(named, optimizer), environment)

        def run() -> None:
            pipeline.before_backward(self.loss)
            pipeline.decide(Position(step=pipeline.num_steps, log_step=pipeline.num_steps))
            pipeline.leave()

        return Variant(run)

    def _unclip(self) -> None:
        """Bring clipped gradients back to their norm, in place; nothing where they were not clipped."""
        norm = self._norm()
        if norm < 0.99 * self.norm:
            torch._foreach_mul_(self.grads, self.norm / norm)

    def _norm(self) -> float:
        return float(torch.stack(torch._foreach_norm(self.grads)).norm())


def growth(case: Case, *, quick: bool) -> Timings:
    """Only the floor and the guard with nothing to clip."""
    return _time({FLOOR: case.floor(), GUARD: case.guard(2 * case.norm, fused=False)}, case, MAX_SECONDS, quick=quick)


def _time(variants: dict[str, Variant], case: Case, max_seconds: float, *, quick: bool) -> Timings:
    rounds, warmup = (3, 1) if quick else (ROUNDS, WARMUP)
    return interleave(variants, rounds=rounds, warmup=warmup, max_seconds=max_seconds, device=case.device)


def even(num_tensors: int, num_elements: int) -> list[tuple[int, ...]]:
    """Shapes of equal size."""
    return [(num_elements // num_tensors,)] * num_tensors


def bars(console: Console, device: str, *, quick: bool) -> None:
    """The three cases that have a limit."""
    networks = (GPT(1), MLP(4)) if quick else (GPT(), MLP())
    shapes = [[tuple(parameter.shape) for parameter in network.parameters()] for network in networks]
    shapes.append(even(TENSORS_FOR_ELEMENTS, QUICK_LIMIT if quick else 10**8))
    for (title, bar), sizes in zip(BARS.items(), shapes, strict=True):
        case = Case(sizes, device)
        variants = {
            FLOOR: case.floor(),
            GUARD: case.guard(2 * case.norm, fused=False),
            IN_TRAINER: case.in_trainer(2 * case.norm),
            "guard, nothing to clip, fused": case.guard(2 * case.norm, fused=True),
            CLIPPING: case.guard(case.norm / 2, fused=False),
            f"{CLIPPING}, fused": case.guard(case.norm / 2, fused=True),
            TORCH_CLIPPING: case.torch_clip(),
        }
        timings = _time(variants, case, MAX_SECONDS_OF_BARS, quick=quick)
        met = {each: "met" if timings.ratio(each, FLOOR).value <= bar else "missed" for each in (GUARD, IN_TRAINER)}
        more = {} if quick else {f"at most {bar}": met}
        console.print(timing_table(f"{title}, {device}", timings, [FLOOR], more))


def cpu_time(console: Console, *, quick: bool) -> None:
    """Clipping of many small tensors, in the time that the process computes: other work on the machine counts for little."""
    num_tensors = QUICK_LIMIT // SMALL_NUMEL if quick else NUM_TENSORS[-1]
    case = Case(even(num_tensors, num_tensors * SMALL_NUMEL), "cpu")
    variants = {
        TORCH_CLIPPING: case.torch_clip(),
        CLIPPING: case.guard(case.norm / 2, fused=False),
        GUARD: case.guard(2 * case.norm, fused=False),
    }
    rounds, warmup = (3, 1) if quick else (CPU_ROUNDS, 3)
    timings = interleave(variants, rounds=rounds, warmup=warmup, clock=time.process_time)
    met = timings.ratio(CLIPPING, TORCH_CLIPPING).value <= CPU_BAR
    more = {} if quick else {f"at most {CPU_BAR}": {CLIPPING: "met" if met else "missed"}}
    title = f"CPU time, {num_tensors:,} tensors of {SMALL_NUMEL:,} elements"
    console.print(timing_table(title, timings, [TORCH_CLIPPING], more))


def curve(console: Console, title: str, sizes: dict[str, list[tuple[int, ...]]], device: str, *, quick: bool) -> None:
    """How the guard's time grows."""
    rows = []
    for size, shapes in sizes.items():
        timings = growth(Case(shapes, device), quick=quick)
        floor, guard = timings.median(FLOOR), timings.median(GUARD)
        rows.append(
            [
                size,
                f"{floor * 1e3:.3f}",
                f"{guard * 1e3:.3f}",
                f"{timings.iqr(GUARD) * 1e3:.3f}",
                str(timings.ratio(GUARD, FLOOR)),
                f"{(guard - floor) / len(shapes) * 1e6:.2f}",
            ]
        )
    columns = [title, f"{FLOOR} ms", "guard ms", "guard's IQR ms", "ratio", "difference, us a tensor"]
    console.print(table(f"Growth with the number of {title}, {device}", columns, rows))


def main() -> None:
    """The bars, then growth with tensors and with elements."""
    arguments = parser(__doc__)
    arguments.add_argument("--cpu-time", action="store_true", help="only the CPU time of clipping many small tensors")
    chosen = arguments.parse_args()
    console = begin(chosen)
    cpu_time(console, quick=chosen.quick)
    if chosen.cpu_time:
        return
    limit = QUICK_LIMIT if chosen.quick else math.inf
    tensors = {f"{count:,}": even(count, count * SMALL_NUMEL) for count in NUM_TENSORS if count * SMALL_NUMEL <= limit}
    elements = {f"{count:,}": even(TENSORS_FOR_ELEMENTS, count) for count in NUM_ELEMENTS if count <= limit}
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        bars(console, device, quick=chosen.quick)
        curve(console, f"tensors of {SMALL_NUMEL:,} elements", tensors, device, quick=chosen.quick)
        curve(console, f"elements in {TENSORS_FOR_ELEMENTS} tensors", elements, device, quick=chosen.quick)


if __name__ == "__main__":
    main()
