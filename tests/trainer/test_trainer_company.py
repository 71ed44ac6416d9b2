"""The guard among Lightning's other features."""

from __future__ import annotations

import csv

import pytest
import torch
from lightning_package import (
    BaseFinetuning,
    Callback,
    CSVLogger,
    GradientAccumulationScheduler,
    LearningRateMonitor,
    OnExceptionCheckpoint,
)
from toys import Net, Snapshots, ValidatedNet, fit, make_batches, make_trainer, same, seeded, weights_of

from lightning_gradguard import GradGuard, GradientError, GradientWarning


class Unfreeze(BaseFinetuning):
    """Train the head for an epoch, then the body as well, in a group of its own."""

    def freeze_before_training(self, pl_module):
        self.freeze(pl_module.body)

    def finetune_function(self, pl_module, epoch, optimizer):
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.body, optimizer, lr=0.01)


class HeadFirst(Net):
    """Gives its optimizer what is trainable at the start."""

    def configure_optimizers(self):
        return torch.optim.Adam([parameter for parameter in self.parameters() if parameter.requires_grad], lr=0.01)


class PoisonGradients(Callback):
    """Another callback that changes gradients just before the step."""

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if trainer.global_step == 5:
            pl_module.head.weight.grad.fill_(torch.nan)


@pytest.mark.smoke
def test_finetuning_callback_parameters_that_join_later_are_watched(tmp_path):
    """Two parameters in the first epoch, four in the second."""
    seen = []
    guard = GradGuard(sinks=[lambda record: seen.append(record.measurement.names)])
    fit(tmp_path, HeadFirst(), Unfreeze(), guard, max_epochs=2)
    assert set(seen[:12]) == {("head.weight", "head.bias")}
    assert set(seen[12:]) == {("body.weight", "body.bias", "head.weight", "head.bias")}
    assert guard.alerts == []


def test_finetuning_callback_later_parameters_are_skipped_too(tmp_path):
    """A bad step after the body has joined leaves the body as it was."""

    class Later(HeadFirst):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss * torch.nan if self.current_epoch == 1 and batch_idx == 5 else loss

    snapshots = Snapshots()
    with pytest.warns(GradientWarning, match="Nonfinite at step 17 "):
        fit(tmp_path, Later(), Unfreeze(), GradGuard(), snapshots, max_epochs=2)
    assert same(snapshots.weights[17], snapshots.weights[16])


def test_accumulation_scheduler_windows_of_changing_size_are_followed(tmp_path):
    """Single batches in the first epoch, windows of three in the second."""
    seen = []
    guard = GradGuard(sinks=[lambda record: seen.append(record.measurement.num_micro_batches)])
    fit(tmp_path, Net(), GradientAccumulationScheduler({0: 1, 1: 3}), guard, max_epochs=2)
    assert seen == [1] * 12 + [3] * 4


@pytest.mark.parametrize("guard_first", [True, False])
def test_other_callback_that_spoils_gradients_is_seen_wherever_the_guard_stands(guard_first, tmp_path):
    """The guard looks last, whatever the order in the list."""
    guard, snapshots = GradGuard(), Snapshots()
    callbacks = [guard, PoisonGradients()] if guard_first else [PoisonGradients(), guard]
    with pytest.warns(GradientWarning, match="Nonfinite at step 5 .*`head.weight`"):
        fit(tmp_path, Net(), *callbacks, snapshots)
    assert same(snapshots.weights[5], snapshots.weights[4])


def test_guard_from_configure_callbacks_works(tmp_path):
    """A module may bring its guard along."""
    guard = GradGuard()

    class Guarded(Net):
        def configure_callbacks(self):
            return [guard]

    with pytest.warns(GradientWarning, match="Nonfinite"):
        fit(tmp_path, Guarded({5: "nan"}))
    assert (guard.num_steps, guard.num_skipped) == (12, 1)


def test_validate_before_fit_leaves_the_guard_untouched(tmp_path):
    """`trainer.validate` has no gradients to look at."""
    guard, module = GradGuard(), ValidatedNet()
    trainer = make_trainer(tmp_path, guard)
    trainer.validate(module, make_batches(2), verbose=False)
    assert guard.num_steps == 0
    trainer.fit(module, make_batches(12), make_batches(2))
    assert guard.num_steps == 12


