"""In a Trainer: alerts of vanishing and explosion say why, and bad steps are written as bundles."""

from __future__ import annotations

import warnings

import pytest
import torch
from lightning_package import LightningModule, TensorBoardLogger
from torch import nn
from toys import FEATURES, Batches, Net, fit, make_batches, read_alerts, same, weights_of

from lightning_gradguard import Explosion, GradGuard, GradientWarning, GuardWarning, SinkWarning, Vanishing
from lightning_gradguard.act import choice
from lightning_gradguard.forensics.bundle import Bundle
from lightning_gradguard.forensics.rerun import rerun


class Deep(LightningModule):
    """A chain of layers; `shift` says at which batch one row is spoiled."""

    def __init__(self, activation=nn.Sigmoid, depth=8, shift=None, damage=None):
        super().__init__()
        hidden = [part for _ in range(depth) for part in (nn.Linear(FEATURES, FEATURES), activation())]
        self.layers = nn.Sequential(*hidden, nn.Linear(FEATURES, 1))
        self.shift, self.damage = shift, damage

    def training_step(self, batch, batch_idx):
        number, x, y = batch
        if int(number) == self.shift:
            y = y.clone()
            y[2] += 1000.0
        loss = nn.functional.mse_loss(self.layers(x), y)
        return loss * torch.nan if int(number) == self.damage else loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3, momentum=0.9)


def trained(tmp_path, module, guard, count=40, **settings):
    """The alerts of a short fit."""
    with pytest.warns(GradientWarning):
        fit(tmp_path, module, guard, batches=make_batches(count), **settings)
    return guard.alerts


@pytest.mark.smoke
def test_vanishing_alert_says_why_and_shows_the_factors(tmp_path):
    """In message, remedy, culprit, `alerts.jsonl` and TensorBoard's text."""
    torch.manual_seed(0)
    logger = TensorBoardLogger(tmp_path, name="", version="")
    guard = GradGuard(vanishing=Vanishing("warn", persistence=2, warmup_steps=2), explosion=None)
    (alert,) = trained(tmp_path, Deep(), guard, 6, logger=logger)
    assert alert.culprit.cause == "activation"
    assert "cause: activation; each of 8 sigmoids" in alert.message
    assert "ReLU" in alert.remedy
    assert alert.culprit.reproduced
    assert alert.culprit.error == 0.0
    assert len(alert.culprit.factors) == 2 + 17
    (line,) = read_alerts(tmp_path)
    assert line["culprit"]["factors"] == list(alert.culprit.factors)
    (events,) = tmp_path.glob("events*")
    assert b"| module | function | output rms |" in events.read_bytes()


@pytest.mark.smoke
def test_explosion_alert_names_the_sample(tmp_path):
    """Compared with the batch before on the same weights."""
    torch.manual_seed(0)
    guard = GradGuard(explosion="skip", vanishing=None)
    (alert,) = trained(tmp_path, Deep(nn.ReLU, 2, shift=30), guard)
    assert (alert.culprit.cause, alert.culprit.phase, alert.culprit.samples) == ("sample", "data", (2,))
    assert "row 2 alone makes 100% of it" in alert.message


def test_diagnosis_changes_nothing(tmp_path):
    """Weights at the end are those of a run without replays, bit for bit."""
    ends = []
    for replays in (0, 3):
        torch.manual_seed(0)
        module = Deep(nn.ReLU, 2, shift=30)
        guard = GradGuard(explosion="warn", max_replays=replays)
        alerts = trained(tmp_path / str(replays), module, guard)
        assert (alerts[0].culprit is not None) == (replays > 0)
        ends.append(weights_of(module))
    assert same(*ends)


def test_replays_are_shared_between_kinds(tmp_path):
    """One that went to a NaN is not there for an explosion."""
    torch.manual_seed(0)
    guard = GradGuard(explosion="skip", max_replays=1)
    alerts = trained(tmp_path, Deep(nn.ReLU, 2, shift=30, damage=4), guard)
    assert [(alert.kind, alert.culprit is None) for alert in alerts] == [("nonfinite", False), ("explosion", True)]


