"""The whole pipeline in a raw loop."""

from __future__ import annotations

import logging
import math
import pickle
import warnings

import numpy as np
import pytest
import torch
from builders import mlp, through_checkpoint
from torch.optim import SGD

from lightning_gradguard import (
    Action,
    ClipNorm,
    ClipValue,
    Detector,
    Explosion,
    GradientError,
    GradientWarning,
    Guard,
    GuardWarning,
    NonFinite,
    Position,
    SinkWarning,
    Verdict,
)
from lightning_gradguard.report.alerting import notice

OFF = {"nonfinite": None, "explosion": None, "vanishing": None, "overflow": None}


class Loop:
    """A linear model whose gradient's norm is set from outside."""

    def __init__(self, **settings):
        self.model = torch.nn.Linear(4, 1, bias=False)
        self.optimizer = SGD(self.model.parameters(), lr=0.0)
        self.guard = Guard(self.model.named_parameters(), self.optimizer, **settings)

    def step(self, norm):
        """One step on a gradient of this norm."""
        self.optimizer.zero_grad()
        loss = norm * self.model(torch.full((1, 4), 0.5)).sum()
        loss.backward()
        record = self.guard.step()
        self.optimizer.step()
        return record

    def steps(self, norms):
        """The records of several steps."""
        return [self.step(float(norm)) for norm in norms]


def test_step_healthy_records_norms_and_does_nothing():
    """No verdict, no alert, no clipping; the record is kept as the last."""
    loop = Loop()
    record = loop.step(3.0)
    assert record.measurement.global_norm == pytest.approx(3.0)
    assert record.measurement.by_name == pytest.approx({"weight": 3.0})
    assert record.verdicts == record.alerts == ()
    assert record.decision.action is None
    assert (record.clip_coef, record.clipped_norm) == (1.0, record.measurement.global_norm)
    assert record.explosion_limit == math.inf
    assert loop.guard.last is record
    assert loop.guard.totals.num_steps == 1


def test_step_with_a_number_to_clip_clips_the_norm():
    """The optimizer sees what was recorded."""
    loop = Loop(clip=1.0)
    record = loop.step(4.0)
    assert record.measurement.global_norm == pytest.approx(4.0)
    assert record.clipped_norm == pytest.approx(1.0, rel=1e-5)
    assert record.clip_coef == pytest.approx(0.25, rel=1e-5)
    assert loop.model.weight.grad.norm().item() == pytest.approx(1.0, rel=1e-5)
    assert loop.guard.totals.num_clipped == 1


def test_step_below_the_limit_is_not_counted_as_clipped():
    """Only steps whose gradients were made smaller count."""
    loop = Loop(clip=ClipNorm(10.0))
    loop.step(4.0)
    assert loop.guard.totals.num_clipped == 0


def test_step_skipped_is_not_clipped():
    """The norm after is the norm before, and the factor 1."""
    loop = Loop(clip=ClipValue(0.1))
    with pytest.warns(GradientWarning, match="nonfinite|Nonfinite"):
        record = loop.step(math.inf)
    assert record.clip_coef == 1.0
    assert (loop.guard.totals.num_skipped, loop.guard.totals.num_clipped) == (1, 0)


@pytest.mark.parametrize("norm", [1e20, 1e30])
def test_step_norm_overflows_is_explosion_and_clipped_exactly(norm):
    """Finite gradients whose squares overflow: no NaN alarm, and a clip that leaves the direction."""
    loop = Loop(clip=1.0)
    with pytest.warns(GradientWarning, match="Explosion"):
        record = loop.step(norm)
    assert record.measurement.global_norm == pytest.approx(norm, rel=1e-6)
    assert [alert.kind for alert in record.alerts] == ["explosion"]
    assert loop.model.weight.grad.flatten().tolist() == pytest.approx([0.5] * 4, rel=1e-5)
    assert record.clipped_norm == pytest.approx(1.0, rel=1e-5)


