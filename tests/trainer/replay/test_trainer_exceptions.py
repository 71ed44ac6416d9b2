"""Training steps that end in an exception: told of where NaN or Inf is the reason, and passed over where that is safe."""

from __future__ import annotations

import sys

import pytest
import torch
from lightning_package import Callback, EarlyStopping, MisconfigurationException, MixedPrecision
from raisers import BY_OTHERS, BY_TORCH, NO_FAILURES, Raising, inverse, lost_gpu, normal
from toys import Batches, Snapshots, make_trainer, same

from lightning_gradguard import GradGuard

pytestmark = pytest.mark.filterwarnings("ignore")

BAD, ROW = 3, 2


def _batches(*bad, count=6):
    generator = torch.Generator().manual_seed(1)
    made = [torch.randn(8, 6, generator=generator) for _ in range(count)]
    for number in bad:
        made[number][ROW, 0] = torch.nan
    return Batches(made)


def _train(root, end, guard, *callbacks, data=None, **settings):
    trainer = make_trainer(root, guard, *callbacks, **settings)
    trainer.fit(Raising(end), _batches(BAD) if data is None else data)
    return trainer


@pytest.mark.smoke
@pytest.mark.parametrize("end", BY_TORCH.values(), ids=list(BY_TORCH))
def test_exception_of_torch_is_passed_over_as_a_skipped_step(end, tmp_path):
    """An alert with the row, nothing applied, one step skipped, and the fit goes to its end."""
    guard, kept = GradGuard(), Snapshots()
    trainer = _train(tmp_path, end, guard, kept)
    (alert,) = guard.alerts
    assert (alert.kind, alert.step, alert.batch_idx) == ("nonfinite", BAD, BAD)
    # Where samples meet in a matrix, which is whose is a guess.
    assert (alert.culprit.samples or alert.culprit.probable_samples) == (ROW,)
    assert "NaN or Inf is the reason of `" in alert.message or end is inverse  # which gives NaN without an error
    assert "The step is skipped." in alert.message
    assert same(kept.weights[BAD], kept.weights[BAD - 1])
    assert same(kept.optimizers[BAD], kept.optimizers[BAD - 1])
    assert not same(kept.weights[BAD + 1], kept.weights[BAD])
    assert (trainer.global_step, guard.num_steps) == (6, 6)
    assert guard.num_skipped == 1


@pytest.mark.parametrize("end", BY_OTHERS.values(), ids=list(BY_OTHERS))
def test_exception_of_others_passes_on_with_alert_and_note(end, tmp_path):
    """It is a decision of its author."""
    guard = GradGuard()
    with pytest.raises((AssertionError, ValueError, RuntimeError)) as caught:
        _train(tmp_path, end, guard)
    (alert,) = guard.alerts
    assert alert.culprit.samples == (ROW,)
    assert "The exception passes on." in alert.message
    assert alert.action.value == "warn"
    if sys.version_info >= (3, 11):
        assert caught.value.__notes__ == [alert.message]
    assert caught.traceback[-1].name == end.__name__


@pytest.mark.parametrize("end", BY_OTHERS.values(), ids=list(BY_OTHERS))
def test_exception_of_others_is_passed_over_where_all_are(end, tmp_path):
    """One setting lets users say so."""
    guard = GradGuard(skip_exceptions="all")
    assert _train(tmp_path, end, guard).global_step == 6
    assert guard.num_skipped == 1


@pytest.mark.parametrize("settings", [{"skip_exceptions": None}, {"nonfinite": "warn"}, {"nonfinite": "raise"}])
def test_exception_passes_on_where_the_action_does_not_skip(settings, tmp_path):
    """The alert comes all the same; the exception is the one that was raised."""
    guard = GradGuard(**settings)
    with pytest.raises(ValueError, match="to satisfy the constraint"):
        _train(tmp_path, normal, guard)
    assert guard.alerts[0].culprit.samples == (ROW,)
    assert "The exception passes on." in guard.alerts[0].message


