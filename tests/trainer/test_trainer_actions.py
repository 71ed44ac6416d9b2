"""Log, warn, skip, stop and raise on a real training."""

from __future__ import annotations

import logging
import signal

import pytest
import torch
from lightning_package import Callback, EarlyStopping, ModelCheckpoint
from toys import Net, Snapshots, ValidatedNet, fit, make_batches, make_trainer, read_alerts, same, seeded, weights_of

from lightning_gradguard import Explosion, GradGuard, GradientError, GradientWarning, GuardWarning, NonFinite

BAD = 5
ABSOLUTE = {"max_norm": 1e3, "ratio": None}


class BatchNormNet(Net):
    """The same with running statistics and an input that can be NaN."""

    def __init__(self, **settings) -> None:
        super().__init__(**settings)
        self.norm = torch.nn.BatchNorm1d(6)

    def training_step(self, batch, batch_idx):
        number, x, y = batch
        poisoned = x * torch.nan if int(number) in self.faults else x
        return torch.nn.functional.mse_loss(self.head(torch.tanh(self.body(self.norm(poisoned)))), y)


class Journal(Callback):
    """Which of the closing hooks ran."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def on_validation_end(self, trainer, pl_module):
        if not trainer.sanity_checking:
            self.seen.append("validation")

    def on_train_epoch_end(self, trainer, pl_module):
        self.seen.append("epoch end")

    def on_train_end(self, trainer, pl_module):
        self.seen.append("train end")


class Interrupt(Callback):
    """Ctrl+C in the middle of a batch."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == 3:
            raise KeyboardInterrupt


@pytest.fixture
def _sigint():
    """Lightning ignores further interrupts for the rest of the process; put the handler back."""
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)


def _run(root, guard, fault, *, optimizer="adamw", **settings):
    """Fit with one bad batch, which must be warned of; the module and its snapshots."""
    snapshots, module = Snapshots(), seeded(lambda: Net({BAD: fault}, optimizer))
    with pytest.warns(GradientWarning, match=f"at step {BAD} "):
        fit(root, module, guard, snapshots, **settings)
    return module, snapshots


@pytest.mark.smoke
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("fault", ["nan", "inf", "nan_loss", "huge"])
def test_skip_bad_step_leaves_weights_and_optimizer_state_as_they_were(fault, optimizer, tmp_path):
    """Bit for bit: weights, momenta, step counters, weight decay."""
    guard = GradGuard(explosion=Explosion("skip", **ABSOLUTE))
    _, snapshots = _run(tmp_path, guard, fault, optimizer=optimizer)
    assert guard.num_skipped == 1
    assert same(snapshots.weights[BAD], snapshots.weights[BAD - 1])
    assert same(snapshots.optimizers[BAD], snapshots.optimizers[BAD - 1])
    assert not same(snapshots.weights[BAD + 1], snapshots.weights[BAD])


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
@pytest.mark.parametrize("fault", ["nan", "huge"])
def test_skip_bad_step_trains_on_as_if_its_gradients_never_existed(fault, tmp_path):
    """The rest of the run equals one in which that training_step returned None."""
    guard = GradGuard(explosion=Explosion("skip", **ABSOLUTE))
    module, snapshots = _run(tmp_path, guard, fault)
    expected, without = Snapshots(), seeded(lambda: Net({BAD: "none"}))
    fit(tmp_path, without, expected)
    assert same(weights_of(module), weights_of(without))
    assert same(snapshots.optimizers, expected.optimizers)


@pytest.mark.smoke
def test_skip_relative_limit_passes_over_a_spike_after_the_warm_up(tmp_path):
    """With its defaults the detector needs sixteen steps of history, then sees a factor of a million at once."""
    guard = GradGuard(explosion="skip")
    with pytest.warns(GradientWarning, match="Explosion at step 18 .* times its usual"):
        fit(tmp_path, Net({18: "huge"}), guard, batches=make_batches(24))
    assert [alert.step for alert in guard.alerts] == [18]
    assert guard.num_skipped == 1


def test_skip_nan_batch_repairs_the_running_statistics(tmp_path):
    """BatchNorm's mean and variance of before the bad batch are back; the model can be evaluated."""
    snapshots, module = Snapshots(), BatchNormNet(faults={BAD: "nan"})
    with pytest.warns(GradientWarning, match="Nonfinite"):
        fit(tmp_path, module, GradGuard(), snapshots)
    assert same(snapshots.weights[BAD]["norm.running_mean"], snapshots.weights[BAD - 1]["norm.running_mean"])
    assert all(value.isfinite().all() for value in weights_of(module).values())


