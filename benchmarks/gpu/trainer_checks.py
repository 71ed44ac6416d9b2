"""Checks in Lightning's Trainer: its hooks don't wait, culprits are found, and training goes back to a snapshot."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from benchmarks.gpu.loop import BATCH_SIZE, FEATURES, WIDTH, LeftOutError, expect, no_sync, quiet
from lightning_gradguard import GradGuard, Rollback

NUM_BATCHES, FAULTY, BAD_ROW, SETTLED = 16, 11, 3, 6
HOOKS = ("on_train_batch_start", "on_before_backward", "on_before_optimizer_step", "on_train_batch_end")


class Net(LightningModule):
    """A regression, one row of one of whose batches gets a zero where `reach` can't take it."""

    def __init__(self, reach: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(FEATURES, WIDTH), nn.Linear(WIDTH, 1)
        self.reach = reach

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The sum of the inputs is the target."""
        inputs, factor = batch
        hidden = self.head(torch.tanh(self.body(inputs))).sigmoid() * factor
        return F.mse_loss(self.reach(hidden), inputs.sum(1, keepdim=True))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """One that leaves steps to the device."""
        return torch.optim.AdamW(self.parameters(), lr=1e-3, fused=True)


def fit(device: torch.device, guard: GradGuard, module: LightningModule, *, is_faulty: bool, **settings: Any) -> None:
    """One epoch of batches that lie on the device."""
    batches = []
    for index in range(NUM_BATCHES):
        generator = torch.Generator().manual_seed(index)
        factor = torch.ones(BATCH_SIZE, 1)
        factor[BAD_ROW] = 0.0 if is_faulty and index == FAULTY else 1.0
        batches.append((torch.randn(BATCH_SIZE, FEATURES, generator=generator).to(device), factor.to(device)))
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            accelerator="gpu" if device.type == "cuda" else "cpu",
            devices=1,
            max_epochs=1,
            callbacks=[guard],
            logger=False,
            log_every_n_steps=5,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
            **settings,
        )
        trainer.fit(module, DataLoader(batches, batch_size=None))


def _strict(name: str) -> Callable[..., None]:
    def hook(self: Strict, trainer: Trainer, *arguments: Any) -> None:
        is_settled = trainer.global_step >= SETTLED
        self.num_strict += is_settled
        with no_sync(self.device) if is_settled else nullcontext():
            getattr(GradGuard, name)(self, trainer, *arguments)

    return hook


class Strict(GradGuard):
    """A guard whose hooks must not wait for the device, once the first steps are over."""

    def __init__(self, device: torch.device, **settings: Any) -> None:
        super().__init__(**settings)
        self.device = device
        self.num_strict = 0


for _name in HOOKS:
    setattr(Strict, _name, _strict(_name))


def healthy_hooks(device: torch.device) -> str:
    """Every hook of a healthy step, clipping and histograms included."""
    torch.manual_seed(0)
    guard = Strict(device, clip=1e-3, histogram_every_n_steps=4)
    fit(device, guard, Net(torch.tanh), is_faulty=False)
    expect(guard.num_strict > 0, "no hook was looked at")
    expect(guard.num_clipped == guard.num_steps, "not every step was clipped")
    return f"{guard.num_strict} calls of {len(HOOKS)} hooks"


def culprits(device: torch.device) -> str:
    """Who made a NaN in the forward pass, and who in the backward pass, which autograd runs in threads of its own."""
    for reach, phase, operator in ((torch.log, "forward", "log"), (torch.sqrt, "backward", "sqrt")):
        torch.manual_seed(0)
        guard = GradGuard(explosion=None, vanishing=None)
        with quiet():
            fit(device, guard, Net(reach), is_faulty=True)
        expect(len(guard.alerts) == 1, f"{phase}: {len(guard.alerts)} alerts")
        culprit = guard.alerts[0].culprit
        if culprit is None:
            raise AssertionError(f"{phase}: no culprit")
        expect(culprit.phase == phase, f"{phase}: found in the {culprit.phase}")
        expect(operator in str(culprit.op).lower(), f"{phase}: {culprit.op} instead of {operator}")
        expect(culprit.samples == (BAD_ROW,), f"{phase}: samples {culprit.samples}")
    return "`log` of 0 in the forward pass, `sqrt` of 0 in the backward pass: operator, phase and sample"


def rollback(device: torch.device) -> str:
    """A snapshot in the host's memory, and back."""
    torch.manual_seed(0)
    guard = GradGuard(nonfinite="rollback", rollback=Rollback(every_n_steps=2, confirm_steps=1))
    module = Net(torch.log)
    with quiet():
        fit(device, guard, module, is_faulty=True)
    expect(any(alert.kind == "rollback" for alert in guard.alerts), "no rollback")
    expect(all(bool(value.isfinite().all()) for value in module.state_dict().values()), "weights are damaged")
    return "once; weights are finite"


def mixed_precision(device: torch.device) -> str:
    """`precision="16-mixed"` with a fused optimizer and clipping, which the Trainer's own clipping refuses."""
    if device.type != "cuda":
        raise LeftOutError("on a CPU the Trainer takes bf16 instead")
    torch.manual_seed(0)
    guard, module = GradGuard(clip=1e-3), Net(torch.tanh)
    fit(device, guard, module, is_faulty=False, precision="16-mixed")
    expect(guard.num_clipped > 0, "nothing was clipped")
    expect(all(bool(value.isfinite().all()) for value in module.state_dict().values()), "weights are damaged")
    return f"{guard.num_clipped} of {guard.num_steps} steps clipped"


TRAINER_CHECKS: dict[str, Callable[[torch.device], str]] = {
    "no sync in GradGuard's hooks": healthy_hooks,
    "culprits, with autograd's own threads": culprits,
    "rollback": rollback,
    "fp16 with a fused optimizer in a Trainer": mixed_precision,
}
"""By title."""
