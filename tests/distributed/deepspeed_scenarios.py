"""Trainings under DeepSpeed's ZeRO on each of two ranks, on a CPU: one function a scenario, plain data back."""

from __future__ import annotations

import functools
import hashlib
import itertools
import math
import os
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["DS_ACCELERATOR"] = "cpu"

import torch
from lightning_package import Checkpoint, DDPStrategy, DeepSpeedStrategy, LightningEnvironment, LightningModule, Trainer
from logged import CLIP, other_norms
from torch import Tensor, distributed, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader

from lightning_gradguard import (
    AGC,
    AdaGC,
    ClipNorm,
    ClipValue,
    Explosion,
    GradGuard,
    GradientError,
    Guard,
    Rollback,
    UpdateRatio,
)
from lightning_gradguard.pipeline import Pipeline
from lightning_gradguard.trainer.conflicts import ConflictError

FEATURES, BATCH, NUM_STEPS = 7, 8, 20


class CPUStrategy(DeepSpeedStrategy):
    """DeepSpeed on a CPU, which Lightning refuses, and without compiling anything."""

    def setup_environment(self) -> None:
        """Passes over the check for CUDA."""
        DDPStrategy.setup_environment(self)

    @property
    def root_device(self) -> torch.device:
        """DeepSpeed wants an index."""
        return torch.device("cpu", 0)

    def setup_distributed(self) -> None:
        """As Lightning's, without CUDA."""
        import deepspeed.comm.torch  # noqa: PLC0415

        deepspeed.comm.torch.build_shm_op = lambda: None  # gloo does
        self.set_world_ranks()
        self._init_deepspeed_distributed()


def strategy(stage: int, *, offload: bool = False, more: dict[str, Any] | None = None, **zero: Any) -> CPUStrategy:
    """ZeRO of a stage, with torch's own optimizer."""
    if offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": False}
    config = {
        "train_micro_batch_size_per_gpu": BATCH // 2,
        "zero_optimization": {"stage": stage, **zero},
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
    }
    return CPUStrategy(process_group_backend="gloo", config=config | (more or {}))


class Student(LightningModule):
    """A regression of sizes that divide by nothing."""

    def __init__(self, *, spoil: Callable[[int, int, Tensor], Tensor] | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Linear(FEATURES, 13), nn.Tanh(), nn.Sequential(nn.Linear(13, 11), nn.Tanh()), nn.Linear(11, 3)
        )
        self.gain = nn.Parameter(torch.ones(1))
        self.spoil = spoil

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Mean square."""
        loss = (self.net(batch) * self.gain - batch[:, :3]).square().mean()
        return loss if self.spoil is None else self.spoil(batch_idx, self.global_rank, loss)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """With a state that a step moves even where gradients are 0."""
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def batches(count: int = NUM_STEPS) -> list[Tensor]:
    """Each rank's part of the global batches."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(BATCH, FEATURES, generator=generator)[distributed.get_rank() :: 2] for _ in range(count)]


def train(module: Student, strategy: CPUStrategy, *callbacks: Any, count: int = NUM_STEPS, **settings: Any) -> Trainer:
    """Train on these batches."""
    ckpt_path = settings.pop("ckpt_path", None)
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy=strategy,
        plugins=[LightningEnvironment()],
        callbacks=list(callbacks),
        **{"max_epochs": 1} | settings,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=any(isinstance(callback, Checkpoint) for callback in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tempfile.gettempdir(),
    )
    trainer.fit(module, DataLoader(batches(count), batch_size=None), ckpt_path=ckpt_path)
    return trainer


def whole_weights(trainer: Trainer) -> list[Tensor]:
    """Of the module, gathered."""
    import deepspeed  # noqa: PLC0415

    parameters = list(trainer.strategy.model.module.parameters())
    if not hasattr(parameters[0], "ds_id"):
        return [parameter.detach().clone() for parameter in parameters]
    with deepspeed.zero.GatheredParameters(parameters):
        return [parameter.detach().clone() for parameter in parameters]


def healthy(stage: int, **zero: Any) -> dict[str, Any]:
    """Twenty healthy steps: what the guard measured, and the weights with and without it."""
    records: list[Any] = []
    guard = GradGuard(sinks=[records.append], vanishing=None)
    guarded = train(Student(), strategy(stage, **zero), guard)
    alone = train(Student(), strategy(stage, **zero))
    measurement = guard.last.measurement
    return {
        "names": list(measurement.names),
        "numels": measurement.layout.numels.tolist(),
        "ndims": measurement.layout.ndims.tolist(),
        "norms": [record.measurement.norms.tolist() for record in records],
        "same": all(torch.equal(*pair) for pair in zip(whole_weights(guarded), whole_weights(alone), strict=True)),
        "num_steps": guard.num_steps,
        "alerts": len(guard.alerts),
    }


