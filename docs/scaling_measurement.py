"""Calls and bytes of one guarded step over sharded gradients, counted in real gloo processes; for docs/scaling.md.

    python docs/scaling_measurement.py

Takes about a minute: a model with as many tensors as a 70-billion-parameter Llama, each of them tiny, on 2 and on 4 ranks.
"""

from __future__ import annotations

import os
import statistics
import time
from typing import Any

import torch
from torch import Tensor, distributed, multiprocessing, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from lightning_gradguard import Guard

NUM_TENSORS = 80 * 9 + 3
"""80 layers of four attention matrices, three of the MLP and two norms; embedding, last norm, head."""


def measure(rank: int, num_ranks: int, port: int) -> None:
    """Print what the guard sends on a step without and with histograms, and what the host does meanwhile."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", rank=rank, world_size=num_ranks)
    mesh = init_device_mesh("cpu", (num_ranks,))
    parameters = [nn.Parameter(distribute_tensor(torch.zeros(8, 2), mesh, [Shard(0)])) for _ in range(NUM_TENSORS)]
    named = [(f"layers.{index // 9}.{index % 9}", parameter) for index, parameter in enumerate(parameters)]
    guards = {"plain step": None, "step with histograms": 1}
    for name, interval in guards.items():
        guard = Guard(named, clip=1.0, histogram_every_n_steps=interval)
        sizes: list[int] = []
        seconds = []
        for _ in range(7):
            for parameter in parameters:
                parameter.grad = torch.ones_like(parameter)
            guard.before_backward(torch.ones(()))
            sizes.clear()
            with counted(sizes):
                begin = time.thread_time()
                guard.step()
                seconds.append(time.thread_time() - begin)
        if rank == 0:
            host = 1e3 * statistics.median(seconds)
            sent = f"{len(sizes)} all_reduce of {sum(sizes):,} bytes"
            print(f"{num_ranks} ranks, {NUM_TENSORS} tensors, {name}: {sent}, {host:.1f} ms of one core")  # noqa: T201
    distributed.destroy_process_group()


class counted:  # noqa: N801  # reads as a word
    """Notes the bytes of each all_reduce made inside."""

    def __init__(self, sizes: list[int]) -> None:
        self.sizes = sizes

    def __enter__(self) -> None:
        self.real = distributed.all_reduce

        def counting(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            self.sizes.append(tensor.numel() * tensor.element_size())
            return self.real(tensor, *args, **kwargs)

        distributed.all_reduce = counting

    def __exit__(self, *_: object) -> None:
        distributed.all_reduce = self.real


if __name__ == "__main__":
    for number, ranks in enumerate((2, 4)):
        multiprocessing.spawn(measure, (ranks, 29600 + number), nprocs=ranks)
