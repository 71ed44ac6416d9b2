"""The action "rollback" in a Trainer: what goes back, what does not, and that a replay is the first pass bit for bit."""

from __future__ import annotations

import copy
import math
import resource
import shutil

import lightning_package
import pytest
import torch
from lightning_package import Callback, Checkpoint, LightningModule, MixedPrecision
from torch import nn
from torchmetrics import MeanMetric
from toys import Batches, Net, ResumableBatches, fit, make_batches, make_trainer, same, weights_of

from lightning_gradguard import Detector, GradGuard, GradientWarning, GuardWarning, Rollback, Verdict
from lightning_gradguard.trainer.conflicts import ConflictError
from lightning_gradguard.trainer.recovery.run_state import RunState

pytestmark = pytest.mark.filterwarnings("ignore::lightning_gradguard.GradientWarning")


class After(Checkpoint):
    """Copies of what the guard leaves after each batch; checkpoints come after the guard."""

    def __init__(self) -> None:
        self.weights, self.optimizers, self.batches, self.rates, self.steps = [], [], [], [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.weights.append(weights_of(pl_module))
        self.optimizers.append(copy.deepcopy([optimizer.state_dict()["state"] for optimizer in trainer.optimizers]))
        self.batches.append(int(batch[0]))
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])
        self.steps.append(trainer.global_step)


def rolling(*, looks_into: bool = True, **settings) -> GradGuard:
    """A guard that goes back at a NaN; it looks into the bad step, unless the test's own trick keeps it from that."""
    rollback = Rollback(**{"every_n_steps": 4, "confirm_steps": 2, "skip_batches": 0, **settings})
    forensics = {} if looks_into else {"max_replays": 0, "max_bundle_mib": None}
    return GradGuard(nonfinite="rollback", rollback=rollback, **forensics)


@pytest.mark.smoke
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_rollback_brings_weights_and_optimizer_state_back_bit_for_bit(optimizer, tmp_path):
    """A NaN at batch 10 leads back to the snapshot after batch 7, which two healthy steps have confirmed."""
    guard, after = rolling(), After()
    fit(tmp_path, Net({10: "nan"}, optimizer), guard, after)
    assert same(after.weights[10], after.weights[7])
    assert same(after.optimizers[10], after.optimizers[7])
    assert not same(after.weights[9], after.weights[7])
    assert [(alert.kind, alert.action, alert.step) for alert in guard.alerts] == [
        ("nonfinite", "rollback", 10),
        ("rollback", "rollback", 10),
    ]


@pytest.mark.parametrize(("bad", "expected"), [(9, 3), (3, None), (1, None)])
def test_rollback_passes_over_snapshots_that_are_not_confirmed(bad, expected, tmp_path):
    """One step before that it is the snapshot before; before the first, what training began with."""
    net, guard, after = Net({bad: "nan"}), rolling(), After()
    start = weights_of(net)
    fit(tmp_path, net, guard, after)
    assert same(after.weights[bad], start if expected is None else after.weights[expected])
    if expected is None:
        assert after.optimizers[bad] == [{}]
    assert same(after.optimizers[-1][0].keys(), {0, 1, 2, 3}) or set(after.optimizers[-1][0]) == {0, 1, 2, 3}


def test_rollback_passes_batches_over_and_the_clock_goes_on(tmp_path):
    """`global_step` counts steps, skipped ones too, and not the batches passed over; `batch_idx` counts those."""
    guard, after = rolling(skip_batches=3), After()
    seen = []

    class Watch(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            seen.append((int(batch[0]), batch_idx))

    trainer = fit(tmp_path, Net({10: "nan"}), guard, Watch(), after, batches=make_batches(20))
    assert seen == [(number, number) for number in [*range(11), *range(14, 20)]]
    assert after.steps == list(range(1, 18))
    assert trainer.global_step == guard.num_steps == 17
    assert guard.num_skipped == 1


def test_rollback_near_the_end_of_an_epoch_passes_over_no_more_than_is_left(tmp_path):
    """The epoch ends in order: its scheduler steps once, validation runs, the next epoch has all batches."""

    class Scheduled(Net):
        num_validated = 0

        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
            return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)]

        def validation_step(self, batch, batch_idx):
            self.num_validated += 1

    guard, after = rolling(skip_batches=5), After()
    net = Scheduled({10: "nan"})
    trainer = make_trainer(tmp_path, guard, after, max_epochs=2, num_sanity_val_steps=0)
    trainer.fit(net, make_batches(12), make_batches(1))
    assert after.batches == [*range(11), *range(11)]
    assert net.num_validated == 2
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.25
    assert trainer.current_epoch == 2


