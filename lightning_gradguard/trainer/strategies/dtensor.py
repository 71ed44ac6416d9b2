"""FSDP2 and tensor parallelism: gradients are DTensors, which say by themselves what a rank holds."""

from __future__ import annotations

from lightning_gradguard.trainer.strategies.plain import Plain


class DTensors(Plain):
    """Gradients are where torch leaves them, each rank's part of them."""

    has_whole_weights = False
    saves_folders = True