def test_skip_advances_global_step_and_counts_every_step(tmp_path):
    """Lightning's counters go on over a skipped step, and so does the guard's."""
    guard, module = GradGuard(), Net({BAD: "nan"})
    trainer = make_trainer(tmp_path, guard)
    with pytest.warns(GradientWarning, match="Nonfinite"):
        trainer.fit(module, make_batches(12))
    assert trainer.global_step == guard.num_steps == 12


def test_alert_of_a_skipped_step_says_where_what_and_who(tmp_path):
    """Step, epoch, batch, kind, action, the worst parameters, and a sentence with a remedy."""
    guard = GradGuard()
    with pytest.warns(GradientWarning, match="Nonfinite") as caught:
        fit(tmp_path, Net({2: "nan"}), guard, max_epochs=2)
    first, second = guard.alerts
    assert (first.step, first.epoch, first.batch_idx, first.micro_batch) == (2, 0, 2, 0)
    assert (second.step, second.epoch, second.batch_idx) == (14, 1, 2)
    assert (first.kind, first.action, first.optimizer, first.rank) == ("nonfinite", "skip", 0, 0)
    assert {report["name"] for report in first.parameters} <= {"body.weight", "body.bias", "head.weight", "head.bias"}
    assert first.parameters[0]["num_nan"] > 0
    texts = [str(warning.message) for warning in caught if warning.category is GradientWarning]
    assert texts == [f"{alert.message} {alert.remedy}".rstrip() for alert in (first, second)]


@pytest.mark.parametrize("action", ["log", "warn"])
def test_log_and_warn_apply_the_step(action, tmp_path):
    """The same weights as without a guard."""
    guard = GradGuard(explosion=Explosion(action, **ABSOLUTE))
    guarded, plain = seeded(lambda: Net({BAD: "huge"})), seeded(lambda: Net({BAD: "huge"}))
    if action == "warn":
        with pytest.warns(GradientWarning, match="The step is applied"):
            fit(tmp_path, guarded, guard)
    else:
        fit(tmp_path, guarded, guard)
    fit(tmp_path, plain)
    assert same(weights_of(guarded), weights_of(plain))
    assert [alert.action.value for alert in guard.alerts] == [action]
    assert guard.num_skipped == 0


def test_log_goes_to_the_packages_logger(caplog, tmp_path):
    """Quietly: no warning, one line at level INFO."""
    with caplog.at_level(logging.INFO, logger="lightning_gradguard"):
        fit(tmp_path, Net({BAD: "huge"}), GradGuard(explosion=Explosion("log", **ABSOLUTE)))
    assert len([text for text in caplog.messages if text.startswith(f"Explosion at step {BAD} ")]) == 1


@pytest.mark.smoke
@pytest.mark.parametrize(("fault", "settings"), [("nan", {"nonfinite": "stop"}), ("huge", {"explosion": "stop"})])
def test_stop_ends_the_fit_with_the_weights_from_before(fault, settings, tmp_path):
    """`fit` returns normally after the bad batch, which was never applied."""
    if "explosion" in settings:
        settings = {"explosion": Explosion("stop", **ABSOLUTE)}
    guard = GradGuard(**settings)
    module, snapshots = _run(tmp_path, guard, fault, max_epochs=3)
    assert guard.num_steps == BAD + 1
    assert guard.stopped_by is guard.alerts[-1]
    assert guard.stopped_by.action == "stop"
    assert same(weights_of(module), snapshots.weights[BAD - 1])


def test_stop_runs_validation_and_epoch_end_and_saves_a_checkpoint(tmp_path):
    """All that Lightning's own EarlyStopping would let run; the checkpoint holds the weights from before."""
    guard, journal, snapshots = GradGuard(nonfinite="stop"), Journal(), Snapshots()
    checkpoint = ModelCheckpoint(dirpath=tmp_path / "checkpoints", monitor="val_loss", save_last=True)
    trainer = make_trainer(tmp_path, guard, journal, snapshots, checkpoint, max_epochs=3, enable_checkpointing=True)
    with pytest.warns(GradientWarning, match="training stops"):
        trainer.fit(ValidatedNet({BAD: "nan"}), make_batches(12), make_batches(2, seed=5))
    assert journal.seen == ["validation", "epoch end", "train end"]
    assert trainer.state.status == "finished"
    saved = torch.load(checkpoint.best_model_path, weights_only=True)
    assert same(saved["state_dict"], snapshots.weights[BAD - 1])


def test_stop_goes_with_early_stopping(tmp_path):
    """Two callbacks that may stop the training do not get in each other's way."""
    guard = GradGuard(nonfinite="stop")
    stopping = EarlyStopping("val_loss", patience=50)
    trainer = make_trainer(tmp_path, guard, stopping, max_epochs=3)
    with pytest.warns(GradientWarning, match="training stops"):
        trainer.fit(ValidatedNet({BAD: "nan"}), make_batches(12), make_batches(2, seed=5))
    assert guard.num_steps == BAD + 1