def test_rollback_with_an_iterator_of_unknown_length_ends_the_epoch(tmp_path):
    """Nobody knows before the last batch that it is the last."""

    class Endless:
        def __iter__(self):
            return iter(make_batches(12))

    after = After()
    fit(tmp_path, Net({9: "nan"}), rolling(skip_batches=9), after, batches=Endless(), max_epochs=2)
    assert after.batches == [*range(10), *range(10)]


def test_rollback_stops_before_a_batch_after_which_validation_is_due(tmp_path):
    """The validation in the middle of the epoch is not lost."""
    validated = []

    class Validated(Net):
        def validation_step(self, batch, batch_idx):
            validated.append(self.trainer.fit_loop.epoch_loop.batch_idx)

    trainer = make_trainer(tmp_path, rolling(skip_batches=5), num_sanity_val_steps=0, val_check_interval=4)
    trainer.fit(Validated({9: "nan"}), make_batches(16), make_batches(1))
    assert validated == [3, 7, 11, 15]


def test_rollback_leaves_schedulers_and_rates_to_the_clock(tmp_path):
    """At every step the learning rate is that of a run without a fault."""

    class Scheduled(Net):
        def configure_optimizers(self):
            optimizer = torch.optim.AdamW(self.parameters(), lr=0.1)
            scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=20)
            return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    rates = []
    for faults in ({}, {10: "nan"}):
        after = After()
        fit(tmp_path, Scheduled(faults), rolling(), after, batches=make_batches(16))
        rates.append(after.rates)
    assert rates[0] == rates[1]


def test_rollback_in_an_accumulation_window_goes_back_at_its_end(tmp_path):
    """The window's gradients are gone, and whole windows are passed over."""
    guard, after = rolling(every_n_steps=2, confirm_steps=1, skip_batches=1), After()
    fit(tmp_path, Net({13: "nan"}), guard, after, batches=make_batches(24), accumulate_grad_batches=3)
    assert same(after.weights[14], after.weights[5])
    assert after.batches == [*range(15), *range(18, 24)]
    assert guard.num_steps == 7


def test_rollback_lowers_learning_rates_while_optimizers_step(tmp_path):
    """For `cooldown_steps`; schedulers and loggers see the true one."""
    rates = []

    class Recording(torch.optim.SGD):
        def step(self, closure=None):
            rates.append(self.param_groups[0]["lr"])
            return super().step(closure)

    class Recorded(Net):
        def configure_optimizers(self):
            return Recording(self.parameters(), lr=0.08)

    after = After()
    net = Recorded({6: "nan"})
    fit(tmp_path, net, rolling(lr_factor=0.25, cooldown_steps=3), after)
    assert rates == [0.08] * 7 + [0.02] * 3 + [0.08] * 2
    assert set(after.rates) == {0.08}
    optimizer = net.trainer.optimizers[0]
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


def test_lowered_rates_go_on_in_a_resumed_run(tmp_path):
    """From a checkpoint in the middle of `cooldown_steps`."""
    rates = []

    class Recording(torch.optim.SGD):
        def step(self, closure=None):
            rates.append(self.param_groups[0]["lr"])
            return super().step(closure)

    class Recorded(Net):
        def configure_optimizers(self):
            return Recording(self.parameters(), lr=0.08)

    class Saves(Checkpoint):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 8:
                trainer.save_checkpoint(tmp_path / "kept.ckpt")

    batches = ResumableBatches(make_batches(14).batches)
    fit(tmp_path, Recorded({6: "nan"}), rolling(lr_factor=0.25, cooldown_steps=5), Saves(), batches=batches)
    assert rates == [0.08] * 7 + [0.02] * 5 + [0.08] * 2
    rates.clear()
    trainer = make_trainer(tmp_path, rolling(lr_factor=0.25, cooldown_steps=5))
    trainer.fit(Recorded(), ResumableBatches(batches.batches), ckpt_path=tmp_path / "kept.ckpt")
    assert rates == [0.02] * 3 + [0.08] * 2