def reference_norms() -> list[list[float]]:
    """Norms of the same training in one process on the global batches, without Lightning."""
    module = Student()
    optimizer = module.configure_optimizers()
    generator = torch.Generator().manual_seed(1)
    norms = []
    for _ in range(NUM_STEPS):
        optimizer.zero_grad()
        module.training_step(torch.randn(BATCH, FEATURES, generator=generator), 0).backward()
        norms.append([float(parameter.grad.double().norm()) for parameter in module.parameters()])
        optimizer.step()
    return norms


class Digests(Checkpoint):
    """Of all weights, and of this rank's fp32 weights and optimizer state: before the first batch, and after each."""

    def __init__(self) -> None:
        self.digests: list[str] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """The first only."""
        if not self.digests:
            self._note(trainer)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Each."""
        self._note(trainer)

    def _note(self, trainer: Trainer) -> None:
        inner = getattr(trainer.optimizers[0], "optimizer", trainer.optimizers[0])
        tensors = [*whole_weights(trainer), *getattr(trainer.optimizers[0], "fp32_partitioned_groups_flat", [])]
        tensors += [parameter for group in inner.param_groups for parameter in group["params"]]
        tensors += [state[key] for state in inner.state.values() for key in sorted(state)]
        flat = b"".join(tensor.detach().float().contiguous().numpy().tobytes() for tensor in tensors)
        self.digests.append(hashlib.sha256(flat).hexdigest())


def faulty(stage: int, action: str = "skip", *, offload: bool = False, at: int = 2, **settings: Any) -> dict[str, Any]:
    """A NaN loss on rank 1 alone, in batch `at` of six: what was decided, and what each batch has moved."""
    watch, guard = Digests(), GradGuard(nonfinite=action, rollback=settings.pop("rollback", None))
    module = Student(spoil=lambda index, rank, loss: loss * math.nan if (index, rank) == (at, 1) else loss)
    engine = strategy(stage, offload=offload)
    error = None
    try:
        train(module, engine, guard, watch, count=6, **settings)
    except GradientError as raised:
        error = raised
    return {
        "digests": watch.digests,
        "moved": [before != after for before, after in itertools.pairwise(watch.digests)],
        "num_skipped": guard.num_skipped,
        "alerts": [[alert.kind, alert.action.value, alert.step, alert.micro_batch, alert.rank] for alert in guard.alerts],
        "stopped_at": guard.stopped_by and guard.stopped_by.step,
        "raised_at": error and error.alert.step,
        "engine": None if error else [engine.model.global_steps, engine.model.skipped_steps],
    }


def exploded(stage: int, **settings: Any) -> dict[str, Any]:
    """A finite loss that is far too large in batch 2 of five, which only the guard finds bad."""
    watch, guard = Digests(), GradGuard(explosion=Explosion("skip", max_norm=10.0))
    engine = strategy(stage, offload=settings.pop("offload", False))
    train(
        Student(spoil=lambda index, rank, loss: loss * (100.0 if index == 2 else 1.0)),
        engine,
        guard,
        watch,
        count=5,
        **settings,
    )
    return {
        "moved": [before != after for before, after in itertools.pairwise(watch.digests)],
        "num_skipped": guard.num_skipped,
        "engine": [engine.model.global_steps, engine.model.skipped_steps],
    }


def rolled_back(stage: int, directory: Path | None = None, **settings: Any) -> dict[str, Any]:
    """A rollback in batch 4; snapshots after batches 1 and 3, of which the first is confirmed."""
    how = Rollback(every_n_steps=2, confirm_steps=1, skip_batches=0, lr_factor=0.5, cooldown_steps=1, directory=directory)
    return faulty(stage, "rollback", at=4, rollback=how, **settings)


def fp16(stage: int, *, power: int = 8, offload: bool = False) -> dict[str, Any]:
    """In batch 6 of eight a loss that only the guard finds too large; the loss scale begins with a power of two."""
    records: list[Any] = []
    watch = Digests()
    guard = GradGuard(explosion=Explosion("skip", max_norm=10.0), vanishing=None, sinks=[records.append])
    scaling = {"enabled": True, "loss_scale": 0, "initial_scale_power": power, "hysteresis": 1, "loss_scale_window": 1000}
    engine = strategy(stage, offload=offload, more={"fp16": scaling})
    module = Student(spoil=lambda index, rank, loss: loss * (40.0 if index == 6 else 1.0))
    train(module, engine, guard, watch, count=8, precision="16-true")
    return {
        "overflows": [record.measurement.is_scaler_overflow for record in records],
        "skipped": [record.decision.skip for record in records],
        "norms": [record.measurement.global_norm for record in records],
        "alerts": [alert.kind for alert in guard.alerts],
        "moved": [before != after for before, after in itertools.pairwise(watch.digests)],
        "scales": [record.measurement.loss_scale for record in records],
        "scale": engine.model.optimizer.loss_scale,
        "engine": [engine.model.global_steps, engine.model.skipped_steps],
    }


CLIPPERS: dict[str, Callable[[], Any]] = {
    "norm": lambda: ClipNorm(0.3),
    "norm-1": lambda: ClipNorm(0.3, 1.0),
    "value": lambda: ClipValue(0.05),
    "agc": lambda: AGC(0.01, exclude=["gain"]),
    "adagc": lambda: AdaGC(warmup_steps=2, max_norm=0.3),
}


def clipped(stage: int, **zero: Any) -> dict[str, Any]:
    """Six steps with each clipper: factor, norm after it, and the weights at the end."""
    found = {}
    for name, clipper in CLIPPERS.items():
        records: list[Any] = []
        guard = GradGuard(clip=clipper(), sinks=[records.append], explosion=None, vanishing=None)
        trainer = train(Student(), strategy(stage, **zero), guard, count=6)
        weights = torch.cat([weight.flatten() for weight in whole_weights(trainer)])
        found[name] = {"steps": [[it.clip_coef, it.clipped_norm] for it in records], "weights": weights.tolist()}
    return found


def reference_clipped() -> dict[str, Any]:
    """The same in one process on the global batches, by a guard of plain gradients."""
    found = {}
    for name, clipper in CLIPPERS.items():
        module = Student()
        optimizer = module.configure_optimizers()
        guard = Guard(module.named_parameters(), optimizer, clip=clipper(), explosion=None, vanishing=None)
        generator = torch.Generator().manual_seed(1)
        steps = []
        for _ in range(6):
            optimizer.zero_grad()
            module.training_step(torch.randn(BATCH, FEATURES, generator=generator), 0).backward()
            record = guard.step()
            optimizer.step()
            steps.append([record.clip_coef, record.clipped_norm])
        weights = torch.cat([parameter.detach().flatten() for parameter in module.parameters()])
        found[name] = {"steps": steps, "weights": weights.tolist()}
    return found


def accumulated(stage: int) -> dict[str, Any]:
    """Windows of two micro-batches: norms of the windows, and a fault in the second of the second."""
    norms: list[float] = []
    train(
        Student(),
        strategy(stage),
        GradGuard(sinks=[lambda it: norms.append(it.measurement.global_norm)]),
        accumulate_grad_batches=2,
    )
    return faulty(stage, at=3, accumulate_grad_batches=2) | {"norms": norms}


def watched(stage: int) -> dict[str, Any]:
    """Histograms, updates, and a parameter that is excluded."""
    records: list[Any] = []
    guard = GradGuard(
        sinks=[records.append],
        clip=CLIP,
        log_every_n_steps=1,
        log_norm_types=[1.0, math.inf],
        histogram_every_n_steps=1,
        histograms_of="clipped",
        exclude=["net.3.*"],
        detectors=[UpdateRatio()],
        vanishing=None,
    )
    train(Student(), strategy(stage), guard, count=4)
    return {
        "counted": [float(record.histograms.counts.sum() + record.histograms.num_zero.sum()) for record in records],
        "updates": [
            [] if record.measurement.update_ratios is None else record.measurement.update_ratios.tolist()
            for record in records
        ],
        "names": list(guard.last.measurement.names),
        # One rank alone has sinks, but all measure.
        "first": [[other_norms(record), record.histograms.counts.tolist()] for record in records[:1]],
        "last": other_norms(guard.last),
    }


class Largest(TorchDispatchMode):
    """Notes the largest tensor that an operator makes."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run it, and look at what comes back."""
        found = func(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(it.numel() for it in tree_leaves(found) if isinstance(it, Tensor))])
        return found