@pytest.mark.parametrize("settings", [{"nonfinite": None}, {"max_replays": 0}])
def test_exception_is_untouched_where_nobody_looks(settings, tmp_path):
    """Without the detector, or without replays, nothing can be said."""
    guard = GradGuard(**settings)
    with pytest.raises(ValueError, match="to satisfy the constraint") as caught:
        _train(tmp_path, normal, guard)
    assert guard.alerts == []
    assert not getattr(caught.value, "__notes__", [])


def _unrelated(module, x, h):
    if module.trainer.global_step == BAD:
        raise IndexError("index 9 is out of range")
    return h.nan_to_num().mean()


def test_exception_with_another_reason_is_untouched(tmp_path):
    """There is NaN in the batch, but it is not why."""
    guard = GradGuard(skip_exceptions="all")
    with pytest.raises(IndexError) as caught:
        _train(tmp_path, _unrelated, guard)
    assert [it for it in guard.alerts if "reason" in it.message] == []
    assert not getattr(caught.value, "__notes__", [])


def test_exception_in_a_micro_batch_spoils_its_step_once(tmp_path):
    """Two of a step's four micro-batches raise: one step is skipped, and the next is applied."""
    guard, kept = GradGuard(), Snapshots()
    trainer = _train(tmp_path, normal, guard, kept, data=_batches(1, 3, count=8), accumulate_grad_batches=4)
    assert (trainer.global_step, guard.num_steps, guard.num_skipped) == (2, 2, 1)
    assert [(alert.batch_idx, alert.micro_batch) for alert in guard.alerts] == [(1, 1)]
    assert same(kept.weights[3], kept.weights[-1])
    assert not same(kept.weights[7], kept.weights[3])


def test_exceptions_in_a_row_stop_the_training(tmp_path):
    """`stop_after` counts them as it counts skipped steps."""
    guard = GradGuard()
    trainer = _train(tmp_path, normal, guard, data=_batches(*range(10), count=10))
    assert guard.stopped_by is not None
    assert trainer.global_step == 5


def test_fit_leaves_the_loops_their_own_methods(tmp_path):
    """Nothing of the guard stays on the Trainer."""
    trainer = _train(tmp_path, normal, GradGuard())
    loop = trainer.fit_loop.epoch_loop
    assert "run" not in vars(loop.automatic_optimization)
    assert "run" not in vars(loop.manual_optimization)


class Manual(Raising):
    """Steps before what raises, or after."""

    def __init__(self, end, *, steps_first):
        super().__init__(end)
        self.automatic_optimization = False
        self.steps_first = steps_first

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        for _ in range(1 + self.steps_first):
            optimizer.zero_grad()
            h = self.layer(batch if self.end is not None and not self.steps_first else batch.nan_to_num())
            loss = h.mean()
            if not self.steps_first:
                loss = self.end(self, batch, h)
            self.manual_backward(loss)
            optimizer.step()
        if self.steps_first:
            self.end(self, batch, self.layer(batch))


@pytest.mark.parametrize("steps_first", [False, True])
def test_exception_under_manual_optimization_is_passed_over_before_any_step_only(steps_first, tmp_path):
    """What has been applied can't be taken back."""
    guard = GradGuard()
    trainer = make_trainer(tmp_path, guard)
    module = Manual(normal, steps_first=steps_first)
    if steps_first:
        with pytest.raises(ValueError, match="to satisfy the constraint"):
            trainer.fit(module, _batches(BAD))
    else:
        trainer.fit(module, _batches(BAD))
        assert guard.num_skipped == 1
    assert [alert.culprit.samples for alert in guard.alerts] == [(ROW,)]


def test_loss_without_a_graph_is_the_trainers_own_error(tmp_path):
    """Nothing is said of it."""
    guard = GradGuard(skip_exceptions="all")
    trainer = make_trainer(tmp_path, guard)
    module = Raising(normal)
    module.training_step = lambda batch, batch_idx: torch.ones(())
    with pytest.raises(RuntimeError, match="does not require grad"):
        trainer.fit(module, _batches())
    assert guard.alerts == []


