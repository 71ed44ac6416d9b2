"""Trains one cell of the matrix in all the ways that are compared, on this rank, and returns plain data."""

from __future__ import annotations

import contextlib
import copy
import functools
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from cells import Cell
from fsdp1 import CPUPrecision, CPUStrategy
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.precision import DoublePrecision, HalfPrecision, MixedPrecision, Precision
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn import functional
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader

from lightning_gradguard import GradGuard, GradientError
from lightning_gradguard.testing import inject

FEATURES, NOISE, BATCH_SIZE = 6, 3, 8
BAD_STEP, NUM_STEPS, WINDOW = 1, 3, 3
MAX_NORM = 0.05  # far below every norm of these trainings
LOSS_SCALE = 2.0**8  # small enough that no healthy step overflows


def train(cell: Cell, **settings: Any) -> Run:
    """Train from the same beginning in one of these ways, each named by one setting.

    Args:
        cell: precision, optimizer, loop and topology.
        settings: see `Run`.
    """
    run = Run(cell, **settings)
    torch.manual_seed(0)
    module = Student(cell, run)
    callbacks: list[Callback] = [] if run.guard is None else [run.guard]
    trainer = Trainer(
        accelerator="cpu",
        devices=run.num_ranks,
        strategy=_strategy(cell, run.num_ranks),
        plugins=[_precision(cell), *([LightningEnvironment()] if run.num_ranks > 1 else [])],
        callbacks=callbacks,
        max_epochs=1,
        accumulate_grad_batches=WINDOW if cell.loop == "accumulation" else 1,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tempfile.gettempdir(),
    )
    damage: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if run.inject:
        damage = inject(module, "nan", step=_bad_backward(cell), parameter=_TARGET[cell.loop], rank=run.num_ranks - 1)
    with damage:
        try:
            trainer.fit(module, DataLoader(_batches(cell, trainer), batch_size=None))
        except GradientError as error:
            run.error = error
    run.weights = module.copies()
    run.state = _plain([optimizer.state_dict()["state"] for optimizer in trainer.optimizers])
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    run.scale = scaler.get_scale() if scaler else None
    if module.mesh is not None:
        _leave(module.mesh)
    return run


def _leave(mesh: DeviceMesh) -> None:
    """Give up a mesh's process groups; each has threads that would wait for ever, a thousand by the end of the matrix."""
    for dimension in range(mesh.ndim):
        group = mesh.get_group(dimension)
        if group is not distributed.group.WORLD:
            distributed.destroy_process_group(group)


@dataclass
class Run:
    """How to train, and what came out.

    Attributes:
        cell: precision, optimizer, loop and topology.
        guard: the callback; None: train without it.
        clip_by_hand: clip with torch's own function.
        inject: put a NaN into a gradient of step `BAD_STEP`, on the last rank.
        spoil: multiply the loss of that step by NaN, on the last rank.
        leave_out: never take that step.
        first_gradients: what LBFGS was given at its first evaluation.
    """

    cell: Cell
    guard: GradGuard | None = None
    clip_by_hand: bool = False
    inject: bool = False
    spoil: bool = False
    leave_out: bool = False
    weights: list[list[Tensor]] = field(default_factory=list)
    first_gradients: list[list[Tensor]] = field(default_factory=list)
    state: Any = None
    scale: float | None = None
    norms: dict[tuple[int, int], float] = field(default_factory=dict)
    before_step: list[list[list[Tensor]]] = field(default_factory=list)
    error: GradientError | None = None

    @property
    def num_ranks(self) -> int:
        """Processes that train together."""
        return 1 if self.cell.topology == "single" else 2