def test_accumulated_step_is_diagnosed(tmp_path):
    """The micro-batch that did most is the one that is looked at."""
    torch.manual_seed(0)
    guard = GradGuard(explosion="skip", vanishing=None)
    alerts = trained(tmp_path, Deep(nn.ReLU, 2, shift=40), guard, 44, accumulate_grad_batches=2)
    assert alerts[0].culprit.cause == "sample"
    assert alerts[0].culprit.samples == (2,)


def test_bundle_is_written_and_limited(tmp_path):
    """Three of a run."""
    torch.manual_seed(0)
    guard = GradGuard(explosion=Explosion("skip", cooldown=0, max_norm=1e-9))
    trained(tmp_path, Deep(nn.ReLU, 2), guard, 6)
    assert len(list((tmp_path / "gradguard").glob("*.bundle.pt"))) == 3


def test_bundle_can_be_turned_off(tmp_path):
    """And without one the folder holds the alerts alone."""
    guard = GradGuard(explosion=Explosion("skip", max_norm=1e-9), max_bundle_mib=None)
    trained(tmp_path, Deep(nn.ReLU, 2), guard, 3)
    assert [path.name for path in (tmp_path / "gradguard").iterdir()] == ["alerts.jsonl"]


def test_bundle_that_cannot_be_written_is_one_warning(tmp_path):
    """A file stands where the folder should be."""
    (tmp_path / "gradguard").write_text("in the way")
    guard = GradGuard(explosion=Explosion("skip", cooldown=0, max_norm=1e-9))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(tmp_path, Deep(nn.ReLU, 2), guard, batches=make_batches(4))
    about = [warning for warning in caught if "`max_bundle_mib=None`" in str(warning.message)]
    assert [warning.category for warning in about] == [SinkWarning]
    assert guard.num_skipped == 4


@pytest.mark.smoke
def test_bundle_of_a_step_replays_to_the_same_losses(tmp_path):
    """On another module, from the weights in it."""
    torch.manual_seed(0)
    trained(tmp_path, Deep(nn.ReLU, 2, shift=30), guard := GradGuard(explosion="skip", vanishing=None))
    (path,) = (tmp_path / "gradguard").glob("*.bundle.pt")
    again = rerun(Deep(nn.ReLU, 2, shift=30), Bundle.load(path))
    assert again.norm == pytest.approx(guard.alerts[0].value)
    assert again.culprit.samples == (2,)
    # What was compared with other steps of the run is not in the file.
    assert guard.alerts[0].culprit.message.startswith(again.culprit.message)


def test_weights_that_do_not_fit_are_left_out_of_the_bundle(tmp_path):
    """The batches come first."""
    torch.manual_seed(0)
    guard = GradGuard(explosion=Explosion("skip", max_norm=1e-9), max_bundle_mib=0.006)
    trained(tmp_path, Deep(nn.ReLU, 20), guard, 2)
    bundle = Bundle.load(next((tmp_path / "gradguard").glob("*.bundle.pt")))
    assert len(bundle.batches) == 1
    assert bundle.model is None
    assert any(part.startswith("model:") for part in bundle.left_out)


def test_bundle_size_must_be_positive():
    """With the remedy in the message."""
    with pytest.raises(ValueError, match="For no bundles pass None"):
        GradGuard(max_bundle_mib=0.0)


class Fused(Deep):
    """Steps by a kernel that decides by itself."""

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3, fused=True)


