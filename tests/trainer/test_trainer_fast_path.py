"""Plain steps take a fast path, and come to what they come to without it, to the last bit."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from lightning_package import ModelCheckpoint
from torch import nn
from toys import FEATURES, Net, ResumableBatches, fit, make_batches, make_trainer, same, seeded, weights_of

from lightning_gradguard import Explosion, GradGuard
from lightning_gradguard.clippers import AutoClip, ClipNorm, ClipValue
from lightning_gradguard.errors import GradientWarning
from lightning_gradguard.fast_path import FastPath

STEPS = 90


class Fused(Net):
    """A kernel that clips by itself."""

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01, fused=True)


class Normalised(Net):
    """With buffers that a skip puts back."""

    def __init__(self, faults=None):
        super().__init__(faults)
        self.body = nn.Sequential(nn.Linear(FEATURES, 8), nn.BatchNorm1d(8))


class Sparse(Net):
    """One gradient is sparse."""

    def __init__(self, faults=None):
        super().__init__(faults, "sgd")
        self.table = nn.Embedding(4, 1, sparse=True)

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) + self.table(batch[0] % 4).square().sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Frozen(Net):
    """The optimizer has a parameter without a gradient from step 20 on."""

    def on_train_batch_start(self, batch, batch_idx):
        self.body.bias.requires_grad_(batch_idx < 20)


class Grows(Net):
    """A group is added in the middle of training."""

    def on_train_batch_start(self, batch, batch_idx):
        if batch_idx == 40:
            self.extra = nn.Parameter(torch.ones(1))
            self.optimizers().optimizer.add_param_group({"params": [self.extra]})

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss if batch_idx < 40 else loss + self.extra.square().sum()


class Cast(Net):
    """All is in double precision from step 30 on."""

    def training_step(self, batch, batch_idx):
        return super().training_step([it.to(self.head.weight.dtype) for it in batch], batch_idx)

    def on_train_batch_start(self, batch, batch_idx):
        if batch_idx == 30:
            self.double()
            self.optimizers().optimizer.state.clear()


class OtherGradients(Net):
    """Gradients are in bfloat16 from step 30 on, where torch allows that."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05, foreach=False)

    def on_train_batch_start(self, batch, batch_idx):
        if batch_idx == 30:
            self.zero_grad()
            for parameter in self.parameters():
                parameter.grad_dtype = torch.bfloat16


class Shares(Net):
    """Its weights get larger storage, and move to memory that processes share."""

    def on_train_batch_start(self, batch, batch_idx):
        if batch_idx == 30:
            self.head.weight.untyped_storage().resize_(4096)
        elif batch_idx == 40:
            self.share_memory()


class Penalised(Net):
    """Gradients have a graph."""

    def backward(self, loss):
        parameters = list(self.parameters())
        for parameter, grad in zip(parameters, torch.autograd.grad(loss, parameters, create_graph=True), strict=True):
            parameter.grad = grad


class Twice(Net):
    """By hand, two steps a batch."""

    def __init__(self, faults=None):
        super().__init__(faults)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        for _ in range(2):
            self.optimizers().zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            self.optimizers().step()


