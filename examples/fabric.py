"""Guard in a Fabric loop over two processes: one of them meets a NaN, both skip that step.

    python examples/fabric.py

Runs in a few seconds on a CPU. Each rank says what it did; the weights end alike on both.
"""

from __future__ import annotations

import math

import torch
from lightning.fabric import Fabric
from torch import nn

from lightning_gradguard import Guard

STEPS, BAD_STEP, BAD_RANK = 20, 12, 1


def train(fabric: Fabric) -> None:
    """Fit a line through noise, on each rank's own data."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    guard = Guard(model.named_parameters(), optimizer, clip=1.0)
    wrapped, wrapped_optimizer = fabric.setup(model, optimizer)

    torch.manual_seed(1 + fabric.global_rank)
    for step in range(STEPS):
        x = torch.randn(32, 4)
        if (step, fabric.global_rank) == (BAD_STEP, BAD_RANK):
            x[0, 0] = math.nan
        wrapped_optimizer.zero_grad()
        loss = (wrapped(x) - x.sum(1, keepdim=True)).square().mean()
        guard.before_backward(loss)
        fabric.backward(loss)
        guard.step()
        wrapped_optimizer.step()

    weights = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    spread = fabric.all_gather(weights).std(0, correction=0).max().item()
    totals = guard.totals
    for alert in guard.alerts:
        print(f"rank {fabric.global_rank} skipped step {alert.step}: rank {alert.rank} saw the damage first", flush=True)
    print(
        f"rank {fabric.global_rank}: {totals.num_steps} steps, {totals.num_clipped} clipped, {totals.num_skipped} skipped; "
        f"weights finite: {bool(weights.isfinite().all())}, largest spread between ranks: {spread:g}",
        flush=True,
    )


if __name__ == "__main__":
    Fabric(accelerator="cpu", devices=2, strategy="ddp_spawn").launch(train)
