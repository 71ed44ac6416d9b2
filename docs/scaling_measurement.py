"""Calls and bytes of one guarded step over gradients in parts, counted in real gloo processes; for docs/scaling.md.

    python docs/scaling_measurement.py

Takes some minutes: a model with as many tensors as a 70-billion-parameter Llama, each of them tiny, on 2 and on 4 ranks,
under FSDP2, FSDP1 and, where it is installed, DeepSpeed's ZeRO 3.
"""

from __future__ import annotations

import logging
import os
import statistics
import time
from collections.abc import Callable
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, distributed, multiprocessing, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

from lightning_gradguard.act.buffers import Buffers
from lightning_gradguard.environment import Environment
from lightning_gradguard.pipeline import Pipeline
from lightning_gradguard.settings import Settings
from lightning_gradguard.trainer.strategies.base import Engine
from lightning_gradguard.trainer.strategies.deepspeed import DeepSpeed
from lightning_gradguard.trainer.strategies.dtensor import DTensors
from lightning_gradguard.trainer.strategies.fsdp1 import FSDP1

NUM_STEPS = 7
CONFIG = {
    "train_micro_batch_size_per_gpu": 1,
    "zero_optimization": {"stage": 3},
    "zero_allow_untested_optimizer": True,
}


class Layer(nn.Module):
    """Four attention matrices, three of the MLP and two norms, each of 16 elements."""

    def __init__(self, num_tensors: int = 9) -> None:
        super().__init__()
        self.tensors = nn.ParameterList([nn.Parameter(torch.ones(8, 2)) for _ in range(num_tensors)])

    def forward(self, x: Tensor) -> Tensor:
        """Something that reaches every tensor."""
        return x + sum(tensor.mean() for tensor in self.tensors)


def model() -> nn.Module:
    """80 layers; and embedding, last norm, head: 723 tensors."""
    return nn.Sequential(*(Layer() for _ in range(80)), Layer(3))


Step = Callable[[], Tensor]
"""Runs a forward and a backward pass, and returns the loss."""


def fsdp2() -> tuple[Engine, nn.Module, torch.optim.Optimizer, Step]:
    """`fully_shard`, layer by layer."""
    net = model()
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    for layer in net:
        fully_shard(layer, mesh=mesh)
    fully_shard(net, mesh=mesh)
    return DTensors(), net, torch.optim.SGD(net.parameters(), lr=0.0), lambda: _backward(net)


def fsdp1() -> tuple[Engine, nn.Module, torch.optim.Optimizer, Step]:
    """`FullyShardedDataParallel`, layer by layer."""
    inner = model()
    wrapped = FullyShardedDataParallel(
        inner, auto_wrap_policy=ModuleWrapPolicy({Layer}), use_orig_params=True, device_id=torch.device("cpu")
    )
    engine = FSDP1(SimpleNamespace(strategy=SimpleNamespace(model=wrapped)))
    return engine, inner, torch.optim.SGD(inner.parameters(), lr=0.0), lambda: _backward(wrapped)


def zero3() -> tuple[Engine, nn.Module, torch.optim.Optimizer, Step]:
    """DeepSpeed's ZeRO of stage 3."""
    import deepspeed  # noqa: PLC0415

    net = model()
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    sgd = torch.optim.SGD(net.parameters(), lr=0.0)
    trained, optimizer, _, _ = deepspeed.initialize(model=net, optimizer=sgd, config=CONFIG)
    engine = DeepSpeed(SimpleNamespace(strategy=SimpleNamespace(model=trained)))

    def step() -> Tensor:
        if trained.micro_steps or trained.global_samples or optimizer.state:
            trained.step()
        loss = trained(torch.ones(()))
        trained.backward(loss)
        return loss

    return engine, net, optimizer, step


def _backward(net: nn.Module) -> Tensor:
    net.zero_grad()
    loss: Tensor = net(torch.ones(()))
    loss.backward()
    return loss


ENGINES = {"FSDP2": fsdp2, "FSDP1": fsdp1} | ({"ZeRO 3": zero3} if find_spec("deepspeed") else {})


def measure(rank: int, num_ranks: int, port: int, name: str) -> None:
    """Print what the guard sends on a step without and with histograms, and what the host does meanwhile."""
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_ranks}
    os.environ |= {key: str(value) for key, value in place.items()} | {"DS_ACCELERATOR": "cpu"}
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", rank=rank, world_size=num_ranks)
    engine, net, optimizer, step = ENGINES[name]()
    for kind, interval in {"plain": None, "with histograms": 1}.items():
        settings = Settings.of(
            clip=1.0,
            nonfinite="skip",
            explosion="warn",
            vanishing=None,
            overflow=None,
            detectors=(),
            include=None,
            exclude=(),
            sinks=(),
            histogram_every_n_steps=interval,
        )
        parameters = engine.watch(net, optimizer, settings.only)
        guard = Pipeline(settings, parameters, Environment(50, Buffers()))
        sizes: list[int] = []
        seconds = []
        for _ in range(NUM_STEPS):
            loss = step()
            engine.is_step()
            guard.before_backward(loss)
            sizes.clear()
            with counted(sizes):
                begin = time.thread_time()
                guard.step()
                seconds.append(time.thread_time() - begin)
        if rank == 0:
            host = 1e3 * statistics.median(seconds)
            line = [name, num_ranks, kind, len(sizes), f"{sum(sizes):,}", f"{host:.0f} ms"]
            print("| " + " | ".join(map(str, line)) + " |", flush=True)  # noqa: T201
    distributed.barrier()
    os._exit(0)  # DeepSpeed's own teardown waits for threads


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
    print("| engine | ranks | step | all_reduce calls | bytes | host |\n|---|---|---|---|---|---|", flush=True)  # noqa: T201
    for number, (name, ranks) in enumerate((name, ranks) for name in ENGINES for ranks in (2, 4)):
        multiprocessing.spawn(measure, (ranks, 29600 + number, name), nprocs=ranks)
