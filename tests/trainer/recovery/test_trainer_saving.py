"""Checkpoints of damaged weights are refused, and what was saved before stays and can be resumed."""

from __future__ import annotations

import functools
import inspect

import pytest
import torch
from lightning_package import Callback, ModelCheckpoint, Trainer
from toys import Net, ResumableBatches, fit, make_batches, make_trainer, same, weights_of

from lightning_gradguard import GradGuard

pytestmark = pytest.mark.filterwarnings("ignore::lightning_gradguard.GradientWarning")
QUIET = {"enable_progress_bar": False, "enable_model_summary": False}
BLIND = {"nonfinite": None, "vanishing": None}


def is_finite(path) -> bool:
    """Whether what a file holds is."""
    saved = torch.load(path, weights_only=True)
    states = [value for state in saved["optimizer_states"] for entry in state["state"].values() for value in entry.values()]
    return all(bool(tensor.isfinite().all()) for tensor in [*saved["state_dict"].values(), *states])


@pytest.mark.smoke
@pytest.mark.parametrize("top_k", [1, -1])
def test_checkpoint_of_damaged_weights_is_refused_and_the_last_good_one_stays(top_k, tmp_path):
    """A guard that lets a NaN through; the callback's own counts stay at the good file too."""
    checkpoint = ModelCheckpoint(tmp_path, every_n_train_steps=2, save_top_k=top_k, save_last=True, filename="{step}")
    guard = GradGuard(**BLIND)
    fit(tmp_path, Net({5: "nan"}), guard, checkpoint)
    assert checkpoint.best_model_path == str(tmp_path / "step=4.ckpt")
    assert checkpoint.last_model_path == str(tmp_path / "last.ckpt")
    assert all(is_finite(path) for path in tmp_path.glob("*.ckpt"))
    assert len(list(tmp_path.glob("*.ckpt"))) == (2 if top_k == 1 else 3)
    assert [(alert.kind, alert.action, alert.step) for alert in guard.alerts] == [("checkpoint", "skip", 5)]
    assert "step=6.ckpt is not saved: `body.weight`, `body.bias`, `head.weight` and 9 more" in guard.alerts[0].message


def test_checkpoint_that_follows_a_metric_is_refused_as_well(tmp_path):
    """The best by then would be deleted for it."""
    checkpoint = ModelCheckpoint(
        tmp_path, monitor="number", mode="max", save_top_k=2, every_n_train_steps=1, filename="{step}"
    )

    class Numbered(Net):
        def training_step(self, batch, batch_idx):
            self.log("number", batch[0].float())
            return super().training_step(batch, batch_idx)

    fit(tmp_path, Numbered({5: "nan"}), GradGuard(**BLIND), checkpoint)
    assert sorted(path.name for path in tmp_path.glob("*.ckpt")) == ["step=4.ckpt", "step=5.ckpt"]
    assert checkpoint.best_model_path == str(tmp_path / "step=5.ckpt")
    assert float(checkpoint.best_model_score) == 4.0


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_run_resumes_from_what_is_on_disk_after_a_refusal(tmp_path):
    """As if the fault had been a crash."""
    checkpoint = ModelCheckpoint(tmp_path, every_n_train_steps=2, filename="{step}")
    fit(tmp_path, Net({5: "nan"}), GradGuard(**BLIND), checkpoint, batches=ResumableBatches(make_batches(12).batches))
    net = Net()
    trainer = make_trainer(tmp_path, GradGuard(**BLIND), checkpoint, max_epochs=2)
    trainer.fit(net, ResumableBatches(make_batches(12).batches), ckpt_path=checkpoint.best_model_path)
    assert trainer.current_epoch == 2
    assert all(bool(tensor.isfinite().all()) for tensor in net.state_dict().values())


def test_checkpoint_by_hand_is_refused_without_an_error(tmp_path):
    """As code of the user's own does it; a checkpoint of weights only does not mind the optimizer's state."""

    class Saves(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 3:
                state = next(iter(trainer.optimizers[0].state.values()))
                state["exp_avg"].fill_(torch.inf)
                state["calls"] = 3  # no tensor
                trainer.save_checkpoint(tmp_path / "all.ckpt")
                trainer.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)

    guard = GradGuard(**BLIND)
    fit(tmp_path, Net(), Saves(), guard)
    assert [path.name for path in tmp_path.glob("*.ckpt")] == ["weights.ckpt"]
    assert "`optimizer 0: exp_avg of parameter 0`" in guard.alerts[0].message