FAULTS = {25: "nan", 50: "huge", 70: "nan_loss"}
CASES = {
    "adamw": (Net, {"clip": 1.0}, {}),
    "fused": (Fused, {"clip": 0.5}, {}),
    "buffers": (Normalised, {"clip": 1.0}, {}),
    "nothing clips": (Net, {}, {}),
    "another norm": (Net, {"clip": ClipNorm(1.0, norm_type=float("inf"))}, {}),
    "values": (Net, {"clip": ClipValue(0.1)}, {}),
    "learns": (Net, {"clip": AutoClip()}, {}),
    "accumulates": (Net, {"clip": 1.0}, {"accumulate_grad_batches": 2}),
    "bf16": (Net, {"clip": 1.0}, {"precision": "bf16-mixed"}),
    "double": (Net, {"clip": 1.0}, {"precision": "64-true"}),
    "sparse": (Sparse, {"clip": 1.0}, {}),
    "frozen": (Frozen, {"clip": 1.0}, {}),
    "grows": (Grows, {"clip": 1.0}, {}),
    "cast": (Cast, {"clip": 1.0}, {}),
    "other gradients": (OtherGradients, {"clip": 1.0}, {}),
    "shares": (Shares, {"clip": 1.0}, {}),
    "excluded": (Net, {"clip": 1.0, "exclude": ["*bias"]}, {}),
    "penalised": (Penalised, {"clip": 1.0}, {}),
    "twice": (Twice, {"clip": 1.0}, {}),
    "logs": (Net, {"clip": 1.0, "log_every_n_steps": 10, "histogram_every_n_steps": 20}, {}),
}


NEVER = {"another norm", "values", "learns", "accumulates", "double", "sparse", "excluded", "penalised"}
"""Of these no step is plain."""


def train(root, model, settings, trainer_settings):
    """Weights, alerts, the last record and the guard's state after a training with faults."""
    explosion = Explosion("skip", stop_after=None)
    guard = GradGuard(explosion=explosion, max_bundle_mib=None, **{"log_every_n_steps": 50, **settings})
    module = seeded(lambda: model(FAULTS))
    with pytest.warns(GradientWarning):
        fit(root, module, guard, batches=make_batches(STEPS), **trainer_settings)
    last = guard.last
    told = [(alert.step, alert.kind, alert.message) for alert in guard.alerts]
    figures = (last.measurement.global_norm, last.measurement.loss, last.clip_coef, last.explosion_limit, last.totals)
    return weights_of(module), told, last.measurement.norms.tolist(), figures, guard.state_dict()


@pytest.mark.parametrize("case", CASES)
def test_plain_steps_on_the_fast_path_lead_to_the_same_training(case, tmp_path, monkeypatch):
    """Weights, alerts, the last record, baselines and counts."""
    model, settings, trainer_settings = CASES[case]
    with monkeypatch.context() as patch:
        patch.setattr(FastPath, "decide", lambda *_: None)
        expected = train(tmp_path / "long", model, settings, trainer_settings)
    outcomes, decide = [], FastPath.decide
    monkeypatch.setattr(FastPath, "decide", lambda *args: outcomes.append(decide(*args)) or outcomes[-1])

    found = train(tmp_path / "fast", model, settings, trainer_settings)

    assert same(found[:4], expected[:4])
    assert same(found[4], expected[4])
    num_plain = sum(outcome is not None for outcome in outcomes)
    assert num_plain == 0 if case in NEVER else num_plain > 10


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
@pytest.mark.parametrize("saved_at", [24, 31, 46])
def test_training_resumed_while_steps_wait_for_their_judgement_goes_on_as_one_that_ran_through(saved_at, tmp_path):
    """Detectors are told of up to sixteen steps together; a checkpoint in between changes nothing, nor does the resume."""

    def run(ckpt_path=None):
        guard = GradGuard(clip=1.0, explosion=Explosion("skip", stop_after=None), max_replays=0, log_every_n_steps=50)
        module = seeded(lambda: Net({40: "huge"}))
        checkpoint = ModelCheckpoint(dirpath=tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=saved_at)
        trainer = make_trainer(tmp_path, guard, checkpoint, enable_checkpointing=True, max_epochs=1)
        with pytest.warns(GradientWarning) if saved_at < 40 or ckpt_path is None else nullcontext():
            trainer.fit(module, ResumableBatches(make_batches(60).batches), ckpt_path=ckpt_path)
        return weights_of(module), guard.state_dict()

    through = run()
    resumed = run(tmp_path / f"step={saved_at}.ckpt")

    assert same(resumed, through)
    assert resumed[1]["guards"][0]["totals"]["num_skipped"] == 1