@pytest.mark.parametrize("value", ["never", True])
def test_skip_exceptions_of_a_wrong_value_is_refused(value):
    """With what it may be."""
    with pytest.raises(ValueError, match="`skip_exceptions`"):
        GradGuard(skip_exceptions=value)


class _Anomalous(Raising):
    """NaN, or a root of 0 whose gradient is NaN; the backward pass is checked by torch."""

    def __init__(self, *, manual):
        super().__init__(None)
        self.automatic_optimization = not manual

    def training_step(self, batch, batch_idx):
        h = self.layer(batch)
        loss = ((h * 0 + batch[:, :1].square()).sqrt() * h).mean()
        if self.automatic_optimization:
            return loss
        optimizer = self.optimizers()
        optimizer.zero_grad()
        with torch.autograd.detect_anomaly(check_nan=True):
            self.manual_backward(loss)
        optimizer.step()
        return None


@pytest.mark.parametrize("value", [torch.nan, 0.0])
@pytest.mark.parametrize("manual", [False, True])
def test_exception_of_the_anomaly_detector_is_passed_over(value, manual, tmp_path):
    """Lightning's and torch's own; the detector is as it was, and the run is the one of a batch that is left out."""
    data = _batches()
    data.batches[BAD][ROW, 0] = value
    guard, kept = GradGuard(), Snapshots()
    trainer = make_trainer(tmp_path, guard, kept, detect_anomaly=not manual)
    trainer.fit(_Anomalous(manual=manual), data)
    (alert,) = guard.alerts
    assert 'returned nan values in its 0th output"' in alert.message
    assert alert.culprit.samples == (ROW,)
    assert same(kept.weights[BAD], kept.weights[BAD - 1])
    assert not same(kept.weights[BAD + 1], kept.weights[BAD])
    assert guard.num_skipped == 1
    assert not torch.is_anomaly_enabled()


def test_exception_of_the_anomaly_detector_passes_on_where_nothing_is_skipped(tmp_path):
    """With alert and note."""
    guard = GradGuard(nonfinite="warn")
    data = _batches(BAD)
    with pytest.raises(RuntimeError, match="returned nan values") as caught:
        make_trainer(tmp_path, guard, detect_anomaly=True).fit(_Anomalous(manual=False), data)
    assert [alert.culprit.samples for alert in guard.alerts] == [(ROW,)]
    if sys.version_info >= (3, 11):
        assert caught.value.__notes__ == [guard.alerts[0].message]


@pytest.mark.parametrize("end", NO_FAILURES.values(), ids=list(NO_FAILURES))
def test_exception_that_is_no_failure_is_untouched(end, tmp_path):
    """An end that was asked for is one, though there is NaN; Lightning turns Ctrl-C into an exit of its own."""
    guard = GradGuard(skip_exceptions="all")
    with pytest.raises((SystemExit, MisconfigurationException, torch.OutOfMemoryError)) as caught:
        _train(tmp_path, end, guard)
    assert guard.alerts == []
    assert not getattr(caught.value, "__notes__", [])


class _Broken(Batches):
    """A loader that fails in the middle of an epoch."""

    def __iter__(self):
        yield from self.batches[:BAD]
        raise OSError("no such file")


def test_exception_of_the_loader_is_untouched(tmp_path):
    """It is no training step's."""
    guard = GradGuard(skip_exceptions="all")
    with pytest.raises(OSError, match="no such file"):
        _train(tmp_path, normal, guard, data=_Broken(_batches().batches))
    assert (guard.num_steps, guard.alerts) == (BAD, [])


