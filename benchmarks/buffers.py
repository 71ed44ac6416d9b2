"""What it costs that a skipped step leaves no trace in buffers and in a frozen teacher: copies, over a whole step.

Before each step the guard copies all buffers of a ResNet-50 (running statistics and counters of 53 batch normalisations),
and the parameters of a momentum encoder, which `training_step` moves; after a skipped step it puts them back. Frozen
parameters that stay as they are, are copied and compared now and then. A step is a forward and a backward pass and the
optimizer's, in a plain loop; with a teacher its forward pass, too, and the average if it is a momentum encoder.
"""

from __future__ import annotations

import copy

import torch
from torch import nn

from benchmarks._interleaved import Timings, Variant, interleave
from benchmarks._report import begin, parser, table
from benchmarks.gpu.networks import NUM_CLASSES, ResNet50
from lightning_gradguard.act.buffers import Buffers

WARMUP, ROUNDS, MAX_SECONDS = 3, 40, 60.0
NUM_FIRST_STEPS = 12
"""Before anything is timed: by then it is known which parameters move."""
BAR = 0.02
MOMENTUM = 0.999
ALONE, MOVED, STILL = "no teacher", "a teacher that moves", "a teacher that stays"
CASES = ((ALONE, 4, 64), (MOVED, 4, 64), (STILL, 4, 64), (MOVED, 8, 224))
"""Teacher, images, and their size."""


class Case:
    """A ResNet-50, maybe with another one beside, and what a guard keeps of them.

    Args:
        teacher: one of the three.
        images: in a batch.
        size: of an image.
        device: where it is trained.
    """

    def __init__(self, teacher: str, images: int, size: int, device: str) -> None:
        self.student = ResNet50().to(device)
        self.teacher = None if teacher == ALONE else copy.deepcopy(self.student).requires_grad_(False)
        self.moves = teacher == MOVED
        self.module = nn.ModuleList([self.student, *([] if self.teacher is None else [self.teacher])])
        self.optimizer = torch.optim.SGD(self.student.parameters(), lr=0.01, momentum=0.9)
        self.batch = torch.randn(images, 3, size, size, device=device), torch.randint(NUM_CLASSES, (images,), device=device)
        self.buffers = self.fresh = Buffers(module=self.module, follows_steps=False)

    def step(self) -> None:
        """As a `training_step` and what the Trainer does with it."""
        if self.teacher is not None:
            self._use(self.teacher)
        self.optimizer.zero_grad()
        self.student(self.batch).backward()
        self.optimizer.step()

    @torch.no_grad()
    def _use(self, teacher: nn.Module) -> None:
        if self.moves:
            for old, new in zip(teacher.parameters(), self.student.parameters(), strict=True):
                old.mul_(MOMENTUM).add_(new, alpha=1 - MOMENTUM)
        teacher(self.batch)

    def keep(self) -> None:
        """What the guard does at each step."""
        self.buffers.remember()
        self.buffers.look()

    def compare(self) -> None:
        """What it does in one of the first ten, and in each hundredth."""
        self.fresh.remember()
        self.fresh.look()

    def variants(self) -> dict[str, Variant]:
        """What is timed."""
        return {
            "step": Variant(self.step),
            "keep": Variant(self.keep),
            "compare": Variant(self.compare, prepare=self._begin_anew),
            "put back": Variant(self.buffers.restore_, prepare=self.keep),
        }

    def _begin_anew(self) -> None:
        self.fresh = Buffers(module=self.module, follows_steps=False)


def measure(case: Case, *, num_first_steps: int, rounds: int, warmup: int, device: str) -> Timings:
    """After some steps."""
    for _ in range(num_first_steps):
        case.buffers.remember()
        case.step()
        case.buffers.look()
    return interleave(case.variants(), rounds=rounds, warmup=warmup, max_seconds=MAX_SECONDS, device=device)


def row(timings: Timings, name: str) -> list[str]:
    """Medians, and the part of a step."""
    share = timings.ratio("keep", over="step")
    return [
        name,
        *(f"{1e3 * timings.median(variant):,.2f}" for variant in ("step", "keep", "put back", "compare")),
        f"{share.value:.3%} [{share.low:.3%}, {share.high:.3%}]",
        "met" if share.value <= BAR else "missed",
    ]


def main() -> None:
    """On the CPU, and on a GPU where there is one."""
    chosen = parser(__doc__).parse_args()
    console = begin(chosen)
    rows = []
    for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
        for teacher, images, size in CASES[:2] if chosen.quick else CASES:
            case = Case(teacher, *((2, 32) if chosen.quick else (images, size)), device)
            first, rounds, warmup = (2, 3, 1) if chosen.quick else (NUM_FIRST_STEPS, ROUNDS, WARMUP)
            timings = measure(case, num_first_steps=first, rounds=rounds, warmup=warmup, device=device)
            rows.append(row(timings, f"{device}, {images} images of {size} x {size}, {teacher}"))
    columns = ["ResNet-50, ms", "step", "keep", "put back", "compare", "keep over step", f"at most {BAR:.0%}"]
    console.print(table("Keeping buffers and teachers", columns, rows))


if __name__ == "__main__":
    main()
