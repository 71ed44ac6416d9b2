"""Name filters and updates on sharded parameters say what they say on whole ones."""

from __future__ import annotations

import math

import torch
from ranks import on_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from lightning_gradguard import Guard, UpdateRatio

SHAPES, LAYOUTS = ((5, 3), (3, 4), (7,), (2, 6)), ([Shard(0)], [Shard(1)], [Shard(0)], [Replicate()])


def watch():
    """Three steps of descent, sharded and whole; the last with one NaN element in an excluded gradient of one shard."""
    mesh = init_device_mesh("cpu", (2,))
    generator = torch.Generator().manual_seed(1)
    values = [torch.randn(size, generator=generator) for size in SHAPES]
    sides = [
        [nn.Parameter(value.clone()) for value in values],
        [nn.Parameter(distribute_tensor(value, mesh, layout)) for value, layout in zip(values, LAYOUTS, strict=True)],
    ]
    optimizers = [torch.optim.SGD(side, lr=0.1) for side in sides]
    guards = [
        Guard(
            [(f"p{index}", it) for index, it in enumerate(side)],
            optimizer=optimizer,
            exclude=["p0"],
            detectors=[UpdateRatio()],
            explosion=None,
        )
        for side, optimizer in zip(sides, optimizers, strict=True)
    ]
    found = []
    for step in range(3):
        grads = [torch.randn(size, generator=generator) for size in SHAPES]
        if step == 2:
            grads[0][4, 1] = math.nan
        for plain, sharded, grad, layout in zip(*sides, grads, LAYOUTS, strict=True):
            plain.grad, sharded.grad = grad.clone(), distribute_tensor(grad, mesh, layout)
        records = [guard.step() for guard in guards]
        for optimizer in optimizers:
            optimizer.step()
        found.append(
            [
                [
                    record.decision.skip,
                    [[report.name, report.num_nan] for report in record.measurement.nonfinite],
                    [] if record.measurement.update_ratios is None else record.measurement.update_ratios.tolist(),
                ]
                for record in records
            ]
        )
    apart = [
        float((plain - (other.full_tensor() if isinstance(other, DTensor) else other)).detach().abs().max())
        for plain, other in zip(*sides, strict=True)
    ]
    return found, max(apart)


def test_watched_sharded_equals_watched_whole():
    """The same updates; damage in a shard of an excluded parameter skips the step on both ranks and is named."""
    for found, apart in on_ranks(2, watch):
        assert apart < 1e-6
        for plain, sharded in found:
            assert plain[:2] == sharded[:2]
            torch.testing.assert_close(torch.tensor(plain[2]), torch.tensor(sharded[2]), equal_nan=True)
        assert [plain[0] for plain, _ in found] == [False, False, True]
        assert found[2][0][1] == [["p0", 1]]
        assert len(found[1][0][2]) == 3
