"""Trainings under FSDP1 on each of several ranks, on a CPU: one function a scenario, plain data back."""

from __future__ import annotations

import functools
import hashlib
import inspect
import itertools
import math
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from fsdp1 import CPUPrecision, CPUStrategy
from lightning_package import Callback, Checkpoint, LightningEnvironment, LightningModule, Trainer
from logged import CLIP, other_norms
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.utils.data import DataLoader

from lightning_gradguard import (
    AGC,
    AdaGC,
    AutoClip,
    ClipNorm,
    ClipParameterNorm,
    ClipValue,
    Explosion,
    GradGuard,
    GradientError,
    Grouped,
    Guard,
    Rollback,
    UpdateRatio,
    ZClip,
)
from lightning_gradguard.trainer.conflicts import ConflictError

FEATURES, BATCH, NUM_STEPS = 7, 8, 20


class Student(LightningModule):
    """A regression of sizes that divide by nothing, with a tied weight if asked for."""

    def __init__(self, *, flat: bool = False, spoil: Callable[[int, int, Tensor], Tensor] | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Linear(FEATURES, 13), nn.Tanh(), nn.Sequential(nn.Linear(13, 11), nn.Tanh()), nn.Linear(11, 3)
        )
        self.gain = nn.Parameter(torch.ones(3))
        self.flat, self.spoil = flat, spoil

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Mean square."""
        loss = (self.net(batch) * self.gain - batch[:, :3]).square().mean()
        return loss if self.spoil is None else self.spoil(batch_idx, self.global_rank, loss)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Without original parameters the wrapper's are the ones to train."""
        return torch.optim.AdamW(self.trainer.model.parameters() if self.flat else self.parameters(), lr=0.01)


def strategy(sharding: str = "FULL_SHARD", *, originals: bool = True, wrap: bool = True, **settings: Any) -> CPUStrategy:
    """FSDP1, with each linear layer in a wrapper of its own or not."""
    if sharding.startswith("HYBRID"):
        settings["device_mesh"] = init_device_mesh("cpu", (2, 2))
    if wrap:
        settings["auto_wrap_policy"] = ModuleWrapPolicy({nn.Linear})
    return CPUStrategy(sharding_strategy=sharding, use_orig_params=originals, process_group_backend="gloo", **settings)