def test_culprits_of_steps_that_the_device_has_decided_are_named_a_step_later(tmp_path, monkeypatch):
    """From batches that were kept until then; there are no gradients any more to compare with."""
    monkeypatch.setattr(choice, "DEFERRING_DEVICES", {"cpu"})
    torch.manual_seed(0)
    guard = GradGuard(explosion="warn", vanishing=None)
    alerts = trained(tmp_path, Fused(nn.ReLU, 2, shift=30, damage=4), guard)
    assert [(alert.kind, alert.step) for alert in alerts] == [("nonfinite", 4), ("explosion", 30)]
    assert alerts[0].culprit.source == "return loss * torch.nan if int(number) == self.damage else loss"
    assert alerts[1].culprit.samples == (2,)
    assert [alert.culprit.reproduced for alert in alerts] == [False, False]
    left_out = Bundle.load(next((tmp_path / "gradguard").glob("explosion-*.bundle.pt"))).left_out
    assert any("the device had applied it before the host knew" in reason for reason in left_out)


def test_diagnosis_that_fails_is_a_warning_and_training_goes_on(tmp_path):
    """A step that can't be run twice."""
    seen = set()

    class Once(Deep):
        def training_step(self, batch, batch_idx):
            if batch_idx in seen:
                raise RuntimeError("twice")
            seen.add(batch_idx)
            return super().training_step(batch, batch_idx)

    guard = GradGuard(explosion="skip", vanishing=None, max_bundle_mib=None)
    with pytest.warns(GuardWarning, match="could not be replayed .RuntimeError: twice"):
        (alert,) = trained(tmp_path, Once(nn.ReLU, 2, shift=30), guard)
    assert (alert.step, alert.culprit, guard.num_steps) == (30, None, 40)


def test_vanishing_of_a_gradient_that_is_zero_everywhere_has_nothing_to_compare(tmp_path):
    """Neither the step's own nor the replay's has any size."""

    class Zero(Deep):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * 0.0 + 1.0

    guard = GradGuard(vanishing=Vanishing("warn", persistence=2, warmup_steps=2), explosion=None)
    (alert,) = trained(tmp_path, Zero(nn.ReLU, 2), guard, 6)
    assert (alert.kind, alert.value) == ("vanishing", 0.0)
    assert "has been below" in alert.message


def test_step_that_is_another_each_time_is_blamed_on_what_its_first_replay_shows(tmp_path):
    """The one that follows the rows sees something else, which is not mixed with it."""
    seen = []

    class Alternates(Deep):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            if batch_idx != 3:
                return loss
            seen.append(1)
            return loss / 0.0 if len(seen) % 2 else torch.log(-loss)

    (alert,) = trained(tmp_path, Alternates(nn.ReLU, 2), GradGuard(vanishing=None), 6)
    assert (alert.step, alert.culprit.op) == (3, "log")


class Uncopied:
    """A batch that refuses to be copied."""

    def __init__(self, number, x, y):
        self.number, self.x, self.y = number, x, y

    def __copy__(self):
        raise TypeError("one of a kind")


def test_sample_of_a_batch_that_can_not_be_exchanged_is_probable(tmp_path):
    """No replay without it can be run."""

    class Unpacks(Deep):
        def training_step(self, batch, batch_idx):
            return super().training_step((batch.number, batch.x, batch.y), batch_idx)

    torch.manual_seed(0)
    guard = GradGuard(explosion="skip", vanishing=None, max_bundle_mib=None)
    with pytest.warns(GradientWarning):
        fit(tmp_path, Unpacks(nn.ReLU, 2, shift=30), guard, batches=Batches([Uncopied(*it) for it in make_batches(32)]))
    (alert,) = guard.alerts
    assert (alert.culprit.cause, alert.culprit.samples, alert.culprit.probable_samples) == ("sample", None, (2,))


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_window_with_a_micro_batch_without_a_loss_is_replayed(tmp_path):
    """There is nothing of it to run backward."""
    guard = GradGuard(vanishing=None)
    with pytest.warns(GradientWarning):
        fit(tmp_path, Net({4: "none", 5: "nan"}), guard, accumulate_grad_batches=2)
    (alert,) = guard.alerts
    assert (alert.step, alert.batch_idx, alert.culprit.op) == (2, 5, "mul")