def test_stop_deferred_by_min_steps_says_so_and_keeps_skipping(tmp_path):
    """The Trainer goes on to its minimum; the later bad step is skipped as well, and the first alert is the reason."""
    guard, snapshots = GradGuard(nonfinite="stop"), Snapshots()
    module = Net({2: "nan", 6: "nan"})
    with (
        pytest.warns(GuardWarning, match=r"`min_steps=9` keeps the Trainer going.*Bad steps stay skipped"),
        pytest.warns(GradientWarning, match="Nonfinite"),
    ):
        fit(tmp_path, module, guard, snapshots, min_steps=9, max_epochs=4)
    assert guard.stopped_by.step == 2
    assert guard.num_skipped == 2
    assert guard.num_steps == 12  # Lightning also finishes the first epoch
    assert same(snapshots.weights[6], snapshots.weights[5])


def test_stop_deferred_by_min_epochs_says_so(tmp_path):
    """Two epochs are asked for, so the second is trained too."""
    guard = GradGuard(nonfinite="stop")
    with (
        pytest.warns(GuardWarning, match="`min_epochs=2` keeps the Trainer going"),
        pytest.warns(GradientWarning, match="Nonfinite"),
    ):
        fit(tmp_path, Net({2: "nan"}), guard, min_epochs=2, max_epochs=5)
    assert guard.num_steps == 24


def test_stop_at_the_step_that_fulfils_min_steps_is_not_called_deferred(tmp_path):
    """The bad step is itself the last one that the Trainer asks for; nothing keeps it going."""
    guard = GradGuard(nonfinite="stop")
    with pytest.warns(GradientWarning, match="Nonfinite"):
        fit(tmp_path, Net({11: "nan"}), guard, min_steps=12, max_epochs=3)
    assert guard.num_steps == 12


@pytest.mark.smoke
def test_raise_leaves_fit_with_the_alert_and_the_weights_from_before(tmp_path):
    """A GradientError, which is a RuntimeError, before the bad update."""
    guard, snapshots, module = GradGuard(nonfinite="raise"), Snapshots(), Net({BAD: "nan"})
    with (
        pytest.warns(GradientWarning, match="ends with an error"),
        pytest.raises(GradientError, match=f"Nonfinite at step {BAD} ") as raised,
    ):
        fit(tmp_path, module, guard, snapshots)
    assert raised.value.alert is guard.alerts[-1] is guard.stopped_by
    assert guard.last.alerts == (raised.value.alert,)
    assert guard.num_skipped == 1
    assert same(weights_of(module), snapshots.weights[BAD - 1])


def test_nonfinite_every_step_stops_after_five_in_a_row(tmp_path):
    """The default skips, then takes five in a row for a broken run."""
    guard = GradGuard()
    with pytest.warns(GradientWarning, match="Nonfinite"):
        fit(tmp_path, Net(dict.fromkeys(range(3, 12), "nan")), guard)
    assert [alert.action.value for alert in guard.alerts] == ["skip", "stop"]
    assert guard.num_steps == 8
    assert guard.stopped_by.step == 7


def test_nonfinite_now_and_then_never_stops(tmp_path):
    """A healthy step in between starts the count again."""
    guard = GradGuard(nonfinite=NonFinite("skip", stop_after=2))
    with pytest.warns(GradientWarning, match="Nonfinite"):
        fit(tmp_path, Net(dict.fromkeys(range(0, 12, 2), "nan")), guard)
    assert (guard.num_steps, guard.num_skipped, guard.stopped_by) == (12, 6, None)


def test_nonfinite_off_lets_the_step_through(tmp_path):
    """`nonfinite=None` asks for it."""
    guard, module = GradGuard(nonfinite=None), Net({BAD: "nan"})
    fit(tmp_path, module, guard)
    assert (guard.alerts, guard.num_skipped) == ([], 0)
    assert module.head.weight.isnan().all()


def test_patience_warns_before_it_skips(tmp_path):
    """Two hits in a row are asked for: the first is applied with a warning, the second is not."""
    guard = GradGuard(explosion=Explosion("skip", patience=2, cooldown=0, **ABSOLUTE))
    with pytest.warns(GradientWarning, match="Explosion"):
        fit(tmp_path, Net({4: "huge", 5: "huge", 8: "huge"}), guard)
    assert [(alert.step, alert.action.value) for alert in guard.alerts] == [(4, "warn"), (5, "skip"), (8, "warn")]


def test_cooldown_acts_in_silence_and_counts_the_repeats(summary, tmp_path):
    """Three hits, one alert, three skips."""
    guard = GradGuard(explosion=Explosion("skip", **ABSOLUTE))
    with pytest.warns(GradientWarning, match="Explosion"):
        fit(tmp_path, Net({4: "huge", 5: "huge", 6: "huge"}), guard)
    assert (len(guard.alerts), guard.num_skipped) == (1, 3)
    assert summary() == ["GradGuard: 12 steps, 0 clipped, 3 skipped; alerts: 1 explosion (2 more while they lasted)."]


