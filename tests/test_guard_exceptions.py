"""`Guard.watch_step`: exceptions that NaN is the reason of, in a loop without a Trainer."""

from __future__ import annotations

import sys

import pytest
import torch

from lightning_gradguard import GradientError, Guard

pytestmark = pytest.mark.filterwarnings("ignore")

BAD, ROW = 2, 3
HAS_NOTES = sys.version_info >= (3, 11)


class _Loop:
    """Five batches, of which one has NaN in a row."""

    def __init__(self, **settings):
        torch.manual_seed(0)
        self.model = torch.nn.Linear(6, 4)
        self.optimizer = torch.optim.Adam(self.model.parameters())
        self.batches = [torch.randn(8, 6) for _ in range(5)]
        self.batches[BAD][ROW, 1] = torch.nan
        self.batch = self.batches[0]
        self.is_bad_code = False
        settings = {"replay": lambda: self.loss(self.batch), **settings}
        self.guard = Guard(self.model.named_parameters(), self.optimizer, **settings)

    def loss(self, x):
        if self.is_bad_code and bool(x.isnan().any()):
            raise KeyError("missing")
        return -torch.distributions.Normal(self.model(x), 1.0).log_prob(torch.zeros(8, 4)).mean()

    def run(self, **watching):
        for batch in self.batches:
            self.batch = batch
            with self.guard.watch_step(**watching):
                self.optimizer.zero_grad()
                self.loss(self.batch).backward()
                self.guard.step()
                self.optimizer.step()


def test_exception_of_torch_is_a_skipped_step():
    """The loop goes on."""
    loop = _Loop()
    loop.run()
    assert (loop.guard.totals.num_steps, loop.guard.totals.num_skipped) == (5, 1)
    (alert,) = loop.guard.alerts
    assert (alert.step, alert.culprit.samples) == (BAD, (ROW,))


@pytest.mark.parametrize(("settings", "watching"), [({"nonfinite": "warn"}, {}), ({}, {"skip_exceptions": None})])
def test_exception_passes_on_with_an_alert_where_nothing_is_skipped(settings, watching):
    """It is the one that was raised."""
    loop = _Loop(**settings)
    with pytest.raises(ValueError, match="to satisfy the constraint"):
        loop.run(**watching)
    (alert,) = loop.guard.alerts
    assert alert.message.endswith("The exception passes on.")


def test_exception_of_others_passes_on():
    """It is a decision of its author."""
    loop = _Loop()
    loop.is_bad_code = True
    with pytest.raises(KeyError):
        loop.run()
    assert len(loop.guard.alerts) == 1


def test_exception_of_the_first_step_is_told_before_there_is_a_record():
    """Nothing has been measured yet."""
    loop = _Loop(nonfinite="warn")
    loop.batches = loop.batches[BAD:]
    with pytest.raises(ValueError, match="to satisfy the constraint"):
        loop.run()
    (alert,) = loop.guard.alerts
    assert (alert.step, loop.guard.num_steps) == (0, 0)
    assert loop.guard.last.measurement.num_micro_batches == 0


def test_exception_is_not_told_where_nobody_looks_for_damage():
    """It passes on as it is."""
    loop = _Loop(nonfinite=None)
    with pytest.raises(ValueError, match="to satisfy the constraint"):
        loop.run()
    assert loop.guard.alerts == []


def test_guards_own_error_passes_through():
    """It has said what there is to say."""
    loop = _Loop(nonfinite="raise")
    loop.loss = lambda x: loop.model(x).square().mean()
    with pytest.raises(GradientError):
        loop.run()
    assert len(loop.guard.alerts) == 1


def test_exception_whose_replay_can_not_be_begun_is_untouched():
    """What was raised first matters more."""
    loop = _Loop(replay=lambda: torch.zeros(()))  # refers to no module
    with pytest.raises(ValueError, match="to satisfy the constraint"):
        loop.run()
    assert loop.guard.alerts == []


def test_exception_that_does_not_come_again_is_untouched():
    """Whatever it was, it is not known to be the damage."""
    loop = _Loop()
    raised = []

    def loss(x):
        if bool(x.isnan().any()) and not raised:
            raised.append(1)
            raise KeyError("once")
        return loop.model(x).square().mean()

    loop.loss = loss
    with pytest.raises(KeyError, match="once"):
        loop.run()
    assert loop.guard.alerts == []


def test_exception_without_damage_is_untouched():
    """Nothing is said."""
    loop = _Loop()
    loop.batches[1] = torch.randn(8, 5)
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        loop.run()
    assert loop.guard.alerts == []


def test_step_of_a_function_is_watched_by_a_decorator():
    """Each call is a step."""
    loop = _Loop()

    @loop.guard.watch_step()
    def step():
        loop.optimizer.zero_grad()
        loop.loss(loop.batch).backward()
        loop.guard.step()
        loop.optimizer.step()

    for batch in loop.batches:
        loop.batch = batch
        step()
    assert (loop.guard.totals.num_steps, loop.guard.totals.num_skipped) == (5, 1)


def test_exception_without_replay_passes_on_with_what_is_seen():
    """Which is the variable that torch has refused; and how to learn more."""
    loop = _Loop()
    guard = loop.guard = Guard(loop.model.named_parameters(), loop.optimizer)
    with pytest.raises(ValueError, match="to satisfy the constraint") as caught:
        loop.run()
    (alert,) = guard.alerts
    assert "was raised, and `value` in `__init__` holds NaN. The exception passes on." in alert.message
    assert "replay=" in alert.remedy
    assert not HAS_NOTES or caught.value.__notes__ == [alert.message]


def test_exception_that_does_not_speak_of_nan_is_untouched_without_replay():
    """Nobody knows what its reason is."""
    loop = _Loop()
    loop.is_bad_code = True
    loop.guard = Guard(loop.model.named_parameters(), loop.optimizer)
    with pytest.raises(KeyError):
        loop.run()
    assert loop.guard.alerts == []


def test_lost_gpu_is_noted():
    """Nothing can be run again after it."""
    loop = _Loop()
    error = RuntimeError("CUDA error: device-side assert triggered")
    with pytest.raises(RuntimeError, match="device-side assert") as caught, loop.guard.watch_step():
        raise error
    assert loop.guard.alerts == []
    assert not HAS_NOTES or "can't be replayed" in caught.value.__notes__[0]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3), MemoryError(), StopIteration()])
def test_exception_that_is_no_failure_is_untouched(error):
    """Though there is NaN."""
    loop = _Loop()
    loop.batch = loop.batches[BAD]
    with pytest.raises(type(error)), loop.guard.watch_step():
        raise error
    assert loop.guard.alerts == []


def test_gradients_after_a_step_that_raised_are_unscaled():
    """The scaler does not take them for those of the step that was given up."""
    loop = _Loop()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    loop.guard = guard = Guard(
        loop.model.named_parameters(), loop.optimizer, scaler=scaler, replay=lambda: loop.loss(loop.batch)
    )
    norms = []
    for batch in loop.batches:
        loop.batch = batch
        with guard.watch_step():
            # Gradients of the step before are there until they have been replaced.
            loss = loop.loss(loop.batch)
            loop.optimizer.zero_grad()
            scaler.scale(loss).backward()
            norms.append(guard.step().measurement.global_norm)
            scaler.step(loop.optimizer)
            scaler.update()
    assert guard.totals.num_skipped == 1
    assert len(norms) == 4
    assert max(norms) < 10 * min(norms)