def test_rollback_puts_back_a_buffer_that_was_assigned_since(tmp_path):
    """The tensor itself, where the other one has another shape."""

    class Grows(Net):
        def __init__(self, faults):
            super().__init__(faults)
            self.register_buffer("seen", torch.zeros(1))

        def training_step(self, batch, batch_idx):
            self.seen = torch.cat([self.seen, batch[0].float().reshape(1)])
            return super().training_step(batch, batch_idx)

    net = Grows({10: "nan"})
    fit(tmp_path, net, rolling(looks_into=False))
    assert net.seen.tolist() == [0.0, *map(float, range(8)), 11.0]


def test_rollback_again_and_again_stops_in_the_last_good_state(tmp_path):
    """Two are allowed, the third ends the training."""
    guard, after = rolling(max_rollbacks=2), After()
    net = Net(dict.fromkeys(range(8, 30), "nan"))
    trainer = fit(tmp_path, net, guard, after, batches=make_batches(30))
    assert trainer.global_step == 11
    assert guard.stopped_by.kind == "rollback"
    assert guard.stopped_by.value > 0
    assert all(tensor.isfinite().all() for tensor in net.state_dict().values())
    assert "rollback number 3 without a good state in between" in guard.stopped_by.message


def test_fourth_rollback_to_a_snapshot_goes_to_the_one_before(tmp_path):
    """Three did not help."""
    after = After()
    fit(tmp_path, Net(dict.fromkeys(range(10, 14), "nan")), rolling(), after, batches=make_batches(15))
    assert all(same(after.weights[index], after.weights[7]) for index in (10, 11, 12))
    assert same(after.weights[13], after.weights[3])


def test_interval_after_a_rollback_is_shorter_until_there_is_a_good_snapshot(tmp_path):
    """Else faults that come as often as snapshots would undo all progress."""
    after, guard = After(), rolling(every_n_steps=16, confirm_steps=2)
    fit(tmp_path, Net({10: "nan", 24: "nan", 50: "nan"}), guard, after, batches=make_batches(52))
    assert same(after.weights[24], after.weights[18])  # 8 steps after the first rollback
    assert same(after.weights[50], after.weights[32])  # 8 steps after the second
    assert [alert.value for alert in guard.alerts if alert.kind == "rollback"] == [11, 6, 18]


def test_new_good_snapshot_allows_as_many_rollbacks_again(tmp_path):
    """Ten single faults are not ten in a row."""
    guard = rolling(max_rollbacks=1)
    fit(tmp_path, Net(dict.fromkeys(range(10, 110, 10), "nan")), guard, batches=make_batches(120))
    assert guard.stopped_by is None
    assert guard.state_dict()["recovery"]["num_rollbacks"] == 10


def test_manual_optimization_with_two_optimizers_takes_both_back(tmp_path):
    """Whichever of them has found the fault, and though the other one steps after it in the same batch."""

    class TwoOptimizers(Net):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            number, x, y = batch
            for optimizer in self.optimizers():
                loss = nn.functional.mse_loss(self.head(torch.tanh(self.body(x))), y)
                optimizer.zero_grad()
                self.manual_backward(loss * (math.nan if int(number) == 9 and optimizer is self.optimizers()[0] else 1))
                optimizer.step()

        def configure_optimizers(self):
            return [torch.optim.Adam(self.body.parameters(), lr=0.01), torch.optim.Adam(self.head.parameters(), lr=0.01)]

    guard, after = rolling(confirm_steps=1), After()
    trainer = fit(tmp_path, TwoOptimizers(), guard, after)
    assert same(after.weights[9], after.weights[7])
    assert same(after.optimizers[9], after.optimizers[7])
    assert trainer.global_step == guard.num_steps == 24