@pytest.mark.parametrize("action", ["log", "warn"])
def test_step_nonfinite_let_through_is_not_spread_by_clipping(action):
    """[1, inf, 2] stays so; torch would make [0, nan, 0] of it."""
    parameter = torch.nn.Parameter(torch.zeros(3))
    guard = Guard([("p", parameter)], clip=1.0, nonfinite=action, sinks=[])
    parameter.grad = torch.tensor([1.0, math.inf, 2.0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GradientWarning)
        guard.step()
    assert parameter.grad.tolist() == [1.0, math.inf, 2.0]


def test_step_everything_off_only_measures():
    """NaN passes, unreported, where the user wants it so."""
    record = Loop(**OFF).step(math.nan)
    assert record.verdicts == ()
    assert math.isnan(record.measurement.global_norm)
    assert record.explosion_limit == math.inf


def test_step_without_gradients_survives():
    """A batch may be left out."""
    loop = Loop(clip=1.0, histogram_every_n_steps=1)
    record = loop.guard.step()
    assert record.measurement.global_norm == 0.0
    assert record.histograms is None or record.histograms.names == ()


def test_step_log_action_goes_to_the_logger(caplog):
    """No warning for it."""
    with caplog.at_level(logging.INFO, logger="lightning_gradguard"):
        record = Loop(nonfinite="log").step(math.nan)
    assert "Logged only." in caplog.text
    assert not record.decision.skip


def test_step_raise_carries_the_alert_and_applies_nothing():
    """The error is picklable, and the gradients are gone."""
    loop = Loop(nonfinite="raise")
    with pytest.warns(GradientWarning, match="ends with an error"), pytest.raises(GradientError, match="NaN") as caught:
        loop.step(math.nan)
    assert caught.value.alert is loop.guard.alerts[0]
    assert loop.model.weight.grad is None
    assert loop.guard.stopped_by is caught.value.alert
    assert loop.guard.last.alerts == (caught.value.alert,)
    again = pickle.loads(pickle.dumps(caught.value))
    assert repr(again.alert) == repr(caught.value.alert)
    assert str(again) == str(caught.value)


def test_step_stop_sets_stopped_by_and_skips():
    """The first alert that asked for the end stays the reason."""
    loop = Loop(nonfinite="stop")
    loop.step(1.0)
    with pytest.warns(GradientWarning, match="training stops"):
        record = loop.step(math.nan)
    assert record.decision.skip
    assert loop.guard.stopped_by is record.alerts[0]
    assert loop.guard.stopped_by.step == 1
    with pytest.warns(GradientWarning, match="training stops"):
        loop.step(math.nan)
    assert loop.guard.stopped_by is record.alerts[0]


def test_step_stop_after_hits_in_a_row_stops():
    """Five by default: then it is not one bad batch."""
    loop = Loop()
    with pytest.warns(GradientWarning, match="NaN"):
        records = loop.steps([math.nan] * 5)
    assert [record.decision.action.value for record in records] == ["skip"] * 4 + ["stop"]
    assert loop.guard.stopped_by.step == 4


def test_step_repeats_in_cooldown_are_counted_not_reported():
    """They are skipped all the same."""
    loop = Loop(nonfinite=NonFinite("skip", cooldown=2))
    with pytest.warns(GradientWarning, match="step 0") as caught:
        loop.steps([math.nan] * 3)
    assert len(caught) == 1
    totals = loop.guard.totals
    assert (totals.num_alerts, totals.num_repeats, totals.num_skipped) == (1, 2, 3)
    assert totals.alerts_by_kind == {"nonfinite": 1}


def test_step_alert_names_position_parameter_and_remedy():
    """What a person needs, in one sentence, and what to try."""
    loop = Loop()
    loop.step(1.0)
    with pytest.warns(GradientWarning, match=r"Nonfinite at step 1: the gradient of `weight` has 4 NaN"):
        (alert,) = loop.step(math.nan).alerts
    assert (alert.step, alert.kind, alert.epoch, alert.micro_batch, alert.rank) == (1, "nonfinite", None, 0, 0)
    assert [(p.name, p.num_nan, p.num_inf) for p in alert.parameters] == [("weight", 4, 0)]
    assert "learning rate" in alert.remedy


@pytest.mark.parametrize("bad", [0, 1, 2])
def test_micro_batches_alert_names_the_one_that_made_the_nan(bad):
    """Three backward passes make a step."""
    loop = Loop()
    loop.optimizer.zero_grad()
    for micro in range(3):
        loss = loop.model(torch.full((1, 4), math.nan if micro == bad else 1.0)).sum()
        loop.guard.before_backward(loss)
        loss.backward()
    with pytest.warns(GradientWarning, match="NaN"):
        (alert,) = loop.guard.step().alerts
    assert alert.micro_batch == bad


@pytest.mark.parametrize("bad", [0, 1, 2])
def test_micro_batches_nan_made_in_the_backward_pass_is_named(bad):
    """Each loss is finite; the gradients between the passes tell."""
    loop = Loop()
    loop.optimizer.zero_grad()
    for micro in range(3):
        out = loop.model(torch.ones(1, 4)).sum()
        loss = torch.where(torch.tensor(micro == bad), 0.0, out) + (torch.sqrt(out * 0.0) if micro == bad else 0.0)
        assert loss.isfinite()
        loop.guard.before_backward(loss)
        loss.backward()
    with pytest.warns(GradientWarning, match="NaN"):
        (alert,) = loop.guard.step().alerts
    assert alert.micro_batch == bad


def test_micro_batches_of_the_last_step_are_forgotten():
    """Each step starts its own count."""
    loop = Loop()
    for _ in range(2):
        loop.guard.before_backward(torch.tensor(1.0))
    loop.step(1.0)
    loop.guard.before_backward(torch.tensor(1.0))
    assert loop.step(1.0).measurement.num_micro_batches == 1


def test_backward_passes_of_another_optimizer_do_not_count():
    """A pass that left this optimizer's gradients as they were says nothing about its step."""
    loop = Loop()
    loop.model.zero_grad()
    loop.guard.before_backward(torch.tensor(math.nan))
    loss = loop.model(torch.ones(1, 4)).sum()
    loop.guard.before_backward(loss)
    loss.backward()
    record = loop.guard.step(Position(step=0, num_optimizers=2))
    assert record.alerts == ()
    assert record.measurement.loss == pytest.approx(loss.item())


def test_loss_nan_with_finite_gradients_is_caught():
    """`loss + nan` has the gradient of `loss`."""
    loop = Loop()
    loss = loop.model(torch.ones(1, 4)).sum() + math.nan
    loop.guard.before_backward(loss)
    loss.backward()
    assert loop.model.weight.grad.isfinite().all()
    with pytest.warns(GradientWarning, match=r"the loss is nan.* although every gradient is finite"):
        record = loop.guard.step()
    assert record.decision.skip
    assert math.isnan(record.alerts[0].value)


def test_loss_that_is_no_scalar_or_unknown_is_not_looked_at():
    """A backward pass may start from anything."""
    loop = Loop()
    loop.guard.before_backward(torch.full((3,), math.nan))
    assert loop.step(1.0).alerts == ()
    loop.guard.before_backward()
    assert loop.step(1.0).alerts == ()


def test_scaler_in_a_raw_loop_measures_true_gradients():
    """The guard unscales before it looks, and the scaler does not do it twice."""
    loop = Loop()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    loop.guard = Guard(loop.model.named_parameters(), loop.optimizer, scaler=scaler, clip=1.0)
    loss = scaler.scale(3.0 * loop.model(torch.full((1, 4), 0.5)).sum())
    loop.guard.before_backward(loss)
    loss.backward()
    record = loop.guard.step()
    scaler.step(loop.optimizer)
    scaler.update()
    assert record.measurement.global_norm == pytest.approx(3.0)
    assert record.measurement.loss == pytest.approx(loss.item() / 1024.0)
    assert record.measurement.loss_scale == 1024.0
    assert record.clipped_norm == pytest.approx(1.0, rel=1e-5)


class Broken:
    """A sink on a full disk."""

    def write(self, record):
        raise OSError("No space left on device")

    def close(self):
        raise OSError("still none")

    def __repr__(self):
        return "Broken()"


def test_sink_failing_warns_once_and_training_goes_on():
    """At each write and at the end; the sinks behind it get everything."""
    seen = []
    loop = Loop(sinks=[Broken(), seen.append])
    with pytest.warns(SinkWarning, match=r"Broken\(\) failed \(OSError: No space left") as caught:
        loop.steps([1.0, 1.0, 1.0])
    loop.guard.close()
    assert len(caught) == 1
    assert len(seen) == 3


def test_sink_closed_takes_later_records():
    """A guard can be used on after `close`."""
    seen = []
    loop = Loop(sinks=[seen.append])
    loop.step(1.0)
    loop.guard.close()
    loop.step(1.0)
    assert len(seen) == 2


def test_sinks_scalars_and_histograms_are_due_at_their_intervals():
    """Counted as Lightning counts: at the end of each interval."""
    loop = Loop(log_every_n_steps=2, histogram_every_n_steps=3)
    records = loop.steps([1.0] * 6)
    assert [record.scalars_due for record in records] == [False, True] * 3
    assert [record.histograms is not None for record in records] == [False, False, True] * 2
    assert records[2].histograms.names == ("weight",)


def test_sinks_intervals_off_are_never_due():
    """0 scalars, no histograms."""
    records = Loop(log_every_n_steps=0, histogram_every_n_steps=None).steps([1.0] * 4)
    assert not any(record.scalars_due or record.histograms for record in records)


@pytest.mark.smoke
def test_notice_reaches_alerts_and_sinks():
    """What is no finding about gradients."""
    seen = []
    loop = Loop(sinks=[seen.append])
    loop.step(1.0)
    alert = notice(Position(0), "checkpoint", Action.LOG, "It is late.", "Hurry.")
    loop.guard.notify(alert)
    assert loop.guard.alerts == [alert]
    assert seen[-1].alerts == (alert,)


def test_explosion_spike_is_found_and_skipped():
    """A hundred times the usual, after the warm-up; the limit was known before."""
    loop = Loop(explosion="skip")
    *_, before, spike, after = loop.steps([*np.linspace(1.0, 1.2, 30), 100.0, 1.0])
    with_limit = before.explosion_limit
    assert 5.0 < with_limit < 20.0
    assert spike.decision.skip
    assert spike.verdicts[0].limit == spike.explosion_limit
    assert not after.decision.skip


pytestmark = pytest.mark.filterwarnings("ignore::lightning_gradguard.GradientWarning")


def test_explosion_lasting_shift_is_taken_for_normal_after_a_while():
    """Twenty hits in a row are a change of the data; then the new level is the history."""
    loop = Loop(explosion=Explosion("skip", adapt_after=20))
    records = loop.steps([1.0] * 30 + [100.0] * 30 + [1e4])
    skipped = [record.decision.skip for record in records]
    assert skipped[30:50] == [True] * 20
    assert skipped[50:60] == [False] * 10
    assert skipped[60]


def test_explosion_that_ends_the_training_never_adapts():
    """Where the action is "stop", the guard does not get used to it."""
    loop = Loop(explosion=Explosion("stop", adapt_after=5))
    assert all(record.decision.skip for record in loop.steps([1.0] * 30 + [100.0] * 20)[30:])


def test_explosion_falling_norm_raises_no_alarm():
    """Down by twelve decades, slowly and at once."""
    slow = Loop(vanishing=None).steps(10.0 ** -np.linspace(0, 12, 150))
    fast = Loop(vanishing=None).steps([1.0] * 30 + [1e-8] * 30)
    assert not any(record.verdicts for record in slow + fast)


def test_explosion_loss_times_a_constant_changes_no_verdict():
    """A sum where there was a mean: the same steps are found."""
    rng = np.random.default_rng(0)
    norms = np.exp(rng.normal(0, 0.3, 120))
    norms[[40, 41, 80, 100]] *= 200.0
    plain = [record.decision.skip for record in Loop(explosion="skip").steps(norms)]
    scaled = [record.decision.skip for record in Loop(explosion="skip").steps(1000.0 * norms)]
    assert plain == scaled
    assert [step for step, skip in enumerate(plain) if skip] == [40, 41, 80, 100]


@pytest.mark.parametrize("sigma", [0.0, 0.1, 0.5])
def test_explosion_long_healthy_noise_raises_no_alarm(sigma):
    """Log-normal norms over 300 steps, with a slow drift."""
    rng = np.random.default_rng(1)
    norms = np.exp(rng.normal(0, sigma, 300) + np.linspace(1, -1, 300))
    assert not any(record.verdicts for record in Loop().steps(norms))


@pytest.mark.smoke
def test_detector_of_the_users_own_acts_beside_the_three():
    """By its name in the alerts, with its action."""

    class Small(Detector):
        name = "small"

        def observe(self, measurement):
            norm = measurement.global_norm
            return Verdict(self.name, norm, 0.5, "the norm is small", "do more") if norm < 0.5 else None

    loop = Loop(detectors=[Small("skip")])
    records = loop.steps([1.0, 0.1])
    assert [record.decision.skip for record in records] == [False, True]
    assert [alert.kind for alert in loop.guard.alerts] == ["small"]


@pytest.mark.parametrize("split", [5, 31, 45])
def test_state_resumed_run_decides_as_one_that_ran_through(split):
    """Baselines, streaks, cooldowns and counts, through a checkpoint."""
    norms = np.exp(np.random.default_rng(3).normal(0, 0.3, 80))
    norms[[30, 32, 33, 44, 46, 60]] *= 100.0
    norms[[31, 45, 70]] = math.nan
    settings = {"explosion": "skip", "nonfinite": "skip", "clip": 1.5}
    through, resumed = Loop(**settings), Loop(**settings)
    through.steps(norms[:split])
    resumed.guard.load_state_dict(through_checkpoint(through.guard.state_dict()))
    expected, told = through.steps(norms[split:]), resumed.steps(norms[split:])
    for a, b in zip(expected, told, strict=True):
        assert a.decision == b.decision
        assert a.explosion_limit == b.explosion_limit
        assert (a.totals, a.position, a.clip_coef) == (b.totals, b.position, b.clip_coef)
    assert resumed.guard.state_dict() == through.guard.state_dict()


def test_state_of_another_configuration_starts_afresh_with_a_warning():
    """A detector that was off, and a clipper of another kind."""
    saved = Loop(explosion=None, clip=ClipNorm(1.0)).guard.state_dict()
    with pytest.warns(GuardWarning) as caught:
        Loop(clip=ClipValue(1.0)).guard.load_state_dict(saved)
    messages = sorted(str(warning.message) for warning in caught)
    assert "holds ClipNorm for the clipper, which is ClipValue now" in messages[0]
    assert "holds nothing for the detector `explosion`" in messages[1]


def test_parameters_added_later_are_watched():
    """A group added to the optimizer is in the next measurement."""
    model = mlp(3, 4, 2)
    optimizer = SGD(model[2].parameters(), lr=0.1)
    guard = Guard(model.named_parameters(), optimizer)
    model(torch.ones(1, 3)).sum().backward()
    assert guard.step().measurement.names == ("2.weight", "2.bias")
    optimizer.add_param_group({"params": list(model[0].parameters())})
    assert guard.step().measurement.names == ("0.weight", "0.bias", "2.weight", "2.bias")
