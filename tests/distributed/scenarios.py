"""What happens on each rank: one function a scenario, plain data back. All run one after another in one process group."""

from __future__ import annotations

import functools
import math
import tempfile
import traceback
from collections.abc import Callable
from typing import Any

import torch
from lightning_package import DDPStrategy, LightningEnvironment, LightningModule, ModelParallelStrategy, Trainer
from skip_scenarios import SKIPS
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from torch.utils.data import DataLoader

from lightning_gradguard import ClipNorm, ClipValue, GradGuard, Guard

FEATURES, GLOBAL_BATCH, NUM_STEPS, BAD_BATCH = 6, 8, 6, 4


class Student(LightningModule):
    """A regression whose loss is spoiled in one batch on one rank; `mode` says how its net is spread over ranks."""

    def __init__(self, mode: str, *, spoil: str | None = None, bad_rank: int = 1, norm: bool = False) -> None:
        super().__init__()
        layers = [nn.Linear(FEATURES, 8), nn.Tanh(), nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 1)]
        self.net = nn.Sequential(*([nn.BatchNorm1d(FEATURES), *layers] if norm else layers))
        self.unused = nn.Linear(2, 2) if mode == "ddp-unused" else None
        self.mode, self.spoil, self.bad_rank = mode, spoil, bad_rank

    def configure_model(self) -> None:
        """Shard."""
        if self.mode in ("tp", "2d"):
            parallelize_module(
                self.net, self.device_mesh["tensor_parallel"], {"0": ColwiseParallel(), "2": RowwiseParallel()}
            )
        if self.mode in ("fsdp2", "2d"):
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Mean squared error."""
        loss = nn.functional.mse_loss(self.net(batch), batch.sum(1, keepdim=True))
        if batch_idx != BAD_BATCH or self.global_rank != self.bad_rank or self.spoil is None:
            return loss
        return loss + math.nan if self.spoil == "loss" else self.net(batch * math.nan).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """With momentum, so that a healthy step always moves the weights."""
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def fit(
    module: Student,
    guard: GradGuard | None = None,
    *,
    num_ranks: int | None = None,
    num_batches: int = NUM_STEPS,
    **settings: Any,
) -> dict[str, Any]:
    """Train, and say what the guard made of it."""
    num_ranks = distributed.get_world_size() if num_ranks is None else num_ranks
    trainer = Trainer(
        accelerator="cpu",
        devices=num_ranks,
        strategy=_strategy(module.mode),
        plugins=[LightningEnvironment()],
        callbacks=[] if guard is None else [guard],
        max_epochs=1,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tempfile.gettempdir(),
        **settings,
    )
    trainer.fit(module, DataLoader(_batches(module.mode, num_batches), batch_size=None))
    weights = torch.cat([_whole(parameter).detach().flatten() for parameter in module.parameters()])
    found: dict[str, Any] = {"weights": weights.tolist()}
    if guard is not None:
        found |= {"num_steps": guard.num_steps, "num_skipped": guard.num_skipped}
        found["alerts"] = [[alert.kind, alert.step, alert.micro_batch, alert.rank] for alert in guard.alerts]
        found["buffers_are_finite"] = all(bool(buffer.isfinite().all()) for buffer in module.buffers())
    return found


def _strategy(mode: str) -> Any:
    if mode.startswith("ddp"):
        return DDPStrategy(process_group_backend="gloo", find_unused_parameters=mode == "ddp-unused")
    data, tensor = {"fsdp2": (2, 1), "tp": (1, 2), "2d": (2, 2)}[mode]
    return ModelParallelStrategy(data_parallel_size=data, tensor_parallel_size=tensor, process_group_backend="gloo")


def _batches(mode: str, count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    whole = [torch.randn(GLOBAL_BATCH, FEATURES, generator=generator) for _ in range(count)]
    data_rank = {"tp": 0, "2d": distributed.get_rank() // 2}.get(mode, distributed.get_rank())
    return whole if mode == "tp" else [batch[data_rank::2] for batch in whole]


def reference_norms(num_steps: int = NUM_STEPS) -> list[float]:
    """Norms of the same training in one process on the global batches, by hand."""
    torch.manual_seed(0)
    module = Student("single")
    optimizer = module.configure_optimizers()
    norms = []
    generator = torch.Generator().manual_seed(1)
    for _ in range(num_steps):
        batch = torch.randn(GLOBAL_BATCH, FEATURES, generator=generator)
        optimizer.zero_grad()
        nn.functional.mse_loss(module.net(batch), batch.sum(1, keepdim=True)).backward()
        norms.append(float(torch.stack([p.grad.double().norm() for p in module.parameters()]).norm()))
        optimizer.step()
    return norms


def healthy(mode: str) -> dict[str, Any]:
    """A healthy training with the guard, and one without it."""
    norms: list[float] = []
    torch.manual_seed(0)
    found = fit(Student(mode), GradGuard(sinks=[lambda record: norms.append(record.measurement.global_norm)]))
    torch.manual_seed(0)
    return found | {"norms": norms, "unguarded": fit(Student(mode))["weights"]}


def faulty(mode: str, spoil: str, *, bad_rank: int = 1, norm: bool = False, **settings: Any) -> dict[str, Any]:
    """A training with one spoiled batch."""
    torch.manual_seed(0)
    return fit(Student(mode, spoil=spoil, bad_rank=bad_rank, norm=norm), GradGuard(), **settings)


def clipped(clip: Any, *, factor: float = 1.0) -> dict[str, Any]:
    """One step on sharded gradients of which some ranks hold nothing, and the same by torch's own on whole ones."""
    by_rank = _sharded(factor)
    plain = [_whole(parameter).detach().clone().requires_grad_() for parameter in by_rank]
    for parameter, like in zip(plain, by_rank, strict=True):
        parameter.grad = _whole(like.grad).clone()
    if isinstance(clip, ClipNorm):
        clip_grad_norm_(plain, clip.max_norm, clip.norm_type)
    elif isinstance(clip, ClipValue):
        clip_grad_value_(plain, clip.clip_value)
    guard = Guard([(f"p{index}", parameter) for index, parameter in enumerate(by_rank)], clip=clip)
    record = guard.step()
    return {
        "error": max(float((_whole(a.grad) - b.grad).abs().max()) for a, b in zip(by_rank, plain, strict=True)),
        "coef": record.clip_coef,
        "global_norm": record.measurement.global_norm,
        "overflowed": record.measurement.overflowed,
        "skip": record.decision.skip,
        "by_hand": _norm_by_hand(by_rank) if clip is None else None,
    }