class Student(LightningModule):
    """A regression, or a GAN, that looks at its own gradients with torch's means alone."""

    def __init__(self, cell: Cell, run: Run) -> None:
        super().__init__()
        self.cell, self.run_ = cell, run
        self.automatic_optimization = cell.loop in ("automatic", "accumulation")
        # 5 rows on two ranks are uneven shards, 1 row leaves a rank an empty one; TP has to split the columns evenly.
        width = 6 if cell.topology == "tp" else 5
        self.second = _mlp(FEATURES, 8, width, 1)
        self.first = _mlp(NOISE, 8, width, FEATURES) if cell.loop == "gan" else None
        self.step_index = -1
        self.mesh: DeviceMesh | None = None

    def configure_model(self) -> None:
        """Shard."""
        if self.cell.topology not in ("fsdp2", "tp"):
            return
        self.mesh = self.device_mesh
        for net in self.nets():
            if self.cell.topology == "tp":
                plan = {"0": ColwiseParallel(), "2": RowwiseParallel(), "4": RowwiseParallel(input_layouts=Replicate())}
                parallelize_module(net, self.device_mesh["tensor_parallel"], plan)
            else:
                fully_shard(net, mesh=self.device_mesh["data_parallel"])

    def nets(self) -> list[nn.Module]:
        """One for each optimizer."""
        return [self.second] if self.first is None else [self.second, self.first]

    def copies(self) -> list[list[Tensor]]:
        """This rank's weights, by optimizer."""
        return [_plain([parameter.detach() for parameter in net.parameters()]) for net in self.nets()]

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor | None:
        """Automatic, manual or GAN."""
        if self.cell.loop == "accumulation":
            is_bad = batch_idx == WINDOW * BAD_STEP + 1
            self._begin_step(batch_idx // WINDOW)
        else:
            is_bad = batch_idx == BAD_STEP
            self._begin_step(batch_idx)
        is_bad = is_bad and self.run_.spoil and self.global_rank == self.run_.num_ranks - 1
        x, noise = batch
        if self.cell.topology != "fsdp1":  # which casts them, and holds its weights in another type than it computes in
            dtype = self.second[0].weight.dtype
            x, noise = x.to(dtype), noise.to(dtype)
        spoil = float("nan") if is_bad else 1.0
        if self.automatic_optimization:
            return self._regress(x) * spoil
        if self.first is None:
            self._step(0, lambda: self._regress(x) * spoil, batch_idx)
            return None
        self._step(0, lambda: self._judge(x, 1.0) + self._judge(self.first(noise).detach(), -1.0), batch_idx)
        self._step(1, lambda: self._judge(self.first(noise), 1.0) * spoil, batch_idx)
        return None

    def _regress(self, x: Tensor) -> Tensor:
        return functional.mse_loss(self.second(x), x.sum(1, keepdim=True))

    def _judge(self, x: Tensor, sign: float) -> Tensor:
        return functional.softplus(-sign * self.second(x)).mean()

    def _begin_step(self, index: int) -> None:
        if index > self.step_index:
            self.run_.before_step.append(self.copies())
        self.step_index = index

    def _step(self, index: int, loss_of: Callable[[], Tensor], batch_idx: int) -> None:
        optimizers = self.optimizers()
        optimizer = optimizers[index] if isinstance(optimizers, list) else optimizers

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = loss_of()
            self.manual_backward(loss)
            return loss

        if self._is_left_out(batch_idx, index):
            closure()
        elif self.cell.optimizer == "lbfgs":
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()

    def _is_left_out(self, batch_idx: int, index: int = 0) -> bool:
        step_index = batch_idx // WINDOW if self.cell.loop == "accumulation" else batch_idx
        return self.run_.leave_out and step_index == BAD_STEP and index == len(self.nets()) - 1

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None) -> None:
        if self.automatic_optimization and self._is_left_out(batch_idx):
            optimizer_closure()
            return
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Without the guard take the norm and, if asked for, clip by hand. Callbacks, the guard too, were here before."""
        if self.run_.guard is None and not self.run_.leave_out:
            self._look_by_hand(optimizer)
        if not self.run_.first_gradients and self.cell.optimizer == "lbfgs":
            groups = optimizer.param_groups
            self.run_.first_gradients = _plain([[parameter.grad for group in groups for parameter in group["params"]]])

    def _look_by_hand(self, optimizer: torch.optim.Optimizer) -> None:
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        scale = 1.0
        if scaler is not None and self.cell.optimizer.endswith("fused"):
            if self.cell.topology == "fsdp1":  # whose `unscale_` leaves what torch's fused Adam can't read
                scale = scaler.get_scale()
            else:
                scaler.unscale_(optimizer)
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        norm = torch.stack([_whole(gradient).double().norm() for gradient in gradients]).norm() / scale
        if self.cell.topology == "fsdp1":
            square = norm.square()
            distributed.all_reduce(square)
            norm = square.sqrt()
        index = [id(entry) for entry in self.trainer.optimizers].index(id(optimizer))
        self.run_.norms.setdefault((self.step_index, index), float(norm))
        if not self.run_.clip_by_hand:
            return
        if self.cell.topology in ("fsdp2", "tp", "fsdp1"):  # torch's own refuses a mix of DTensors and plain tensors
            for gradient in gradients:
                gradient.mul_(float((MAX_NORM / (norm + 1e-6)).clamp(max=1.0)))
        else:  # `clip_grad_norm_` in two: of bf16 gradients it would compute the norm in bf16
            wide = [grad.float() if grad.dtype is torch.bfloat16 else grad for grad in gradients]
            clip_grads_with_norm_(parameters, MAX_NORM, get_total_norm(wide))

    def configure_optimizers(self) -> Any:
        """One for each net."""
        make = _OPTIMIZERS[self.cell.optimizer]
        if (self.cell.precision, self.cell.optimizer) == ("bf16-true", "sgd_fused"):
            # torch 2.13 on a CPU, guard or not: the kernel leaves elements of a new bf16 momentum buffer uninitialised.
            make = functools.partial(make, momentum=0.0)
        return [make(net.parameters()) for net in self.nets()]


def _optimizers() -> dict[str, Callable[..., torch.optim.Optimizer]]:
    kinds = {"foreach": {"foreach": True}, "forloop": {"foreach": False}, "fused": {"fused": True}}
    made: dict[str, Callable[..., torch.optim.Optimizer]] = {
        "lbfgs": functools.partial(
            torch.optim.LBFGS, lr=0.05, max_iter=3, history_size=3, tolerance_grad=0.0, tolerance_change=0.0
        )
    }
    for kind, flags in kinds.items():
        made[f"sgd_{kind}"] = functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=0.01, **flags)
        made[f"adamw_{kind}"] = functools.partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1, **flags)
    return made


_OPTIMIZERS = _optimizers()


def _mlp(inputs: int, hidden: int, width: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inputs, hidden), nn.Tanh(), nn.Linear(hidden, width), nn.Tanh(), nn.Linear(width, outputs)
    )


def _batches(cell: Cell, trainer: Trainer) -> list[tuple[Tensor, Tensor]]:
    """The rank's part of each global batch; the last window of an accumulation is a partial one."""
    count = WINDOW * (NUM_STEPS - 1) + 1 if cell.loop == "accumulation" else NUM_STEPS
    generator = torch.Generator().manual_seed(1)
    whole = [
        (torch.randn(BATCH_SIZE, FEATURES, generator=generator), torch.randn(BATCH_SIZE, NOISE, generator=generator))
        for _ in range(count)
    ]
    if cell.topology in ("single", "tp"):
        return whole
    return [(x[trainer.global_rank :: 2], noise[trainer.global_rank :: 2]) for x, noise in whole]


