"""In a Trainer: causes that are easily mistaken, vanishing in time, the alert that ends a run, and where bundles are."""

from __future__ import annotations

import re
import shlex

import pytest
import torch
from lightning_package import LightningModule
from torch import nn
from toys import FEATURES, fit, make_batches, read_alerts, same, weights_of

from lightning_gradguard import Explosion, GradGuard, GradientError, GradientWarning, NonFinite
from lightning_gradguard.forensics.bundle import Bundle
from lightning_gradguard.forensics.rerun import rerun


class Regression(LightningModule):
    """A small one, whose step may depend on the number of its batch."""

    def __init__(self, make, rate, *, large=None, nan_from=None, scale=1.0):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(FEATURES, 16), nn.Tanh(), nn.Linear(16, 1))
        self.make, self.rate, self.large, self.nan_from, self.scale = make, rate, large, nan_from, scale

    def training_step(self, batch, batch_idx):
        _, x, _ = batch
        if batch_idx == self.large:
            x = 300.0 * x
        loss = self.scale * (self.net(x) - 10.0 * x.sum(1, keepdim=True)).square().mean()
        return self.divided(loss) if self.nan_from is not None and batch_idx >= self.nan_from else loss

    def divided(self, loss):
        """A line of its own."""
        zero = loss - loss
        return loss + zero / zero

    def configure_optimizers(self):
        return self.make(self.parameters(), lr=self.rate)


def trained(tmp_path, module, guard, count=40, **settings):
    """The alerts of a short fit."""
    with pytest.warns(GradientWarning):
        fit(tmp_path, module, guard, batches=make_batches(count), **settings)
    return guard.alerts


@pytest.mark.parametrize(("make", "rate"), [
    (torch.optim.Adam, 0.03), (torch.optim.RMSprop, 0.03), (torch.optim.Adamax, 0.03), (torch.optim.SGD, 1e-4),
])  # fmt: skip
def test_large_step_is_named_whatever_the_optimizer(tmp_path, make, rate):
    """The step itself makes it large by its number, so the healthy batch is run with its own."""
    (alert,) = trained(tmp_path, Regression(make, rate, large=35), GradGuard(vanishing=None))
    assert (alert.step, alert.culprit.cause, alert.culprit.phase) == (35, "step", "forward")
    assert "writes to the weights" not in alert.remedy
    assert "it is what the step does at this number, and not what is in the batch" in alert.message


def test_large_batch_is_told_from_what_the_step_does_at_its_number(tmp_path):
    """Here it is the data, under any number."""
    module = Regression(torch.optim.SGD, 1e-4)
    batches = make_batches(40)
    batches.batches[35][1].mul_(300.0)
    guard = GradGuard(vanishing=None)
    with pytest.warns(GradientWarning):
        fit(tmp_path, module, guard, batches=batches)
    (alert,) = guard.alerts
    assert alert.culprit.cause == "batch"
    assert "at this number" not in alert.message


class Recurrent(LightningModule):
    """The target is the sum of the first inputs, two hundred steps before the end."""

    def __init__(self, make, *, last=True, steps=200):
        super().__init__()
        torch.manual_seed(0)
        self.rnn, self.head = make(4, 16, batch_first=True), nn.Linear(16, 1)
        self.last, self.steps = last, steps

    def training_step(self, batch, batch_idx):
        x = torch.randn(8, self.steps, 4)
        states = self.rnn(x)[0]
        return (self.head(states[:, -1:] if self.last else states) - x[:, :5].sum((1, 2))[:, None, None]).square().mean()

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-3)


@pytest.mark.parametrize("make", [nn.RNN, nn.LSTM, nn.GRU])
def test_vanishing_in_time_is_found(tmp_path, make):
    """No gradient of a weight shows it."""
    (alert,) = trained(tmp_path, Recurrent(make), GradGuard(), 55)
    assert (alert.kind, alert.action, alert.step) == ("vanishing", "warn", 49)
    assert (alert.culprit.cause, alert.culprit.module) == ("recurrence", "rnn")
    assert "is applied 200 times" in alert.message
    assert read_alerts(tmp_path)[0]["culprit"]["cause"] == "recurrence"


@pytest.mark.parametrize("settings", [{"last": False}, {"steps": 8}])
def test_recurrent_net_in_order_raises_no_alert(tmp_path, settings):
    """A loss at each step, or few of them; and it trains as without the guard."""
    guard, guarded, bare = GradGuard(), Recurrent(nn.GRU, **settings), Recurrent(nn.GRU, **settings)
    for module, callbacks in ((bare, []), (guarded, [guard])):
        torch.manual_seed(1)
        fit(tmp_path, module, *callbacks, batches=make_batches(55))
    assert guard.alerts == []
    assert same(weights_of(guarded), weights_of(bare))


def test_vanishing_in_time_is_not_looked_for_where_vanishing_is_off(tmp_path):
    """Nor is anything run again."""
    guard = GradGuard(vanishing=None)
    fit(tmp_path, Recurrent(nn.RNN), guard, batches=make_batches(55))
    assert guard.alerts == []


