"""The culprit in the ways that a Trainer trains: accumulation, by hand, fp16, what a module keeps; and limits."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
import zoo
from lightning.pytorch import Trainer
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.nn import functional as F
from torch.nn.modules import module as hooks
from torch.utils.data import DataLoader

from lightning_gradguard import GradGuard, GradientError, GradientWarning, GuardWarning

QUIET = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False, "logger": False}
NAN = float("nan")


def batches(number=6, bad=(), rows=(3,)):
    """Regression batches; samples `rows` of those in `bad` are zero."""
    made = []
    for index in range(number):
        x = torch.randn(zoo.BATCH, zoo.WIDTH, generator=torch.Generator().manual_seed(index))
        if index in bad:
            x[list(rows)] = 0.0
        made.append((x, torch.ones(zoo.BATCH, 1)))
    return DataLoader(made, batch_size=None)


def fit(module, guard, data=None, **settings):
    """Train for an epoch, warnings silent."""
    trainer = Trainer(max_epochs=1, accelerator="cpu", devices=1, callbacks=[guard], **{**QUIET, **settings})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, batches(bad={2}) if data is None else data)
    return guard


class Cosine(nn.Module):
    """Fails for a sample of zeros."""

    def forward(self, x):
        return x / x.norm(dim=1, keepdim=True)


class Fails(zoo.Zoo):
    def build(self):
        self.unit, self.net = Cosine(), nn.Sequential(nn.Linear(zoo.WIDTH, 4), nn.Dropout(0.5), nn.Linear(4, 1))

    def predict(self, x):
        return self.net(self.unit(x))


def check(culprit):
    """The division in `Cosine`."""
    assert (culprit.phase, culprit.module, culprit.op, culprit.samples) == ("forward", "unit", "div", (3,))
    assert culprit.source == "return x / x.norm(dim=1, keepdim=True)"
    assert culprit.reproduced
    assert "0 by 0" in culprit.message


def test_culprit_is_in_message_jsonl_and_error(tmp_path):
    """Everywhere that people look."""
    guard = GradGuard(nonfinite="raise")
    with pytest.raises(
        GradientError, match=r"culprit: `div` in `unit`, test_investigation.py:\d+, divided 0 by 0 at \[3, 0\] in row 3"
    ):
        fit(Fails(), guard, logger=None, default_root_dir=tmp_path)
    (line,) = next(tmp_path.rglob("alerts.jsonl")).read_text().splitlines()
    written = json.loads(line)["culprit"]
    assert written["module"] == "unit"
    assert written["samples"] == [3]
    assert any("float32 [8, 6]" in text for text in written["inputs"])
    assert guard.alerts[0].remedy.startswith("Keep the divisor away from 0")


def test_culprit_in_a_warning():
    """The console shows it."""
    trainer = Trainer(max_epochs=1, accelerator="cpu", callbacks=[GradGuard()], **QUIET)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(Fails(), batches(bad={2}))
    texts = [str(entry.message) for entry in caught if issubclass(entry.category, GradientWarning)]
    assert any("culprit: `div` in `unit`" in text for text in texts)


def test_culprit_of_one_of_several_micro_batches():
    """The rows are those of the damaged one."""
    guard = fit(Fails(), GradGuard(), accumulate_grad_batches=3)
    assert guard.alerts[0].micro_batch == 2
    check(guard.alerts[0].culprit)


def test_culprit_under_lbfgs():
    """In the first evaluation of a step."""

    class Closure(Fails):
        configure_optimizers = zoo.WithLbfgs.configure_optimizers

    check(fit(Closure(), GradGuard()).alerts[0].culprit)


def test_culprit_under_manual_accumulation():
    """The step comes batches later."""

    class Both(zoo.ManualAccumulation):
        predict = Fails.predict

        def build(self):
            Fails.build(self)
            self.automatic_optimization = False

    check(fit(Both(), GradGuard(), batches(bad={1})).alerts[0].culprit)


class FailingGan(zoo.Gan):
    def build(self):
        super().build()
        self.unit = Cosine()

    def training_step(self, batch, batch_idx):
        super().training_step((self.unit(batch[0]), batch[1]), batch_idx)


def test_culprit_of_the_second_of_two_manual_optimizers():
    """The first steps in order, before it in the same batch."""
    guard = fit(FailingGan(), GradGuard())
    alert = guard.alerts[0]
    assert alert.optimizer == 1
    check(alert.culprit)
    assert alert.culprit is not None


def test_culprit_under_a_grad_scaler():
    """Gradients are compared in their true size."""
    plugin = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=16.0))
    check(fit(Fails(), GradGuard(overflow=None), plugins=[plugin]).alerts[0].culprit)


def test_culprit_under_bf16():
    """Autocast is on in the replay too."""
    check(fit(Fails(), GradGuard(), precision="bf16-mixed").alerts[0].culprit)


def test_culprit_in_a_compiled_module():
    """The eager one is replayed; the compiled one is used on."""
    module = Fails()
    module.unit = torch.compile(module.unit, backend="eager")
    culprit = fit(module, GradGuard()).alerts[0].culprit
    assert (culprit.module, culprit.op, culprit.samples) == ("unit", "div", (3,))


class Poisoned(zoo.Carried):
    """The failing step leaves NaN in the hidden state that it is replayed from."""

    def build(self):
        super().build()
        self.unit = Cosine()

    def predict(self, x):
        return super().predict(self.unit(x))


def test_culprit_is_not_the_state_that_the_step_itself_has_poisoned():
    """Carried hidden state is made finite, and the step replayed once more."""
    check(fit(Poisoned(), GradGuard()).alerts[0].culprit)


def test_culprit_is_a_plain_tensor_that_was_damaged_before():
    """If nothing else fails, it is what the module keeps."""

    class Keeps(zoo.Zoo):
        def build(self):
            super().build()
            self.offset = torch.tensor(NAN)

        def predict(self, x):
            return self.net(x) + self.offset

    culprit = fit(Keeps(), GradGuard()).alerts[0].culprit
    assert (culprit.phase, culprit.module, culprit.samples) == ("weights", "offset", None)


def test_culprit_after_batch_norm_is_the_data():
    """Running statistics that the step has damaged are put back first."""

    class Normed(zoo.ConvNet):
        pass

    data = batches()
    data.dataset[2][0][5, 1] = NAN
    guard = fit(Normed(), GradGuard(), data)
    assert len(guard.alerts) == 1
    culprit = guard.alerts[0].culprit
    assert (culprit.phase, culprit.module, culprit.samples) == ("data", "batch[0]", (5,))
    assert culprit.reproduced


def test_max_replays_is_kept_over_a_run():
    """Later alerts have no culprit."""
    guard = fit(Fails(), GradGuard(max_replays=2), batches(bad={1, 3, 5}))
    assert [alert.culprit is not None for alert in guard.alerts] == [True, True, False]
    assert [alert.culprit for alert in fit(Fails(), GradGuard(max_replays=0)).alerts] == [None]


@pytest.mark.parametrize("value", [-1, 1.5, True])
def test_max_replays_of_a_wrong_value_is_refused(value):
    """With its name."""
    with pytest.raises(ValueError, match="`max_replays`"):
        GradGuard(max_replays=value)


def test_replay_that_fails_is_a_warning_and_leaves_no_trace():
    """The alert comes without a culprit, and training goes on."""
    used = set()

    class Once(Fails):
        def training_step(self, batch, batch_idx):
            if batch_idx in used:
                self.left = "a trace"
                self.net[0].weight.requires_grad_(False)
                raise RuntimeError("used up")
            used.add(batch_idx)
            return super().training_step(batch, batch_idx)

    guard, module = GradGuard(), Once()
    trainer = Trainer(max_epochs=1, accelerator="cpu", callbacks=[guard], **QUIET)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module, batches(bad={2}))
    (said,) = [str(entry.message) for entry in caught if issubclass(entry.category, GuardWarning)]
    assert "RuntimeError: used up" in said
    assert guard.alerts[0].culprit is None
    assert (guard.num_steps, guard.num_skipped) == (6, 1)
    assert not hasattr(module, "left")
    assert module.net[0].weight.requires_grad
    assert not hooks._global_forward_hooks


def test_failure_that_does_not_come_again_has_no_culprit():
    """A transient fault: the replay is healthy."""
    seen = set()

    class Transient(zoo.Zoo):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            first = batch_idx not in seen
            seen.add(batch_idx)
            return loss * NAN if first and batch_idx == 2 else loss

    guard = fit(Transient(), GradGuard())
    assert [alert.culprit for alert in guard.alerts] == [None]


def test_healthy_run_never_has_a_hook():
    """Neither global nor on a module."""
    seen = []

    class Looks(zoo.Zoo):
        def training_step(self, batch, batch_idx):
            seen.append(len(hooks._global_forward_hooks) + len(hooks._global_forward_pre_hooks))
            seen.extend(len(part._forward_hooks) + len(part._backward_hooks) for part in self.modules())
            return super().training_step(batch, batch_idx)

    fit(Looks(), GradGuard(), batches())
    assert set(seen) == {0}


def test_batches_are_let_go_after_their_step():
    """The window holds references no longer than it needs."""
    held = []

    class Looks(GradGuard):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
            held.append(len(self._fit._incidents._window._entries))

    fit(zoo.Zoo(), Looks(), batches(), accumulate_grad_batches=3)
    assert held == [1, 2, 0, 1, 2, 0]


def test_dictionary_loss_and_step_without_batch_index():
    """Whatever a `training_step` may look like."""

    class Other(Fails):
        def training_step(self, batch):
            return {"loss": F.mse_loss(self.predict(batch[0]), batch[1]), "more": 1}

    check(fit(Other(), GradGuard()).alerts[0].culprit)