class _Worker(torch.utils.data.Dataset):
    """One of its samples can't be read."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        if index == 2:
            raise ValueError("NaN in sample 2")
        return torch.randn(6)


def test_exception_of_a_loaders_worker_is_untouched(tmp_path):
    """It comes from another process, as the worker wrote it."""
    guard = GradGuard(skip_exceptions="all")
    loader = torch.utils.data.DataLoader(_Worker(), num_workers=1)
    with pytest.raises(ValueError, match="Caught ValueError in DataLoader worker process 0"):
        _train(tmp_path, normal, guard, data=loader)
    assert guard.alerts == []


class _Logged(Raising):
    """Its loss is what the Trainer stops by."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("loss", loss)
        return loss


def test_early_stopping_of_a_loss_that_is_nan_is_not_held_up(tmp_path):
    """`check_finite` asks for the end; the guard has skipped the step all the same."""
    guard = GradGuard()
    stopping = EarlyStopping("loss", check_finite=True, check_on_train_epoch_end=True)
    trainer = make_trainer(tmp_path, guard, stopping, max_epochs=3)
    trainer.fit(_Logged(lambda module, x, h: h.square().mean()), _batches(5))
    assert (trainer.global_step, guard.num_skipped) == (6, 1)  # of three epochs, the first


@pytest.mark.parametrize(
    ("value", "match"), [(None, None), (torch.ones(2), "only for scalar outputs"), ("loss", "must return a Tensor")]
)
def test_loss_of_a_wrong_kind_is_the_trainers_own_affair(value, match, tmp_path):
    """None passes over the batch, as without a guard; the others are Lightning's or torch's own errors."""
    guard = GradGuard(skip_exceptions="all")
    module = Raising(normal)
    given = value * module.layer.weight.sum() if isinstance(value, torch.Tensor) else value
    module.training_step = lambda batch, batch_idx: given
    trainer = make_trainer(tmp_path, guard)
    if match is None:
        trainer.fit(module, _batches(BAD))
    else:
        with pytest.raises((RuntimeError, MisconfigurationException), match=match):
            trainer.fit(module, _batches(BAD))
    assert guard.alerts == []


def test_exception_of_a_step_that_has_used_up_its_batch_is_untouched(tmp_path):
    """It can't be run again."""

    class Consumes(Raising):
        def training_step(self, batch, batch_idx):
            return super().training_step(next(batch), batch_idx)

    guard = GradGuard()
    batches = Batches([iter([batch]) for batch in _batches(BAD).batches])
    with pytest.raises(ValueError, match="to satisfy the constraint") as caught:
        make_trainer(tmp_path, guard).fit(Consumes(normal), batches)
    assert guard.alerts == []
    assert not getattr(caught.value, "__notes__", [])


def test_exception_of_a_step_that_is_another_each_time_is_blamed_on_what_its_first_replay_shows(tmp_path):
    """The one that follows the rows sees another reason, which is not mixed with it."""
    seen = []

    def end(module, x, h):
        if bool(x.isnan().any()):
            seen.append(1)
            h = h.nan_to_num().square()
            h = 0.0 * (h / 0.0) if len(seen) % 2 else torch.log(-h)
        return normal(module, x, h)

    guard = GradGuard()
    _train(tmp_path, end, guard)
    (alert,) = guard.alerts
    assert (alert.step, alert.culprit.op) == (BAD, "log")


class _Checked(Raising):
    """A hook of its own looks at the loss, or at the gradients."""

    def __init__(self, hook):
        super().__init__(lambda module, x, h: h.square().mean())
        setattr(self, hook, self._check)

    def _check(self, *_):
        if not all(bool(it.grad.isfinite().all()) for it in self.layer.parameters() if it.grad is not None):
            raise ValueError("a gradient is NaN")


class _LossCheck(Callback):
    def on_before_backward(self, trainer, pl_module, loss):
        assert torch.isfinite(loss)