def test_save_checkpoint_of_the_users_own_is_called_and_its_answer_comes_back(tmp_path):
    """Of an older signature, wrapped on the Trainer, and there afterwards."""
    calls, answers = [], []

    class Older(Trainer):
        def save_checkpoint(self, filepath, weights_only=False, storage_options=None):  # noqa: FBT002 - as it was
            calls.append(str(filepath))
            return super().save_checkpoint(filepath, weights_only, storage_options) or "saved"

    def tagged(save, tag, *args, **kwargs):
        return tag, save(*args, **kwargs)

    class Saves(Callback):
        def on_train_end(self, trainer, pl_module):
            answers.append(trainer.save_checkpoint(tmp_path / "end.ckpt"))

    checkpoint = ModelCheckpoint(tmp_path, every_n_train_steps=2, save_top_k=-1, filename="{step}")
    trainer = Older(accelerator="cpu", max_epochs=1, logger=False, callbacks=[Saves(), GradGuard(), checkpoint], **QUIET)
    trainer.save_checkpoint = wrapper = functools.partial(tagged, trainer.save_checkpoint, "tag")
    trainer.fit(Net(), make_batches(4))
    assert trainer.save_checkpoint is wrapper
    assert answers == [("tag", "saved")]
    assert calls == [str(tmp_path / f"{name}.ckpt") for name in ("step=2", "step=4", "end")]


@pytest.mark.skipif(
    "save_on_exception" not in inspect.signature(ModelCheckpoint).parameters, reason="Lightning has it from 2.5.3 on"
)
def test_checkpoint_on_an_exception_is_refused_too(tmp_path):
    """It is where a run that has fallen apart often ends."""

    class Dies(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 6:
                raise InterruptedError

    checkpoint = ModelCheckpoint(tmp_path, every_n_train_steps=4, save_on_exception=True, filename="{step}")
    with pytest.raises(InterruptedError):
        fit(tmp_path, Net({5: "nan"}), Dies(), GradGuard(**BLIND), checkpoint)
    assert [path.name for path in tmp_path.glob("*.ckpt")] == ["step=4.ckpt"]


def test_checkpoint_of_a_model_that_has_infinities_by_design_is_saved(tmp_path):
    """A mask in a buffer, a parameter that was not finite to begin with."""
    net = Net()
    net.register_buffer("mask", torch.tensor([0.0, -torch.inf]))
    net.register_parameter("frozen", torch.nn.Parameter(torch.tensor([torch.inf]), requires_grad=False))
    checkpoint = ModelCheckpoint(tmp_path, filename="kept")
    guard = GradGuard()
    fit(tmp_path, net, guard, checkpoint)
    assert (tmp_path / "kept.ckpt").exists()
    assert guard.alerts == []


def test_checkpoints_of_a_healthy_run_are_those_without_a_guard(tmp_path):
    """And when it is over nothing is left on the Trainer and on the callback."""
    states = []
    for folder, callbacks in (("with", [GradGuard()]), ("without", [])):
        torch.manual_seed(0)
        checkpoint = ModelCheckpoint(tmp_path / folder, every_n_train_steps=5, save_top_k=-1, save_last=True)
        net = Net()
        trainer = fit(tmp_path, net, *callbacks, checkpoint)
        assert "save_checkpoint" not in vars(trainer)
        assert not [name for name in vars(checkpoint) if name.startswith("on_")]
        names = sorted(path.name for path in (tmp_path / folder).iterdir())
        states.append((names, torch.load(tmp_path / folder / "last.ckpt", weights_only=True)["state_dict"]))
    assert same(*states)
    assert same(states[0][1], states[1][1])
    assert weights_of(net)


def test_checkpoint_of_a_run_without_optimizers_is_refused_without_an_alert(tmp_path):
    """As of statistics that are gathered; there is no guard that could tell."""

    class Gathers(Net):
        def configure_optimizers(self):
            return None

    class Damages(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            pl_module.body.weight.data[0, 0] = torch.nan

    guard = GradGuard()
    with pytest.warns(UserWarning, match="configure_optimizers"):
        fit(tmp_path, Gathers(), Damages(), guard, ModelCheckpoint(tmp_path, filename="kept"))
    assert not (tmp_path / "kept.ckpt").exists()
    assert (guard.num_steps, guard.alerts) == (0, [])


@pytest.mark.parametrize("hook", ["on_train_batch_end", "on_exception"])
def test_error_of_a_checkpoint_callback_passes_through_and_nothing_is_left_on_it(hook, tmp_path):
    """As of a full disk; also while it is told of an exception."""

    class Fails(ModelCheckpoint):
        pass

    def fails(self, *args, **kwargs):
        raise OSError("disk full")

    class Dies(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            raise InterruptedError

    setattr(Fails, hook, fails)
    checkpoint = Fails(tmp_path)
    with pytest.raises(OSError, match="disk full"):
        fit(tmp_path, Net(), Dies() if hook == "on_exception" else Callback(), GradGuard(), checkpoint)
    assert not [name for name in vars(checkpoint) if name.startswith("on_")]