def test_scale_of_a_grad_scaler_goes_back(tmp_path):
    """And steps that it skips while it looks for its scale put no snapshot in doubt."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_interval=2)
    guard, after = rolling(), After()
    scales = []

    class Scales(Checkpoint):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            scales.append(scaler.get_scale())

    fit(
        tmp_path,
        Net({18: "nan_loss"}),
        guard,
        after,
        Scales(),
        batches=make_batches(20),
        plugins=[MixedPrecision("16-mixed", "cpu", scaler=scaler)],
    )
    assert scales[18] == scales[15] != scales[17]
    assert same(after.weights[18], after.weights[15])
    assert same(after.optimizers[18], after.optimizers[15])


def test_metrics_of_the_epoch_forget_what_was_gone_back_on(tmp_path):
    """The Trainer's means, and metrics of the module's own."""

    class Measured(Net):
        def __init__(self, faults):
            super().__init__(faults)
            self.mean = MeanMetric(nan_strategy="disable")

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.log("mean_number", batch[0].float() * (loss.detach() * 0 + 1), on_epoch=True, batch_size=1)
            self.mean.update(batch[0] * (loss.detach() * 0 + 1))
            return loss

        def on_train_epoch_end(self):
            self.own = float(self.mean.compute())
            self.mean.reset()

    net = Measured({10: "nan"})
    trainer = fit(tmp_path, net, rolling())
    expected = sum([*range(8), 11]) / 9
    assert float(trainer.callback_metrics["mean_number"]) == pytest.approx(expected)
    assert net.own == pytest.approx(expected)


@pytest.mark.skipif(not lightning_package.has("EMAWeightAveraging"), reason="Lightning has it from 2.6 on")
def test_weights_that_a_callback_averages_go_back_too(tmp_path):
    """A mean over damaged weights would be damaged for good."""
    ema = lightning_package.EMAWeightAveraging(decay=0.5)
    net, averages = Net({10: "nan"}), []

    class Averages(Checkpoint):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            averages.append(weights_of(ema._average_model))

    fit(tmp_path, net, ema, rolling(), Averages(), batches=make_batches(11))
    assert same(averages[10], averages[7])


class Whole(LightningModule):
    """Dropout, batch norm, momentum, a scheduler that computes each rate from the last, and a metric."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Dropout(0.3), nn.ReLU(), nn.Linear(16, 1))

    def training_step(self, batch, batch_idx):
        _, x, y = batch
        return nn.functional.mse_loss(self.net(x), y)

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.02, amsgrad=True)
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9), "interval": "step"}]


@pytest.mark.parametrize("precision", ["32", "16", "64-true"])
def test_replay_from_a_snapshot_is_the_first_pass_bit_for_bit(precision, tmp_path):
    """With the clock taken back too, the same batches lead to the same weights, optimizer state, rates and baselines."""
    plain = make_batches(8).batches
    if precision == "64-true":
        plain = [(number, x.double(), y.double()) for number, x, y in plain]
    guard = GradGuard(clip=1.0)

    class Replays(Checkpoint):
        seen: list = []  # noqa: RUF012

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            state = RunState(trainer, pl_module, list(guard._fit.guards))
            if batch_idx == 2:
                self.kept = state.take()
            if batch_idx in (7, 12):
                self.seen.append(copy.deepcopy(state.take()))
                if batch_idx == 7:
                    state.put_back(self.kept, with_clock=True)

    replays = Replays()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
    settings = {"plugins": [MixedPrecision("16-mixed", "cpu", scaler=scaler)]} if precision == "16" else {}
    settings = {"precision": precision} if precision == "64-true" else settings
    fit(tmp_path, Whole(), guard, replays, batches=Batches(plain + plain[3:]), **settings)
    first, second = replays.seen
    for part in ("groups", "schedulers", "precision"):
        assert same(first[part], second[part])
    assert same(_values(first["tensors"]), _values(second["tensors"]))
    assert torch.equal(first["random"]["torch"], second["random"]["torch"])
    assert [state["judge"] for state in first["guards"]] == [state["judge"] for state in second["guards"]]


