"""A run in which every step is replayed ends as one in which none is, to the last bit."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
import zoo
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from torch.nn.modules import module as hooks
from torch.utils.data import DataLoader, TensorDataset

from lightning_gradguard import GradGuard
from lightning_gradguard.trainer.replay.investigation import _Search
from lightning_gradguard.trainer.replay.replay import compare

NUM_BATCHES = 9


class Replays(GradGuard):
    """Replays every step, healthy as it is, before it is judged."""

    def __init__(self) -> None:
        super().__init__()
        self.outcomes = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        replay = self._fit.guards[0]._investigate._replay
        search = _Search(pl_module)
        with torch.no_grad():
            replayed = replay.run(optimizer, observe=search.observe)
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            self.outcomes.append(compare(replayed, parameters))
        assert search.blame is None
        super().on_before_optimizer_step(trainer, pl_module, optimizer)


def batches():
    """A regression."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(NUM_BATCHES * zoo.BATCH, zoo.WIDTH, generator=generator)
    return DataLoader(TensorDataset(x, x.sum(1, keepdim=True).tanh()), batch_size=zoo.BATCH)


def train(make, guard, folder, **settings):
    """Train; everything that a replay might have changed."""
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - what user code may use
    module = make()
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    logger = CSVLogger(folder, name=type(guard).__name__)
    trainer = Trainer(
        max_epochs=2, accelerator="cpu", callbacks=[guard], logger=logger, log_every_n_steps=1, **quiet, **settings
    )
    trainer.fit(module, batches())
    plain = {name: value for name, value in vars(module).items() if isinstance(value, (int, list, dict, torch.Tensor))}
    plain = {name: value for name, value in plain.items() if not name.startswith("_")}
    return {
        "weights": {name: value.clone() for name, value in module.state_dict().items()},
        "optimizers": [optimizer.state_dict() for optimizer in trainer.optimizers],
        "rates": [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
        "flags": {name: parameter.requires_grad for name, parameter in module.named_parameters()},
        "plain": plain,
        "inner": [(vars(part).get("total"), vars(part).get("values")) for part in module.modules()],
        "random": (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()),  # noqa: NPY002
        "step": trainer.global_step,
        "metrics": {name: value.clone() for name, value in trainer.logged_metrics.items()},
        "hooks": len(hooks._global_forward_hooks) + len(hooks._global_forward_pre_hooks),
        "scale": getattr(getattr(trainer.precision_plugin, "scaler", None), "get_scale", lambda: None)(),
    }


def same(left, right):
    """Nested structures, tensors bit for bit."""
    if isinstance(left, torch.Tensor):
        return left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(value, right[key]) for key, value in left.items())
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(same(a, b) for a, b in zip(left, right, strict=True))
    return bool(left == right)


TORTURE = {
    "conv": (zoo.ConvNet, {}),
    "accumulation": (zoo.ConvNet, {"accumulate_grad_batches": 4}),
    "bf16": (zoo.Zoo, {"precision": "bf16-mixed"}),
    "dice": (zoo.Dice, {}),
    "spectral": (zoo.Spectral, {}),
    "carried": (zoo.Carried, {}),
    "gan": (zoo.Gan, {}),
    "lbfgs": (zoo.WithLbfgs, {}),
    "in-place": (zoo.InPlace, {}),
    "checkpoint": (zoo.Checkpointed, {}),
    "manual accumulation": (zoo.ManualAccumulation, {}),
    "fp16": (zoo.Zoo, {"precision": None}),
}
NOT_REPRODUCED = {"carried", "dice", "in-place"}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", TORTURE)
def test_replaying_every_step_leaves_no_trace(name, tmp_path):
    """And gives the same gradients, wherever forward depends on nothing that it changed itself."""
    make, settings = TORTURE[name]

    def fresh():
        if settings.get("precision", "") is not None:
            return settings
        return {"plugins": [MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=256.0))]}

    guard = Replays()
    replayed = train(make, guard, tmp_path, **fresh())
    plain = train(make, GradGuard(max_replays=0), tmp_path, **fresh())
    for key, value in plain.items():
        assert same(value, replayed[key]), key
    assert len(guard.outcomes) >= NUM_BATCHES / 2
    exact = [reproduced for reproduced, _ in guard.outcomes]
    if name in NOT_REPRODUCED:
        assert not all(exact)
    else:
        assert all(exact), guard.outcomes
    logs = [(tmp_path / kind / "version_0" / "metrics.csv").read_text() for kind in ("Replays", "GradGuard")]
    assert logs[0] == logs[1]