def test_summary_after_a_healthy_fit_counts_steps_and_clips(summary, tmp_path):
    """One line at the end."""
    guard = GradGuard(clip=1e-3)
    fit(tmp_path, Net(), guard)
    assert summary() == ["GradGuard: 12 steps, 12 clipped, 0 skipped; alerts: none."]


def test_summary_after_a_stop_says_why(summary, tmp_path):
    """The alert's sentence is repeated, since its warning may have scrolled away."""
    guard = GradGuard(nonfinite="stop")
    _run(tmp_path, guard, "nan")
    (text,) = summary()
    assert text.startswith("GradGuard: 6 steps, 0 clipped, 1 skipped; alerts: 1 nonfinite.")
    assert guard.stopped_by.message in text


def test_summary_after_an_error_is_printed_once(summary, tmp_path):
    """`raise` ends the run by an exception; the totals are printed all the same."""
    with pytest.warns(GradientWarning, match="Nonfinite"), pytest.raises(GradientError):
        fit(tmp_path, Net({BAD: "nan"}), GradGuard(nonfinite="raise"))
    assert len(summary()) == 1
    assert summary()[0].startswith("GradGuard: 6 steps, 0 clipped, 1 skipped")


@pytest.mark.usefixtures("_sigint")
def test_summary_after_an_interrupt_is_printed(summary, tmp_path):
    """Ctrl+C ends the process, as Lightning has it, after the totals."""
    with pytest.raises(SystemExit):
        fit(tmp_path, Net(), GradGuard(), Interrupt())
    assert summary() == ["GradGuard: 4 steps, 0 clipped, 0 skipped; alerts: none."]


def test_summary_without_any_step_says_what_to_do(summary, tmp_path):
    """Manual optimization on the raw optimizer goes past every callback."""

    class Raw(Net):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.manual_backward(loss)
            self.optimizers().optimizer.step()

    fit(tmp_path, Raw(), GradGuard())
    assert len(summary()) == 1
    assert "self.optimizers().step()" in summary()[0]


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_step_without_gradients_is_healthy(tmp_path):
    """A training_step that returns None is a step all the same, and nothing to alert about."""
    guard = GradGuard(clip=1.0)
    fit(tmp_path, Net({BAD: "none"}), guard, batches=make_batches(8))
    assert (guard.num_steps, guard.alerts, guard.num_skipped) == (8, [], 0)


def test_lbfgs_nan_in_a_closure_call_is_skipped(tmp_path):
    """L-BFGS calls the closure several times a step; a NaN batch leaves the weights as they were."""

    class Lbfgs(Net):
        def configure_optimizers(self):
            return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=3)

    guard, snapshots = GradGuard(), Snapshots()
    with pytest.warns(GradientWarning, match="Nonfinite"):
        fit(tmp_path, Lbfgs({2: "nan"}), guard, snapshots, batches=make_batches(5))
    assert same(snapshots.weights[2], snapshots.weights[1])
    assert all(value.isfinite().all() for value in snapshots.weights[4].values())


def test_norm_that_overflows_float32_is_an_explosion_with_its_true_value(tmp_path):
    """From the first step on, without any history."""
    guard, snapshots = GradGuard(explosion="skip"), Snapshots()
    with pytest.warns(GradientWarning, match="Explosion at step 2 "):
        fit(tmp_path, Net({2: "enormous"}), guard, snapshots)
    assert [alert.kind for alert in guard.alerts] == ["explosion"]
    assert 1e20 < guard.alerts[0].value < 1e30
    assert same(snapshots.weights[2], snapshots.weights[1])


@pytest.mark.filterwarnings("error::lightning_gradguard.GradientWarning")
def test_alert_where_warnings_are_errors_leaves_fit_before_the_bad_update(tmp_path):
    """Whoever asks for errors gets one, and the file has the alert all the same."""
    snapshots, module = Snapshots(), Net({BAD: "nan"})
    with pytest.raises(GradientWarning, match=f"Nonfinite at step {BAD} "):
        fit(tmp_path, module, GradGuard(), snapshots)
    assert same(weights_of(module), snapshots.weights[BAD - 1])
    assert [line["step"] for line in read_alerts(tmp_path)] == [BAD]


@pytest.mark.filterwarnings("error::lightning_gradguard.GradientWarning")
def test_raise_where_warnings_are_errors_still_raises_the_gradient_error(tmp_path):
    """The action's own exception has the last word."""
    with pytest.raises(GradientError, match="Nonfinite"):
        fit(tmp_path, Net({BAD: "nan"}), GradGuard(nonfinite="raise"))
