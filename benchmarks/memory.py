"""What the guard keeps and what it needs for a moment.

Peak: bytes of all tensors that are made during one call, whether or not they live at the same time; an upper bound.
Growth: memory of the process and live Python objects between the first steps and the last, with events being written.
"""

from __future__ import annotations

import resource
import sys
import tempfile
from collections.abc import Callable

import torch
from rich.console import Console
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.tensorboard import SummaryWriter

from benchmarks._report import begin, parser, table
from benchmarks._workloads import GPT, MLP
from lightning_gradguard import Guard
from lightning_gradguard.sinks import TensorBoardSink

CALLS = 5  # of which the last is measured
STEPS, SETTLED = 10_000, 1_000
REPORTS = 5
SHAPES = {
    "80 tensors, 1 M elements": [(12_500,)] * 80,
    "80 tensors, 10 M elements": [(125_000,)] * 80,
    "80 tensors, 100 M elements": [(1_250_000,)] * 80,
    "800 tensors, 10 M elements": [(12_500,)] * 800,
}
QUICK_SHAPES = {"8 tensors, 1 K elements": [(128,)] * 8}


def allocated(call: Callable[[], object]) -> int:
    """Bytes of the tensors that a call makes."""
    for _ in range(CALLS - 1):
        call()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        call()
    return sum(max(event.self_cpu_memory_usage, 0) for event in profiled.key_averages())


def with_gradients(shapes: list[tuple[int, ...]]) -> list[tuple[str, nn.Parameter]]:
    """Named parameters; only their gradients are written to, so only they take memory."""
    named = [(f"layers.{index}.weight", nn.Parameter(torch.empty(shape))) for index, shape in enumerate(shapes)]
    for _, parameter in named:
        parameter.grad = torch.randn_like(parameter)
    return named


def peaks(console: Console, all_shapes: dict[str, list[tuple[int, ...]]]) -> None:
    """Bytes made in one step, by tensors and elements."""
    rows = []
    for title, shapes in all_shapes.items():
        named = with_gradients(shapes)
        parameters = [parameter for _, parameter in named]

        def guard(
            histogram_every_n_steps: int | None, named: list[tuple[str, nn.Parameter]] = named
        ) -> Callable[[], object]:
            made = Guard(named, clip=1.0, log_every_n_steps=0, histogram_every_n_steps=histogram_every_n_steps)
            loss = torch.ones(())
            return lambda: (made.before_backward(loss), made.step())

        torch_clip = allocated(lambda parameters=parameters: nn.utils.clip_grad_norm_(parameters, 1.0))
        step, with_histograms = allocated(guard(None)), allocated(guard(1))
        gradients = sum(parameter.numel() * parameter.element_size() for parameter in parameters)
        row = [f"{count / 1024:,.1f}" for count in (gradients, torch_clip, step, with_histograms)]
        rows.append([title, *row, f"{step / len(shapes):,.0f}", f"{step / torch_clip:.2f}"])
    columns = [
        "of",
        "the gradients",
        "clip_grad_norm_",
        "guard",
        "with histograms",
        "bytes a tensor",
        "over clip_grad_norm_",
    ]
    console.print(table("Tensors made in one step, KiB (first the gradients themselves)", columns, rows))


def growth(console: Console, model: nn.Module, steps: int, settled: int) -> None:
    """Memory after the first steps and after all of them."""
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter) * 1e-3
    grads = [parameter.grad for parameter in model.parameters()]
    rows = []
    with tempfile.TemporaryDirectory() as folder, SummaryWriter(folder) as writer:
        guard = Guard(model.named_parameters(), clip=1.0, sinks=[TensorBoardSink(writer)])
        loss = torch.ones(())
        for step in range(1, steps + 1):
            torch._foreach_mul_(grads, 1.001 if step % 2 else 1 / 1.001)
            guard.before_backward(loss)
            guard.step()
            if step == settled or step % (steps // REPORTS) == 0:
                writer.flush()
                # On macOS in bytes, elsewhere in KiB.
                peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << (20 if sys.platform == "darwin" else 10))
                rows.append((step, peak, sys.getallocatedblocks()))
    _, first_peak, first_blocks = rows[0]
    shown = [
        [f"{step:,}", f"{peak:,.1f}", f"{peak - first_peak:+,.1f}", f"{blocks:,}", f"{blocks - first_blocks:+,}"]
        for step, peak, blocks in rows
    ]
    columns = [
        "after steps",
        "peak memory of the process, MiB",
        "since the first row",
        "live Python blocks",
        "since the first row",
    ]
    console.print(table(f"Growth, {len(grads)} tensors, {len(guard.alerts)} alerts", columns, shown))


def main() -> None:
    """Growth first, since peaks never fall."""
    chosen = parser(__doc__).parse_args()
    console = begin(chosen)
    if chosen.quick:
        growth(console, MLP(2), 40, 10)
        peaks(console, QUICK_SHAPES)
        return
    growth(console, MLP(), STEPS, SETTLED)
    gpt = {"GPT, 76 tensors, 10.7 M elements": [tuple(parameter.shape) for parameter in GPT().parameters()]}
    peaks(console, {**gpt, **SHAPES})


if __name__ == "__main__":
    main()