_TARGET = {"automatic": None, "accumulation": None, "manual": None, "gan": "first.0.weight"}
"""The generator's gradients come from its own loss alone, the discriminator's from both."""


def _bad_backward(cell: Cell) -> int:
    """The backward pass of the target that belongs to step `BAD_STEP`, as `inject` counts them."""
    if cell.loop == "accumulation":
        return WINDOW * BAD_STEP + 1
    return 3 * BAD_STEP + 1 if cell.optimizer == "lbfgs" else BAD_STEP


def _strategy(cell: Cell, num_ranks: int) -> Strategy | str:
    if cell.topology == "single":
        return "auto"
    if cell.topology == "fsdp1":
        return CPUStrategy(auto_wrap_policy=ModuleWrapPolicy({nn.Linear}), process_group_backend="gloo")
    if cell.topology == "ddp":
        return DDPStrategy(process_group_backend="gloo", find_unused_parameters=cell.loop == "gan")
    sizes = {"data_parallel_size": num_ranks, "tensor_parallel_size": 1}
    if cell.topology == "tp":
        sizes = {"data_parallel_size": 1, "tensor_parallel_size": num_ranks}
    return ModelParallelStrategy(process_group_backend="gloo", **sizes)


def _precision(cell: Cell) -> Precision:
    if cell.topology == "fsdp1":
        return CPUPrecision({"fp32": "32-true", "fp16": "16-mixed"}.get(cell.precision, cell.precision), LOSS_SCALE)
    return {
        "fp32": Precision,
        "fp64": DoublePrecision,
        "bf16-mixed": lambda: MixedPrecision("bf16-mixed", "cpu"),
        "bf16-true": lambda: HalfPrecision("bf16-true"),
        "fp16": lambda: MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=LOSS_SCALE)),
    }[cell.precision]()


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _plain(nested: Any) -> Any:
    """A copy with this rank's part in place of each DTensor."""
    local = tree_map(lambda value: value.to_local().clone() if isinstance(value, DTensor) else value, nested)
    return copy.deepcopy(local)