def collectives(stage: int) -> dict[str, Any]:
    """Calls and bytes of torch's `all_reduce` inside the guard's step alone, and the largest tensor that is made there."""
    sizes: list[int] = []
    largest = Largest()
    real, real_decide = distributed.all_reduce, Pipeline.decide

    def counting(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        sizes.append(tensor.numel() * tensor.element_size())
        return real(tensor, *args, **kwargs)

    def decide(self: Pipeline, *args: Any) -> Any:
        sizes.clear()
        distributed.all_reduce = counting
        try:
            with largest:
                return real_decide(self, *args)
        finally:
            distributed.all_reduce = real

    Pipeline.decide = decide
    try:
        train(Student(), strategy(stage), GradGuard(clip=1.0, histogram_every_n_steps=None), count=3)
    finally:
        Pipeline.decide = real_decide
    return {"sizes": sizes, "largest": largest.numel}


def resumed(stage: int, folder: Path) -> dict[str, Any]:
    """Two epochs of four steps in one go, and one epoch, a checkpoint, and the other one."""
    coefs: list[float] = []

    def run(**settings: Any) -> Trainer:
        guard = GradGuard(clip=AdaGC(warmup_steps=2, max_norm=0.3), sinks=[lambda record: coefs.append(record.clip_coef)])
        return train(Student(), strategy(stage), guard, count=4, **settings)

    whole = whole_weights(run(max_epochs=2))
    in_one_go, coefs = coefs, []
    path = folder / f"stage{stage}.ckpt"
    run().save_checkpoint(path)
    again = whole_weights(run(max_epochs=2, ckpt_path=path))
    same = all(torch.equal(*pair) for pair in zip(whole, again, strict=True))
    return {"in_one_go": in_one_go, "in_two": coefs, "same": same}


def refused() -> dict[str, dict[str, Any]]:
    """What can't be guarded, with what is said, and whether a model had been built for it."""
    fp16 = {"fp16": {"enabled": True}}
    cases = {
        "clip": (strategy(2, more={"gradient_clipping": 1.0}), GradGuard(clip=1.0)),
        "histograms": (strategy(2, more={"gradient_clipping": 1.0}), GradGuard(histograms_of="clipped")),
        "stage": (strategy(0, more={"bf16": {"enabled": True}}), GradGuard()),
        "fp16": (strategy(2, more=fp16), GradGuard(clip=1.0)),
        "nvme": (strategy(3, offload_optimizer={"device": "nvme", "nvme_path": tempfile.gettempdir()}), GradGuard()),
    }
    precisions = {"stage": "bf16-true", "fp16": "16-true"}
    found = {}
    for name, (engine, guard) in cases.items():
        try:
            train(Student(), engine, guard, count=1, precision=precisions.get(name))
        except ConflictError as error:  # noqa: PERF203
            found[name] = {"said": str(error), "is_built": hasattr(engine.model, "fp16_enabled")}
    return found


def play(names: list[str], folder: str) -> dict[str, Any]:
    """These scenarios; where one fails, its traceback."""
    found = {}
    for name in names:
        try:
            uses_disk = name.startswith(("resumed", "disk"))
            found[name] = SCENARIOS[name](Path(folder)) if uses_disk else SCENARIOS[name]()
        except Exception:  # noqa: BLE001, PERF203 - it is the finding, and the others go on
            found[name] = {"error": traceback.format_exc()}
    return found


SCENARIOS: dict[str, Callable[..., Any]] = {
    **{
        f"{what}-{stage}": functools.partial(work, stage)
        for what, work in {
            "healthy": healthy,
            "skip": faulty,
            "stop": functools.partial(faulty, action="stop"),
            "raise": functools.partial(faulty, action="raise"),
            "exploded": exploded,
            "bf16": functools.partial(exploded, precision="bf16-mixed"),
            "clipped": clipped,
            "accumulated": accumulated,
            "watched": watched,
            "collectives": collectives,
            "resumed": resumed,
            "healthy-offload": functools.partial(healthy, offload=True),
            "skip-offload": functools.partial(faulty, offload=True),
            "exploded-offload": functools.partial(exploded, offload=True),
            "rollback": rolled_back,
            "rollback-offload": functools.partial(rolled_back, offload=True),
            "rollback-bf16": functools.partial(rolled_back, precision="bf16-true"),
            "fp16": fp16,
            "fp16-offload": functools.partial(fp16, offload=True),
            "fp16-overflow": functools.partial(fp16, power=20),
        }.items()
        for stage in (1, 2, 3)
    },
    **{f"disk-{stage}": lambda folder, stage=stage: rolled_back(stage, folder / f"disk{stage}") for stage in (1, 3)},
    **{
        f"{what}-0": functools.partial(work, 0)
        for what, work in {
            "healthy": healthy,
            "skip": faulty,
            "stop": functools.partial(faulty, action="stop"),
            "raise": functools.partial(faulty, action="raise"),
            "clipped": clipped,
            "accumulated": accumulated,
            "resumed": resumed,
            "rollback": rolled_back,
        }.items()
    },
    "refused": refused,
}