def batches(count: int = NUM_STEPS, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Each rank's part of the global batches."""
    generator = torch.Generator().manual_seed(1)
    rank, size = distributed.get_rank(), distributed.get_world_size()
    whole = [torch.randn(BATCH, FEATURES, generator=generator, dtype=torch.float64) for _ in range(count)]
    return [batch[rank::size].to(dtype) for batch in whole]


def train(module: Student, strategy: CPUStrategy, *callbacks: Any, count: int = NUM_STEPS, **settings: Any) -> Trainer:
    """Train on these batches."""
    precision, ckpt_path = settings.pop("precision", None), settings.pop("ckpt_path", None)
    trainer = Trainer(
        accelerator="cpu",
        devices=distributed.get_world_size(),
        strategy=strategy,
        plugins=[LightningEnvironment(), *([] if precision is None else [CPUPrecision(precision, 2.0**8)])],
        callbacks=list(callbacks),
        **{"max_epochs": 1} | settings,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=any(isinstance(callback, Checkpoint) for callback in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tempfile.gettempdir(),
    )
    how = {} if ckpt_path is None else {"ckpt_path": ckpt_path}
    if how and "weights_only" in inspect.signature(trainer.fit).parameters:  # from Lightning 2.6 on
        how["weights_only"] = False
    trainer.fit(module, DataLoader(batches(count), batch_size=None), **how)
    return trainer


class Norms(Callback):
    """The norms of whole gradients at each step, by torch's own gathering of them."""

    def __init__(self) -> None:
        self.by_name: list[dict[str, float]] = []

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Gather, and take the norm."""
        with FullyShardedDataParallel.summon_full_params(trainer.strategy.model, with_grads=True):
            grads = {name: parameter.grad for name, parameter in trainer.strategy.model.named_parameters()}
            self.by_name.append(
                {
                    name.replace("_fsdp_wrapped_module.", ""): float(grad.double().norm())
                    for name, grad in grads.items()
                    if grad is not None
                }
            )


def healthy(sharding: str, *, originals: bool, wrap: bool) -> dict[str, Any]:
    """Twenty healthy steps: what the guard measured, and the weights with and without it."""
    records: list[Any] = []
    guard = GradGuard(sinks=[records.append], vanishing=None)
    module = Student(flat=not originals)
    gathered = Norms()
    callbacks = [guard, gathered] if originals and sharding != "NO_SHARD" else [guard]
    train(module, strategy(sharding, originals=originals, wrap=wrap), *callbacks)
    alone = Student(flat=not originals)
    train(alone, strategy(sharding, originals=originals, wrap=wrap))
    return {
        "names": list(guard.last.measurement.names),
        "numels": guard.last.measurement.layout.numels.tolist(),
        "ndims": guard.last.measurement.layout.ndims.tolist(),
        "norms": [record.measurement.norms.tolist() for record in records],
        "gathered": gathered.by_name,
        "same": all(torch.equal(*pair) for pair in zip(module.parameters(), alone.parameters(), strict=True)),
        "num_steps": guard.num_steps,
        "alerts": len(guard.alerts),
    }


def reference_norms() -> list[list[float]]:
    """Norms of the same training in one process on the global batches, without Lightning."""
    module = Student()
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.01)
    generator = torch.Generator().manual_seed(1)
    norms = []
    for _ in range(NUM_STEPS):
        batch = torch.randn(BATCH, FEATURES, generator=generator, dtype=torch.float64).float()
        optimizer.zero_grad()
        module.training_step(batch, 0).backward()
        norms.append([float(parameter.grad.double().norm()) for parameter in module.parameters()])
        optimizer.step()
    return norms


def faulty(
    sharding: str = "FULL_SHARD", *, originals: bool = True, action: str = "skip", at: int = 2, **settings: Any
) -> dict[str, Any]:
    """A NaN loss on rank 1 alone, in batch `at` of six: what was decided, and what each batch has moved."""
    watch = Digests()
    guard = GradGuard(nonfinite=action, **({"rollback": settings.pop("rollback")} if "rollback" in settings else {}))
    module = Student(
        flat=not originals, spoil=lambda index, rank, loss: loss * math.nan if (index, rank) == (at, 1) else loss
    )
    error = None
    try:
        train(
            module, strategy(sharding, originals=originals, **settings.pop("engine", {})), guard, watch, count=6, **settings
        )
    except GradientError as raised:
        error = raised
    return {
        "moved": [before != after for before, after in itertools.pairwise(watch.digests)],
        "first": watch.digests[0],
        "digests": watch.digests,
        "num_steps": guard.num_steps,
        "num_skipped": guard.num_skipped,
        "alerts": [[alert.kind, alert.action.value, alert.step, alert.micro_batch, alert.rank] for alert in guard.alerts],
        "names": [report.name for report in guard.alerts[0].parameters] if guard.alerts else [],
        "stopped_at": guard.stopped_by and guard.stopped_by.step,
        "raised_at": error and error.alert.step,
        "culprits": [alert.culprit for alert in guard.alerts],
    }


class Digests(Checkpoint):
    """Of this rank's weights and optimizer state: before the first batch, and after each.

    The Trainer calls what is a `Checkpoint` last, after a rollback.
    """

    def __init__(self) -> None:
        self.digests: list[str] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """The first only."""
        if not self.digests:
            self._note(trainer, pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Each."""
        self._note(trainer, pl_module)

    def _note(self, trainer: Trainer, module: LightningModule) -> None:
        tensors = [*trainer.strategy.model.parameters()]
        # Not by the dictionary's own order, which a checkpoint changes; a parameter of which nothing is here has no state.
        states = trainer.optimizers[0].state
        in_order = [
            states.get(parameter, {}) for group in trainer.optimizers[0].param_groups for parameter in group["params"]
        ]
        tensors += [state[key] for state in in_order for key in sorted(state)]
        flat = b"".join(tensor.detach().float().contiguous().numpy().tobytes() for tensor in tensors)
        self.digests.append(hashlib.sha256(flat).hexdigest())


CLIPPERS: dict[str, Callable[[], Any]] = {
    "norm": lambda: ClipNorm(0.3),
    "norm-1": lambda: ClipNorm(0.3, 1.0),
    "norm-inf": lambda: ClipNorm(0.1, math.inf),
    "value": lambda: ClipValue(0.05),
    "agc": lambda: AGC(0.01, exclude=["gain"]),
    "autoclip": lambda: AutoClip(40.0, window=4),
    "zclip": lambda: ZClip(warmup_steps=2, max_norm=0.3),
    "adagc": lambda: AdaGC(warmup_steps=2, max_norm=0.3),
    "parameter-norm": lambda: ClipParameterNorm(0.1),
    "grouped": lambda: Grouped({"net.0.*": AGC(0.01), "net.2.*": ClipNorm(0.1, 1.0), "gain": 0.01}),
}


def clipped(sharding: str, *, originals: bool, wrap: bool) -> dict[str, Any]:
    """Six steps with each clipper: factor and norm after it."""
    found = {}
    for name, clipper in CLIPPERS.items():
        records: list[Any] = []
        guard = GradGuard(clip=clipper(), sinks=[records.append], explosion=None, vanishing=None)
        train(Student(flat=not originals), strategy(sharding, originals=originals, wrap=wrap), guard, count=6)
        found[name] = [[record.clip_coef, record.clipped_norm] for record in records]
    return found


def reference_clipped() -> dict[str, Any]:
    """The same in one process on the global batches, by a guard of plain gradients."""
    found = {}
    for name, clipper in CLIPPERS.items():
        module = Student()
        optimizer = torch.optim.AdamW(module.parameters(), lr=0.01)
        guard = Guard(module.named_parameters(), optimizer, clip=clipper(), explosion=None, vanishing=None)
        generator = torch.Generator().manual_seed(1)
        found[name] = []
        for _ in range(6):
            batch = torch.randn(BATCH, FEATURES, generator=generator, dtype=torch.float64).float()
            optimizer.zero_grad()
            module.training_step(batch, 0).backward()
            record = guard.step()
            optimizer.step()
            found[name].append([record.clip_coef, record.clipped_norm])
    return found


def watched() -> dict[str, Any]:
    """Histograms, updates, and damage in a parameter that is excluded."""
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

    def spoil(index: int, rank: int, loss: Tensor) -> Tensor:
        return loss if index != 3 else loss + 0.0 * module.net[3].bias.sum() * (math.inf if rank else 1.0)

    module = Student(spoil=spoil)
    train(module, strategy(wrap=False), guard, count=5)
    return {
        "counted": [float(record.histograms.counts.sum() + record.histograms.num_zero.sum()) for record in records[:3]],
        "updates": [
            [] if record.measurement.update_ratios is None else record.measurement.update_ratios.tolist()
            for record in records
        ],
        "skipped": [record.decision.skip for record in records],
        "names": list(guard.last.measurement.names),
        # One rank alone has sinks, but all measure.
        "first": [[other_norms(record), record.histograms.counts.tolist()] for record in records[:1]],
        "last": other_norms(guard.last),
    }


def collectives(*, originals: bool) -> dict[str, Any]:
    """Calls and bytes of `all_reduce` inside the guard's step; FSDP1's own are reduce-scatters and gathers."""
    sizes: list[int] = []
    real = distributed.all_reduce

    class Counts(Callback):
        def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
            sizes.clear()

    def counting(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        sizes.append(tensor.numel() * tensor.element_size())
        return real(tensor, *args, **kwargs)

    distributed.all_reduce = counting
    try:
        guard = GradGuard(clip=1.0, histogram_every_n_steps=None)
        train(Student(flat=not originals), strategy(originals=originals), guard, Counts(), count=3)
    finally:
        distributed.all_reduce = real
    return {"sizes": sizes}


def mixed(precision: str, *, originals: bool, **settings: Any) -> dict[str, Any]:
    """In half precision, with accumulation: norms by the guard and by gathering, and an explosion in the third step."""
    records: list[Any] = []
    guard = GradGuard(explosion=Explosion("skip", max_norm=10.0), sinks=[records.append], vanishing=None)
    watch, gathered = Digests(), Norms()

    def spoil(index: int, rank: int, loss: Tensor) -> Tensor:
        return loss * (40.0 if index in (4, 5) else 1.0)

    callbacks = [guard, watch, *([gathered] if originals else [])]
    module = Student(flat=not originals, spoil=spoil)
    trainer = train(
        module,
        strategy(originals=originals),
        *callbacks,
        count=8,
        precision=precision,
        accumulate_grad_batches=2,
        **settings,
    )
    names = guard.last.measurement.names
    return {
        "norms": [record.measurement.norms.tolist() for record in records],
        "gathered": [[row[name] for name in names] for row in gathered.by_name],
        "skipped": [record.decision.skip for record in records],
        "moved": [before != after for before, after in itertools.pairwise(watch.digests)],
        "scale": trainer.precision_plugin.scaler.get_scale() if precision == "16-mixed" else None,
    }


def resumed(folder: Path) -> dict[str, Any]:
    """Two epochs of four steps in one go, and one epoch, a sharded checkpoint, and the other one."""
    coefs: list[float] = []

    def run(**settings: Any) -> tuple[Trainer, Student]:
        guard = GradGuard(clip=AdaGC(warmup_steps=2, max_norm=0.3), sinks=[lambda record: coefs.append(record.clip_coef)])
        module = Student()
        return train(module, strategy(state_dict_type="sharded"), guard, count=4, **settings), module

    _, whole = run(max_epochs=2)
    in_one_go, coefs = coefs, []
    trainer, _ = run()
    trainer.save_checkpoint(folder / "epoch.ckpt")
    _, again = run(max_epochs=2, ckpt_path=folder / "epoch.ckpt")
    same = all(torch.equal(*pair) for pair in zip(whole.parameters(), again.parameters(), strict=True))
    return {"in_one_go": in_one_go, "in_two": coefs, "same": same}


def rolled_back(directory: Path | None, *, originals: bool) -> dict[str, Any]:
    """A rollback in batch 4; snapshots after batches 1 and 3, of which the first is confirmed."""
    settings = Rollback(every_n_steps=2, confirm_steps=1, skip_batches=0, directory=directory)
    engine = {} if directory is None else {"state_dict_type": "sharded"}
    return faulty(action="rollback", originals=originals, at=4, rollback=settings, engine=engine)


class WithLBFGS(Student):
    """Needs each parameter whole."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Three evaluations a step."""
        return torch.optim.LBFGS(self.trainer.model.parameters() if self.flat else self.parameters(), lr=0.1, max_iter=3)


def refused() -> str:
    """LBFGS on shards."""
    try:
        train(WithLBFGS(), strategy(), GradGuard(), count=1)
    except ConflictError as error:
        return str(error)
    return "not refused"


def lbfgs(*, originals: bool) -> dict[str, Any]:
    """LBFGS on what isn't sharded: four steps with a guard and without, and four with a NaN loss on rank 1 in the third."""

    class Weights(Callback):
        def __init__(self) -> None:
            self.seen: list[list[float]] = []

        def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
            self.seen.append(torch.cat([parameter.detach().flatten() for parameter in pl_module.parameters()]).tolist())

    def run(*callbacks: Any, spoil: Any = None) -> list[list[float]]:
        weights = Weights()
        module = WithLBFGS(flat=not originals, spoil=spoil)
        train(module, strategy("NO_SHARD", originals=originals), *callbacks, weights, count=4)
        return weights.seen

    guard = GradGuard()
    spoiled = run(guard, spoil=lambda index, rank, loss: loss * math.nan if (index, rank) == (2, 1) else loss)
    return {
        "same": run(GradGuard()) == run(),
        "moved": [before != after for before, after in itertools.pairwise(spoiled)],
        "alerts": [[alert.kind, alert.action.value, alert.step, alert.rank] for alert in guard.alerts],
    }


def play(names: list[str], folder: str = "") -> dict[str, Any]:
    """These scenarios; where one fails, its traceback."""
    found = {}
    for name in names:
        try:
            found[name] = SCENARIOS[name](Path(folder)) if name.endswith("disk") else SCENARIOS[name]()
        except Exception:  # noqa: BLE001, PERF203 - it is the finding, and the others go on
            found[name] = {"error": traceback.format_exc()}
    return found


_KINDS = [
    (sharding, originals, wrap)
    for sharding in ("FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD", "HYBRID_SHARD")
    for originals in (True, False)
    for wrap in (True, False)
]


def name_of(sharding: str, originals: bool, wrap: bool) -> str:  # noqa: FBT001
    """How a way to shard is called in the names of the scenarios."""
    return f"{sharding}-{'original' if originals else 'flat'}-{'layers' if wrap else 'root'}"


SCENARIOS: dict[str, Callable[..., Any]] = {
    **{
        f"{what.__name__}-{name_of(*kind)}": functools.partial(what, kind[0], originals=kind[1], wrap=kind[2])
        for what in (healthy, clipped)
        for kind in _KINDS
    },
    **{
        f"{action}-{name_of(sharding, originals, True)}": functools.partial(
            faulty, sharding, originals=originals, action=action
        )
        for action in ("skip", "stop", "raise")
        for sharding, originals, wrap in _KINDS
        if wrap
    },
    "accumulation": functools.partial(faulty, at=3, accumulate_grad_batches=2),
    "watched": watched,
    "refused": refused,
    "resumed-disk": resumed,
    "rollback-disk": lambda folder: rolled_back(folder / "snapshots", originals=True),
    **{
        f"{what}-{'original' if originals else 'flat'}": functools.partial(work, originals=originals)
        for what, work in {
            "collectives": collectives,
            "bf16": functools.partial(mixed, "bf16-mixed"),
            "fp16": functools.partial(mixed, "16-mixed"),
            "rollback": functools.partial(rolled_back, None),
            "lbfgs": lbfgs,
        }.items()
        for originals in (True, False)
    },
}
