"""What it costs that a skipped step leaves no trace in buffers: their copies, over a whole step of a ResNet-50.

Before each step the guard copies all buffers (running statistics and counters of 53 batch normalisations); after a skipped
one it puts them back. A step is a forward and a backward pass and the optimizer's, in a plain loop.
"""

from __future__ import annotations

import torch

from benchmarks._interleaved import Variant, interleave
from benchmarks._report import begin, parser, table
from benchmarks.gpu.networks import NUM_CLASSES, ResNet50
from lightning_gradguard.act.buffers import Buffers

IMAGES, SIZE = 4, 64
WARMUP, ROUNDS, MAX_SECONDS = 3, 40, 60.0
BAR = 0.02


def main() -> None:
    """On the CPU, and on a GPU where there is one."""
    chosen = parser(__doc__).parse_args()
    console = begin(chosen)
    rows = []
    for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
        images, size = (2, 32) if chosen.quick else (IMAGES, SIZE)
        network = ResNet50().to(device)
        optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)
        inputs = torch.randn(images, 3, size, size, device=device)
        targets = torch.randint(NUM_CLASSES, (images,), device=device)
        buffers = Buffers(module=network, follows_steps=False)

        def step() -> None:
            optimizer.zero_grad()  # noqa: B023 - called in this round of the loop only
            network((inputs, targets)).backward()  # noqa: B023
            optimizer.step()  # noqa: B023

        timings = interleave(
            {"step": Variant(step), "copy": Variant(buffers.remember), "put back": Variant(buffers.restore_)},
            rounds=3 if chosen.quick else ROUNDS,
            warmup=1 if chosen.quick else WARMUP,
            max_seconds=MAX_SECONDS,
        )
        kept = list(network.buffers())
        size_in_mib = sum(buffer.numel() * buffer.element_size() for buffer in kept) / 2**20
        share = timings.median("copy") / timings.median("step")
        rows.append(
            [
                f"{device}, {images} images of {size} x {size}, {len(kept)} buffers",
                f"{size_in_mib:.2f}",
                *(f"{1e3 * timings.median(name):,.3f}" for name in ("step", "copy", "put back")),
                f"{share:.3%}",
                f"at most {BAR:.0%}: {'met' if share <= BAR else 'missed'}",
            ]
        )
    columns = ["ResNet-50", "MiB kept", "step, ms", "copy, ms", "put back, ms", "copy over step", "bar"]
    console.print(table("Keeping buffers", columns, rows))


if __name__ == "__main__":
    main()