def _norm_by_hand(parameters: list[Tensor]) -> float:
    return float(torch.stack([_whole(parameter.grad).double().norm() for parameter in parameters]).norm())


def _sharded(factor: float = 1.0) -> list[nn.Parameter]:
    """Parameters with gradients: uneven shards, a shard that is empty on all ranks but the first, a plain one, even ones."""
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    generator = torch.Generator().manual_seed(2)
    parameters = []
    for shape, is_sharded in (((5, 3), True), ((1, 4), True), ((7,), False), ((4, 2), True)):
        whole = factor * torch.randn(*shape, generator=generator)
        spread: Callable[[Tensor], Tensor] = (
            (lambda x: distribute_tensor(x, mesh, [Shard(0)])) if is_sharded else torch.clone
        )
        parameter = nn.Parameter(spread(torch.zeros(shape)))
        parameter.grad = spread(whole)
        parameters.append(parameter)
    return parameters


def empty_shard() -> dict[str, Any]:
    """A NaN in a parameter of which this rank may hold nothing."""
    parameters = _sharded()
    local = parameters[1].grad.to_local()
    if local.numel():
        local[0, 0] = math.nan
    record = Guard([(f"p{index}", parameter) for index, parameter in enumerate(parameters)]).step()
    (report,) = record.measurement.nonfinite
    return {
        "numel": local.numel(),
        "skip": record.decision.skip,
        "is_gone": all(parameter.grad is None for parameter in parameters),
        "name": report.name,
        "num_nan": report.num_nan,
    }


def collectives(mode: str) -> dict[str, Any]:
    """Calls and bytes of one healthy guarded step of a raw loop, counted where they are made."""
    torch.manual_seed(0)
    net = Student("single").net
    if mode == "fsdp2":
        fully_shard(net, mesh=init_device_mesh("cpu", (distributed.get_world_size(),)))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    guard = Guard(net.named_parameters(), optimizer, clip=1.0, histogram_every_n_steps=None)
    sizes: list[int] = []
    real = distributed.all_reduce

    def counting(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        sizes.append(tensor.numel() * tensor.element_size())
        return real(tensor, *args, **kwargs)

    loss = net(torch.ones(2, FEATURES)).square().mean()
    guard.before_backward(loss)
    loss.backward()
    distributed.all_reduce = counting
    try:
        guard.step()
    finally:
        distributed.all_reduce = real
    return {"sizes": sizes, "num_tensors": len(list(net.parameters())), "num_ranks": distributed.get_world_size()}


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


TWO_RANKS: dict[str, Callable[[], Any]] = {
    **{f"healthy-{mode}": functools.partial(healthy, mode) for mode in ("ddp", "ddp-unused", "fsdp2", "tp")},
    "ddp-accumulation": lambda: faulty("ddp", "gradient", accumulate_grad_batches=3),
    **{f"loss-{mode}": functools.partial(faulty, mode, "loss") for mode in ("ddp", "fsdp2", "tp")},
    "batchnorm": lambda: faulty("ddp", "gradient", norm=True),
    **SKIPS,
    "clip-none": lambda: clipped(None),
    "clip-2": lambda: clipped(ClipNorm(0.1)),
    "clip-1": lambda: clipped(ClipNorm(0.1, norm_type=1.0)),
    "clip-inf": lambda: clipped(ClipNorm(0.1, norm_type=math.inf)),
    "clip-value": lambda: clipped(ClipValue(0.1)),
    "overflow": lambda: clipped(None, factor=1e25),
    "empty-shard": empty_shard,
    **{f"collectives-{mode}": functools.partial(collectives, mode) for mode in ("ddp", "fsdp2")},
}
FOUR_RANKS: dict[str, Callable[[], Any]] = {
    "healthy-2d": lambda: healthy("2d"),
    **{f"loss-2d-{rank}": functools.partial(faulty, "2d", "loss", bad_rank=rank) for rank in (0, 3)},
    "clip-none": lambda: clipped(None),
    "collectives-fsdp2": lambda: collectives("fsdp2"),
}


def play(num_ranks: int) -> dict[str, Any]:
    """All scenarios for so many ranks; where one fails, its traceback."""
    found = {}
    for name, scenario in (TWO_RANKS if num_ranks == 2 else FOUR_RANKS).items():
        try:
            found[name] = scenario()
        except Exception:  # noqa: BLE001, PERF203  # it is the finding, and the others go on
            found[name] = {"error": traceback.format_exc()}
    return found