def test_validation_inside_an_epoch_changes_no_decision(tmp_path):
    """Four validations an epoch; the guard sees training steps only."""
    guard = GradGuard()
    trainer = make_trainer(tmp_path, guard, val_check_interval=3)
    trainer.fit(ValidatedNet(), make_batches(12), make_batches(2))
    assert (guard.num_steps, guard.alerts) == (12, [])


# Lightning, saving on an exception, warns of a resume that nobody has asked for.
@pytest.mark.filterwarnings("ignore:`?.fit.ckpt_path=")
def test_checkpoint_on_exception_holds_the_weights_from_before(tmp_path):
    """`raise` with OnExceptionCheckpoint: what is saved was never spoiled."""
    snapshots = Snapshots()
    callbacks = [GradGuard(nonfinite="raise"), snapshots, OnExceptionCheckpoint(tmp_path)]
    with pytest.raises(GradientError), pytest.warns(GradientWarning, match="Nonfinite"):
        fit(tmp_path, Net({5: "nan"}), *callbacks, enable_checkpointing=True)
    saved = torch.load(tmp_path / "on_exception.ckpt", weights_only=True)
    assert same(saved["state_dict"], snapshots.weights[4])


def test_learning_rate_monitor_and_guard_share_the_x_axis(tmp_path):
    """Lightning's own monitors log at the same steps."""

    class Scheduled(Net):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            return [optimizer], [{"scheduler": torch.optim.lr_scheduler.ConstantLR(optimizer), "interval": "step"}]

    logger = CSVLogger(tmp_path, flush_logs_every_n_steps=1)
    callbacks = [LearningRateMonitor("step"), GradGuard()]
    fit(tmp_path, Scheduled(), *callbacks, logger=logger, log_every_n_steps=4, accumulate_grad_batches=2)
    metrics = (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text().splitlines()
    rows = list(csv.DictReader(metrics))
    ours, theirs = ({row["step"] for row in rows if row[tag]} for tag in ("gradguard/global_norm", "lr-AdamW"))
    assert ours == theirs == {"3"}


def test_tied_parameters_are_counted_once(tmp_path):
    """One tensor under two names: one entry, and the norm that torch's own clipping would see."""

    class Tied(Net):
        def __init__(self) -> None:
            super().__init__()
            self.again = self.head

    guard, tied, plain = GradGuard(clip=0.5), seeded(Tied), seeded(Tied)
    fit(tmp_path, tied, guard)
    fit(tmp_path, plain, gradient_clip_val=0.5)
    assert guard.last.measurement.names == ("body.weight", "body.bias", "head.weight", "head.bias")
    assert same(weights_of(tied), weights_of(plain))


def test_sparse_embedding_is_measured_clipped_and_skipped(tmp_path):
    """SparseAdam on an embedding with sparse gradients; torch's own clipping raises there."""

    class Sparse(Net):
        def __init__(self, faults=None) -> None:
            super().__init__(faults)
            self.automatic_optimization = True
            self.table = torch.nn.Embedding(12, 4, sparse=True)
            self.body, self.head = torch.nn.Identity(), torch.nn.Identity()

        def training_step(self, batch, batch_idx):
            number, _, _ = batch
            loss = self.table(number.reshape(1)).square().sum()
            return loss * torch.nan if int(number) in self.faults else loss

        def configure_optimizers(self):
            return torch.optim.SparseAdam(self.parameters(), lr=0.1)

    guard, snapshots = GradGuard(clip=0.1, histogram_every_n_steps=2), Snapshots()
    with pytest.warns(GradientWarning, match="Nonfinite at step 5 .*`table.weight` has 4 NaN"):
        fit(tmp_path, Sparse({5: "nan"}), guard, snapshots)
    assert guard.num_clipped == 11
    assert same(snapshots.weights[5], snapshots.weights[4])


class Joins(Callback):
    """Brings another callback into a fit that is running already."""

    def __init__(self, other):
        self.other = other

    def on_train_start(self, trainer, pl_module):
        trainer.callbacks.append(self.other)


def test_guard_that_joins_a_running_fit_takes_no_part(tmp_path):
    """Lightning sets up only callbacks that are there when a fit begins."""
    guard = GradGuard(clip=0.1)
    trainer = fit(tmp_path, Net(), Joins(guard))
    assert trainer.global_step == 12
    assert (guard.num_steps, guard.alerts, guard.last) == (0, [], None)