def _values(tree):
    if isinstance(tree, dict):
        return {key: _values(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [_values(value) for value in tree]
    return getattr(tree, "value", tree)


def test_snapshots_larger_than_memory_are_refused_with_an_alert_and_training_goes_on(tmp_path):
    """A buffer that claims 40 TB. At the NaN there is nothing to go back to, and the step is skipped."""
    net = Net({10: "nan"})
    net.register_buffer("huge", torch.zeros(1, dtype=torch.int8).expand(4 * 10**13), persistent=False)
    guard = rolling(looks_into=False)
    trainer = fit(tmp_path, net, guard)
    assert trainer.global_step == 12
    assert [(alert.kind, alert.action) for alert in guard.alerts] == [("snapshot", "warn"), ("nonfinite", "rollback")]
    assert "less memory" in guard.alerts[0].message
    assert guard.num_skipped == 1


def test_healthy_training_with_snapshots_is_the_one_without_a_guard(tmp_path):
    """To the last bit: copies change nothing, random states least of all."""
    weights = []
    for callbacks in ([], [rolling(confirm_steps=0)]):
        torch.manual_seed(0)
        net = Whole()
        fit(tmp_path, net, *callbacks)
        weights.append(weights_of(net))
    assert same(*weights)


def test_memory_for_snapshots_is_said_before_training(tmp_path, caplog, summary):
    """With an optimizer that has no state yet, two tensors a weight are assumed."""
    net = Net()
    fit(tmp_path, net, rolling(keep=3))
    size = 3 * 3 * sum(parameter.numel() for parameter in net.parameters()) * 4
    assert f"GradGuard keeps 3 snapshots in CPU memory, {size / 1e6:.1f} MB a rank" in caplog.text


@pytest.mark.smoke
@pytest.mark.parametrize("directory", ["snapshots", "deep/er"])
def test_rollback_from_disk_is_the_one_from_memory(directory, tmp_path):
    """Weights and optimizer state, bit for bit; and what is left on the disk are whole files."""
    after = After()
    guard = rolling(directory=tmp_path / directory)
    fit(tmp_path, Net({10: "nan"}), guard, after, batches=make_batches(14))
    assert same(after.weights[10], after.weights[7])
    assert same(after.optimizers[10], after.optimizers[7])
    kept = sorted((tmp_path / directory).iterdir())
    assert [path.name for path in kept] == ["step-000000008.ckpt", "step-000000013.ckpt.pending"]
    assert all(torch.load(path, weights_only=True)["state_dict"] for path in kept)
    assert Rollback(directory=tmp_path / directory).latest().name == "step-000000008.ckpt"


@pytest.mark.smoke
def test_run_resumed_from_its_latest_snapshot_is_the_one_never_stopped(tmp_path):
    """Dropout too: random states are in the snapshot."""
    whole, resumed = Whole(), Whole()
    resumed.load_state_dict(whole.state_dict())
    torch.manual_seed(1)
    fit(tmp_path, whole, rolling(), batches=ResumableBatches(make_batches(20).batches))

    class Dies(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 11:
                raise InterruptedError

    rollback = Rollback(every_n_steps=4, confirm_steps=2, directory=tmp_path / "kept")
    batches = ResumableBatches(make_batches(20).batches)
    torch.manual_seed(1)
    with pytest.raises(InterruptedError):
        fit(tmp_path, resumed, GradGuard(nonfinite="rollback", rollback=rollback), Dies(), batches=batches)
    latest = rollback.latest()
    assert latest.name == "step-000000008.ckpt"
    torch.manual_seed(2)
    again = Whole()
    trainer = make_trainer(tmp_path, GradGuard(nonfinite="rollback", rollback=rollback))
    trainer.fit(again, ResumableBatches(make_batches(20).batches), ckpt_path=latest)
    assert trainer.global_step == 20
    assert same(weights_of(again), weights_of(whole))


def test_folder_with_another_runs_snapshots_is_refused(tmp_path):
    """They would be deleted otherwise."""
    fit(tmp_path, Net(), rolling(directory=tmp_path / "kept"))
    with pytest.raises(ConflictError, match=r"`directory` must hold no snapshots of another run.*step-000000008"):
        fit(tmp_path, Net(), rolling(directory=tmp_path / "kept"))


def test_folder_that_cannot_be_written_is_an_alert_and_training_goes_on(tmp_path):
    """Where the folder should be there is a file."""
    (tmp_path / "file").write_text("")
    guard = rolling(directory=tmp_path / "file" / "kept")
    trainer = fit(tmp_path, Net({10: "nan"}), guard)
    assert trainer.global_step == 12
    assert [(alert.kind, alert.action) for alert in guard.alerts] == [("snapshot", "warn"), ("nonfinite", "rollback")]
    assert "NotADirectoryError" in guard.alerts[0].message


def test_full_disk_is_an_alert_and_the_last_good_snapshot_stays(tmp_path):
    """No file may grow beyond 8 kB from batch 6 on; the NaN leads back to what was kept before."""

    class Fills(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 6:
                resource.setrlimit(resource.RLIMIT_FSIZE, (8000, limits[1]))

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    guard, after = rolling(looks_into=False, directory=tmp_path / "kept"), After()
    try:
        fit(tmp_path, Net({14: "nan"}), guard, Fills(), after, batches=make_batches(16))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [alert.kind for alert in guard.alerts] == ["snapshot", "nonfinite", "rollback"]
    assert "File too large" in guard.alerts[0].message
    assert same(after.weights[14], after.weights[3])
    assert [path.name for path in (tmp_path / "kept").iterdir()] == ["step-000000004.ckpt"]


def test_snapshot_that_somebody_has_deleted_is_an_alert(tmp_path):
    """Then there is nothing to go back to."""

    class Deletes(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 10:
                for path in (tmp_path / "kept").iterdir():
                    path.unlink()

    guard = rolling(directory=tmp_path / "kept")
    trainer = fit(tmp_path, Net({10: "nan"}), guard, Deletes())
    assert trainer.global_step == 12
    assert [alert.kind for alert in guard.alerts] == ["nonfinite", "snapshot"]


def test_snapshot_that_a_run_was_resumed_from_stays_until_there_is_a_newer_one(tmp_path, monkeypatch):
    """Whatever way its path is written; what a killed run left half written goes."""
    monkeypatch.chdir(tmp_path)
    batches = ResumableBatches(make_batches(12).batches)
    fit(tmp_path, Net(), rolling(directory="kept"), batches=batches)
    for name in ("step-000000009.ckpt.part", "step-000000012.ckpt.pending"):
        (tmp_path / "kept" / name).write_text("")

    class Looks(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            names.append(sorted(path.name for path in (tmp_path / "kept").iterdir()))

    names: list = []
    guard = rolling(directory="kept")
    trainer = make_trainer(tmp_path, Looks(), guard)
    trainer.fit(Net({10: "nan"}), ResumableBatches(make_batches(12).batches), ckpt_path="kept/step-000000008.ckpt")
    assert names[0] == ["step-000000008.ckpt"]
    assert [alert.kind for alert in guard.alerts] == ["nonfinite", "rollback"]


class Distrusts(Detector):
    """Finds something at one step."""

    name = "distrust"

    def __init__(self, step: int) -> None:
        super().__init__("rollback")
        self.remaining = step

    def observe(self, measurement):
        self.remaining -= 1
        return Verdict(self.name, 1.0, 0.0, "a whim", "none") if self.remaining == -1 else None


def test_skipped_step_puts_a_snapshot_in_doubt(tmp_path):
    """A NaN is only skipped here, yet the snapshot before it is not trusted when a detector of one's own goes back."""
    guard, after = GradGuard(detectors=[Distrusts(10)], rollback=Rollback(every_n_steps=4, confirm_steps=2)), After()
    fit(tmp_path, Net({9: "nan"}), guard, after)
    assert same(after.weights[10], after.weights[3])


@pytest.mark.filterwarnings("ignore:.*returned `None`")  # Lightning says it once a process
def test_step_without_gradients_is_healthy(tmp_path):
    """`training_step` returned None."""
    guard, after = rolling(), After()
    with pytest.warns(GradientWarning, match="Nonfinite"):
        fit(tmp_path, Net({9: "none", 10: "nan"}), guard, after)
    assert same(after.weights[10], after.weights[7])


def test_snapshot_that_cannot_be_confirmed_is_an_alert(tmp_path):
    """Its file is gone by then; the one before is gone back to."""

    class Deletes(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 8:
                (tmp_path / "kept" / "step-000000008.ckpt.pending").unlink()

    guard, after = rolling(directory=tmp_path / "kept"), After()
    fit(tmp_path, Net({10: "nan"}), guard, Deletes(), after)
    assert [alert.kind for alert in guard.alerts] == ["snapshot", "nonfinite", "rollback"]
    assert same(after.weights[10], after.weights[3])


def test_snapshot_that_cannot_be_deleted_is_a_warning(tmp_path):
    """Somebody has put a file where the folder was."""

    class Replaces(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 9:
                shutil.rmtree(tmp_path / "kept")
                (tmp_path / "kept").write_text("")

    guard = rolling(directory=tmp_path / "kept")
    with pytest.warns(GuardWarning, match="could not be deleted: .*Not a directory"):
        trainer = fit(tmp_path, Net({9: "nan"}), guard, Replaces())
    assert trainer.global_step == 12


def test_memory_that_has_run_out_since_is_an_alert_and_the_last_good_snapshot_stays(tmp_path):
    """A buffer that claims 40 TB appears at batch 5."""

    class Grows(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 5:
                pl_module.register_buffer("huge", torch.zeros(1, dtype=torch.int8).expand(4 * 10**13), persistent=False)

    guard, after = rolling(looks_into=False, keep=3), After()
    fit(tmp_path, Net({10: "nan"}), guard, Grows(), after)
    assert [alert.kind for alert in guard.alerts] == ["snapshot", "nonfinite", "rollback"]
    assert "MemoryError: 40,000,000" in guard.alerts[0].message
    assert same(after.weights[10]["body.weight"], after.weights[3]["body.weight"])


@pytest.mark.filterwarnings("ignore:.*`dataloader_iter`")
def test_rollback_where_the_module_fetches_its_batches_passes_none_over(tmp_path):
    """Nobody else can take some from it."""

    class Fetches(Net):
        def training_step(self, dataloader_iter):
            batch, batch_idx, _ = next(dataloader_iter)
            return super().training_step(batch, batch_idx)

    guard = rolling(looks_into=False, skip_batches=3)
    trainer = fit(tmp_path, Fetches({10: "nan"}), guard)
    assert trainer.global_step == 12
    assert guard.alerts[1].message.endswith("steps ago.")


def test_rollback_with_a_loader_that_ends_before_its_length_ends_the_epoch(tmp_path):
    """It says twenty and has twelve."""

    class Boasts(Batches):
        def __len__(self):
            return 20

    after = After()
    fit(tmp_path, Net({9: "nan"}), rolling(skip_batches=6), after, batches=Boasts(make_batches(12).batches))
    assert after.batches == list(range(10))


def test_rollback_to_a_snapshot_of_another_epoch_begins_its_metrics_afresh(tmp_path):
    """What was gone back on counts for nothing, and of the epoch nothing else is left."""

    class Measured(Net):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            bad = self.current_epoch == 1 and batch_idx == 1
            self.log("mean_number", batch[0].float() * (torch.nan if bad else 1.0), on_epoch=True, batch_size=1)
            return loss * (torch.nan if bad else 1.0)

    trainer = fit(tmp_path, Measured(), rolling(), batches=make_batches(6), max_epochs=2)
    assert float(trainer.callback_metrics["mean_number"]) == pytest.approx((2 + 3 + 4 + 5) / 4)