@pytest.mark.parametrize("hook", ["on_after_backward", None])
def test_exception_of_a_hook_passes_on_with_what_a_replay_finds(hook, tmp_path):
    """Hooks are not run again, so that nobody knows whether NaN is the reason; but the hook has said so."""
    guard = GradGuard()
    module = Raising(lambda module, x, h: h.square().mean()) if hook is None else _Checked(hook)
    with pytest.raises((ValueError, AssertionError)):
        make_trainer(tmp_path, guard, *([_LossCheck()] if hook is None else [])).fit(module, _batches(BAD))
    (alert,) = guard.alerts
    assert alert.culprit.samples == (ROW,)
    assert "was raised, and a replay of the step makes NaN or Inf; culprit" in alert.message
    assert "The exception passes on." in alert.message


def test_exception_about_a_step_that_is_skipped_already_has_its_alert_as_a_note(tmp_path):
    """A hook that runs after the guard says the same once more."""
    guard = GradGuard()
    with pytest.raises(ValueError, match="a gradient is NaN") as caught:
        make_trainer(tmp_path, guard).fit(_Checked("on_before_optimizer_step"), _batches(BAD))
    (alert,) = guard.alerts
    assert "The step is skipped." in alert.message
    assert sys.version_info < (3, 11) or caught.value.__notes__ == [alert.message]


class _Awkward(Exception):
    """Can neither say what it is, nor be noted to."""

    def __init__(self, *, code):
        super().__init__()
        self.code = code

    def __str__(self):
        raise RuntimeError("nothing to say")

    def add_note(self, note):
        raise TypeError("no notes")


def _awkwardly(module, x, h):
    if bool(h.isnan().any()):
        raise _Awkward(code=1)
    return h.mean()


def test_exception_of_an_awkward_class_is_not_replaced(tmp_path):
    """It is the one that was raised, and there is an alert."""
    guard = GradGuard()
    with pytest.raises(_Awkward):
        _train(tmp_path, _awkwardly, guard)
    assert [alert.culprit.samples for alert in guard.alerts] == [(ROW,)]


class _TwoOptimizers(Raising):
    """The first one's loss raises, with its parameters toggled."""

    def __init__(self):
        super().__init__(normal)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        first, second = self.optimizers()
        self.toggle_optimizer(first)
        first.zero_grad()
        self.manual_backward(self.end(self, batch, self.layer(batch)))
        first.step()
        self.untoggle_optimizer(first)
        second.zero_grad()
        self.manual_backward(self.table.weight.square().mean())
        second.step()

    def configure_optimizers(self):
        return [torch.optim.Adam(self.layer.parameters()), torch.optim.Adam(self.table.parameters())]


def test_exception_before_any_of_two_optimizers_has_stepped_is_a_skipped_step(tmp_path):
    """It is told of, and counted, though its loss might be the other one's; flags are as they were."""
    guard, module = GradGuard(), _TwoOptimizers()
    make_trainer(tmp_path, guard).fit(module, _batches(BAD))
    (alert,) = guard.alerts
    assert (alert.batch_idx, alert.culprit.samples, guard.num_skipped) == (BAD, (ROW,), 1)
    assert all(parameter.requires_grad for parameter in module.parameters())


def test_lost_gpu_is_noted(tmp_path):
    """A device-side assert ends the process's use of its GPU, so that nothing is run again."""
    guard = GradGuard(skip_exceptions="all")
    with pytest.raises(RuntimeError, match="device-side assert") as caught:
        _train(tmp_path, lost_gpu, guard)
    assert guard.alerts == []
    if sys.version_info >= (3, 11):
        assert "can't be replayed" in caught.value.__notes__[0]


@pytest.mark.parametrize("bad", [0, BAD])
def test_exception_under_a_grad_scaler_is_passed_over_and_the_scale_stays(bad, tmp_path):
    """Also in the first step, before there is a scale."""
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000)
    guard = GradGuard()
    plugin = MixedPrecision("16-mixed", "cpu", scaler=scaler)
    trainer = _train(tmp_path, normal, guard, data=_batches(bad), plugins=[plugin])
    assert (trainer.global_step, guard.num_skipped, scaler.get_scale()) == (6, 1, 1024.0)
    assert [alert.step for alert in guard.alerts] == [bad]