def test_look_into_time_that_fails_is_a_warning(tmp_path, monkeypatch):
    """Training goes on."""
    monkeypatch.setattr(
        "lightning_gradguard.trainer.replay.time_probe.recurrences", lambda _: (_ for _ in ()).throw(RuntimeError("odd"))
    )
    guard = GradGuard()
    with pytest.warns(match="could not be replayed .RuntimeError: odd"):
        fit(tmp_path, Recurrent(nn.RNN), guard, batches=make_batches(55))
    assert guard.num_steps == 55


def test_alert_that_ends_the_run_has_its_culprit_beyond_the_budget(tmp_path):
    """One replay is allowed, and five steps in a row are bad."""
    module = Regression(torch.optim.SGD, 1e-4, nan_from=10)
    alerts = trained(tmp_path, module, guard := GradGuard(max_replays=1, nonfinite=NonFinite("skip", stop_after=5)))
    assert [alert.culprit is not None for alert in alerts] == [True, *[False] * (len(alerts) - 2), True]
    assert guard.stopped_by is alerts[-1]
    first, last = alerts[0].culprit, alerts[-1].culprit
    assert (first.op, first.line, first.source) == (last.op, last.line, last.source)
    assert "at step" not in last.message


@pytest.mark.parametrize("action", ["stop", "raise"])
def test_alert_that_stops_has_its_culprit_when_the_budget_is_spent(tmp_path, action):
    """An explosion has used it up."""
    module = Regression(torch.optim.SGD, 1e-4, large=30, nan_from=34)
    guard = GradGuard(max_replays=1, nonfinite=action, explosion="skip", vanishing=None)
    if action == "raise":
        with pytest.warns(GradientWarning), pytest.raises(GradientError, match="culprit: `div`"):
            fit(tmp_path, module, guard, batches=make_batches(40))
    else:
        trained(tmp_path, module, guard)
    assert guard.stopped_by.culprit.op == "div"


def test_alert_names_its_bundle_and_the_command(tmp_path):
    """The file is there, and holds the same alert; the fourth bad step has none, and names none."""
    folder = tmp_path / "a folder"
    module = Regression(torch.optim.SGD, 1e-4, nan_from=10)
    alerts = trained(folder, module, GradGuard(nonfinite=NonFinite("skip", stop_after=5, cooldown=0)))
    commands = [re.search(r"`(gradguard replay .*)`", alert.message) for alert in alerts]
    assert [command is not None for command in commands] == [True, True, True, False, False]
    path = shlex.split(commands[0].group(1))[-1]
    assert Bundle.load(path).alert["step"] == alerts[0].step == 10
    assert "gradguard replay" in read_alerts(folder)[0]["message"]


def test_alert_names_no_bundle_that_could_not_be_written(tmp_path, monkeypatch):
    """The disk is full."""
    monkeypatch.setattr(Bundle, "save", lambda *_: (_ for _ in ()).throw(OSError("No space left on device")))
    module = Regression(torch.optim.SGD, 1e-4, nan_from=38)
    with pytest.warns(match="could not be written as a bundle"):
        alerts = trained(tmp_path, module, GradGuard())
    assert all("gradguard replay" not in alert.message for alert in alerts)


def test_forced_alert_on_a_healthy_run_has_no_cause(tmp_path):
    """A limit far below what is usual says nothing about a fault."""
    module = Regression(torch.optim.SGD, 1e-6)
    guard = GradGuard(explosion=Explosion("warn", ratio=1.0001, z=1e-6, warmup_steps=10), vanishing=None)
    alerts = trained(tmp_path, module, guard)
    assert alerts
    assert all(alert.culprit is None for alert in alerts)


class Unfed(LightningModule):
    """Four layers in a row, beside a branch for features that nobody gives, as forecasting models have for static ones."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.static = nn.Sequential(nn.Linear(4, 16), nn.ELU(), nn.Linear(16, 16))
        self.net = nn.Sequential(*(nn.Linear(FEATURES if not index else 16, 16) for index in range(4)))
        self.head = nn.Linear(16, 1)
        with torch.no_grad():
            for layer in self.net[:3]:
                layer.weight *= 0.01  # so that the gradient fades, too, elsewhere

    def training_step(self, batch, batch_idx):
        _, x, y = batch
        return (self.head(self.net(x) + self.static(x.new_zeros(len(x), 4))) - y).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def test_weights_of_zero_gradient_are_laid_on_the_zeros_that_go_into_their_layer(tmp_path):
    """A gradient arrives at its output, and its bias learns; other layers' small weights have nothing to do with it."""
    guard = GradGuard(explosion=None)
    fit(tmp_path, Unfed(), guard, batches=make_batches(21))
    (alert,) = [alert for alert in guard.alerts if alert.step == 19]
    assert "the weight gradient of `static.0` has been exactly zero" in alert.message
    (bundle,) = tmp_path.rglob("*.bundle.pt")
    for culprit in (alert.culprit, rerun(Unfed(), Bundle.load(bundle)).culprit):
        assert (culprit.cause, culprit.module) == ("input", "static.0")
