"""Less usual trainings: loss scaling that goes wrong, special optimizers and parameters, callbacks around the guard."""

from __future__ import annotations

import math

import lightning_package
import pytest
import torch
from lightning_package import (
    BaseFinetuning,
    Callback,
    LightningModule,
    MixedPrecision,
    StochasticWeightAveraging,
)
from toys import FEATURES, Net, Snapshots, fit, make_batches, same, weights_of

from lightning_gradguard import GradGuard, GradientWarning, Overflow
from lightning_gradguard.testing import inject

NEEDS_EMA = pytest.mark.skipif(not lightning_package.has("EMAWeightAveraging"), reason="Lightning has it from 2.6 on")


def _fp16(init_scale: float) -> MixedPrecision:
    return MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=init_scale))


def _records(**settings):
    seen = []
    return GradGuard(sinks=[seen.append], **settings), seen


class Loud(Net):
    """A loss that is large enough to overflow a scale of 2^20."""

    def training_step(self, batch, batch_idx):
        return 10.0 * super().training_step(batch, batch_idx)


def test_fp16_calibration_raises_no_alarm_and_loses_no_clean_step(tmp_path):
    """From a scale that is far too large: the overflows are counted, and all that is skipped."""
    guard, seen = _records()
    fit(tmp_path, Loud(), guard, plugins=[_fp16(2.0**20)])
    overflows = [record.measurement.is_scaler_overflow for record in seen]
    assert overflows[0]
    assert not overflows[-1]
    assert [record.decision.skip for record in seen] == overflows
    assert guard.alerts == []


def test_fp16_scale_that_collapses_is_an_alarm(tmp_path):
    """NaN at every scale is no calibration."""

    class Broken(Net):
        def on_before_backward(self, loss):
            self.head.weight.register_hook(lambda grad: grad * math.nan)

    guard = GradGuard(overflow=Overflow("stop", max_in_a_row=5))
    with pytest.warns(GradientWarning, match=r"overflow for the 6\. time in a row"):
        fit(tmp_path, Broken(), guard, plugins=[_fp16(2.0**10)])
    assert guard.stopped_by.kind == "overflow"
    assert guard.num_steps == guard.num_skipped == 6


@pytest.mark.smoke
def test_lbfgs_bad_evaluation_inside_a_step_leaves_weights_and_state_from_before(tmp_path):
    """The first evaluation was fine and has moved the weights by then."""

    class Searching(Net):
        def configure_optimizers(self):
            return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=3)

    module, guard, snapshots = Searching(), GradGuard(), Snapshots()
    with inject(module, "nan", step=3 * 4 + 1), pytest.warns(GradientWarning, match="Nonfinite at step 4"):
        fit(tmp_path, module, guard, snapshots)
    assert (guard.num_steps, guard.num_skipped) == (12, 1)
    assert same(snapshots.weights[4], snapshots.weights[3])
    assert same(snapshots.optimizers[4], snapshots.optimizers[3])
    assert not same(snapshots.weights[5], snapshots.weights[4])


@pytest.mark.filterwarnings("ignore::lightning_gradguard.GradientWarning")
def test_injected_fault_comes_in_the_step_that_was_asked_for_also_after_replays(tmp_path):
    """The backward passes of the replays of step 2 are no steps; step 7 alone is damaged, and no replay."""
    module, guard, snapshots = Net({2: "nan"}), GradGuard(), Snapshots()
    with inject(module, "nan", step=7):
        fit(tmp_path, module, guard, snapshots)
    assert guard.num_skipped == 2
    assert same(snapshots.weights[7], snapshots.weights[6])
    assert [alert.step for alert in guard.alerts] == [2, 7]
    assert [alert.culprit.phase for alert in guard.alerts] == ["forward", "backward"]


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
@pytest.mark.parametrize("window", [1, 3])
@pytest.mark.parametrize("scaled", [False, True])
def test_training_step_none_now_and_then_trains_as_without_the_guard(scaled, window, tmp_path):
    """With and without a scaler, and inside an accumulation window."""
    runs = []
    for callbacks in ([], [GradGuard()]):
        torch.manual_seed(0)
        module = Net({1: "none", 5: "none", 7: "none"})
        plugins = [_fp16(2.0**8)] if scaled else []
        fit(tmp_path, module, *callbacks, plugins=plugins, accumulate_grad_batches=window)
        runs.append(weights_of(module))
    assert same(*runs)
    (guard,) = callbacks
    assert guard.alerts == []
    assert guard.num_skipped == 0


@pytest.mark.parametrize("settings", [{"overfit_batches": 2, "max_epochs": 3}, {"limit_train_batches": 2, "max_epochs": 3}])
def test_limited_batches_count_the_steps_that_were_taken(settings, tmp_path):
    """Two a batch, three epochs."""
    guard = GradGuard()
    fit(tmp_path, Net(), guard, **settings)
    assert (guard.num_steps, guard.alerts) == (6, [])


def test_gradients_of_parameters_outside_the_optimizer_are_left_alone(tmp_path):
    """Their NaN is no finding, since nothing of it is applied."""

    class HeadOnly(Net):
        def configure_optimizers(self):
            return torch.optim.SGD(self.head.parameters(), lr=0.05)

    module, guard = HeadOnly(), GradGuard(clip=1e-3)
    with inject(module, "nan", step=3, parameter="body.weight"):
        fit(tmp_path, module, guard)
    assert (guard.num_skipped, guard.num_clipped, guard.alerts) == (0, 12, [])
    assert guard.last.measurement.names == ("head.weight", "head.bias")


class Touching(Callback):
    """Multiplies all gradients."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        """Where the guard looks too."""
        for parameter in pl_module.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(self.factor)


@pytest.mark.parametrize("guard_at", [0, 1, 2])
def test_callbacks_that_touch_gradients_are_seen_wherever_the_guard_is_listed(guard_at, tmp_path):
    """The guard sees what will be applied."""
    plain, plain_seen = _records()
    torch.manual_seed(0)
    fit(tmp_path, Net(), plain, max_steps=1)
    guard, seen = _records()
    callbacks: list[Callback] = [Touching(4.0), Touching(0.5)]
    callbacks.insert(guard_at, guard)
    torch.manual_seed(0)
    fit(tmp_path, Net(), *callbacks, max_steps=1)
    assert seen[0].measurement.global_norm == pytest.approx(2.0 * plain_seen[0].measurement.global_norm, rel=1e-6)


@pytest.mark.filterwarnings("ignore:.*swa|.*SWA|Swapping scheduler")
@pytest.mark.parametrize(
    "average",
    [
        pytest.param(lambda: lightning_package.EMAWeightAveraging(decay=0.9), marks=NEEDS_EMA),
        lambda: StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1),
    ],
)
def test_weight_averaging_after_a_skipped_step_stays_finite(average, tmp_path):
    """The NaN never reaches the weights, so it never reaches their average."""
    module, guard = Net({5: "nan"}), GradGuard()
    with pytest.warns(GradientWarning, match="Nonfinite"):
        fit(tmp_path, module, guard, average(), max_epochs=3)
    assert all(bool(value.isfinite().all()) for value in weights_of(module).values())
    assert guard.num_skipped == 3


@pytest.mark.smoke
def test_compiled_submodule_keeps_the_names_that_the_user_gave(tmp_path):
    """Without the `_orig_mod` that compilation adds."""

    class Compiled(Net):
        def __init__(self, *args):
            super().__init__(*args)
            self.body = torch.compile(self.body, backend="eager")

    module, guard = Compiled({5: "nan"}), GradGuard()
    with pytest.warns(GradientWarning, match="Nonfinite"):
        fit(tmp_path, module, guard)
    assert guard.last.measurement.names == ("body.weight", "body.bias", "head.weight", "head.bias")


def test_parametrized_weights_are_guarded_by_their_own_parameters(tmp_path):
    """`weight_norm` trains a magnitude and a direction in place of the weight."""

    class Normed(Net):
        def __init__(self, *args):
            super().__init__(*args)
            self.body = torch.nn.utils.parametrizations.weight_norm(self.body)

    module, guard, snapshots = Normed({5: "nan"}), GradGuard(clip=0.1), Snapshots()
    with pytest.warns(GradientWarning, match="Nonfinite"):
        fit(tmp_path, module, guard, snapshots)
    assert "body.parametrizations.weight.original0" in guard.last.measurement.names
    assert same(snapshots.weights[5], snapshots.weights[4])


class Unfreezing(BaseFinetuning):
    """Trains the body from the second epoch on."""

    def freeze_before_training(self, pl_module):
        """The head alone at first."""
        self.freeze(pl_module.body)

    def finetune_function(self, pl_module, epoch, optimizer):
        """Adds a parameter group."""
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.body, optimizer)


def test_finetuning_that_adds_a_group_is_followed(tmp_path):
    """What is unfrozen is measured, clipped and skipped from then on."""

    class HeadFirst(Net):
        def configure_optimizers(self):
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.05, momentum=0.9)

    guard, seen = _records()
    module, snapshots = HeadFirst({5: "nan"}), Snapshots()
    with pytest.warns(GradientWarning, match="Nonfinite"):
        fit(tmp_path, module, Unfreezing(), guard, snapshots, max_epochs=2)
    assert len(seen[11].measurement.names) == 2
    assert len(seen[12].measurement.names) == 4
    assert same(snapshots.weights[17], snapshots.weights[16])
    assert guard.num_skipped == 2


def test_parameter_groups_with_settings_of_their_own_are_clipped_by_one_norm(tmp_path):
    """As torch does with all parameters of a model; a skip leaves both alone."""

    class Grouped(Net):
        def configure_optimizers(self):
            groups = [{"params": self.body.parameters(), "lr": 0.1}, {"params": self.head.parameters(), "weight_decay": 0.5}]
            return torch.optim.AdamW(groups, lr=0.01)

    runs = []
    for callbacks, settings in (([GradGuard(clip=0.1)], {}), ([], {"gradient_clip_val": 0.1})):
        torch.manual_seed(0)
        module = Grouped()
        fit(tmp_path, module, *callbacks, **settings)
        runs.append(weights_of(module))
    assert same(*runs)


class Words(LightningModule):
    """A sparse embedding under SparseAdam."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(20, 4, sparse=True)
        self.bad = 5

    def training_step(self, batch, batch_idx):
        """The words' squares; one batch is spoiled."""
        loss = self.table(batch[0] + torch.arange(4)).square().mean()
        return loss * math.nan if batch_idx == self.bad else loss

    def configure_optimizers(self):
        """What torch has for sparse gradients."""
        return torch.optim.SparseAdam(self.parameters(), lr=0.1)


@pytest.mark.smoke
def test_sparse_embedding_is_clipped_and_skipped(tmp_path):
    """Its gradient holds the rows that were looked up."""
    guard, snapshots = GradGuard(clip=1e-3), Snapshots()
    with pytest.warns(GradientWarning, match="Nonfinite at step 5"):
        fit(tmp_path, Words(), guard, snapshots)
    assert (guard.num_skipped, guard.num_clipped) == (1, 11)
    assert same(snapshots.weights[5], snapshots.weights[4])
    assert same(snapshots.optimizers[5], snapshots.optimizers[4])


def test_complex_parameters_are_clipped_as_torch_does_and_skipped(tmp_path):
    """The norm is that of the magnitudes."""

    class Waves(Net):
        def __init__(self, *args):
            super().__init__(*args)
            self.phase = torch.nn.Parameter(torch.randn(FEATURES, FEATURES, dtype=torch.complex64))

        def training_step(self, batch, batch_idx):
            number, x, y = batch
            return super().training_step((number, (x.to(torch.complex64) @ self.phase).abs(), y), batch_idx)

    runs = []
    for callbacks, settings in (([GradGuard(clip=0.1)], {}), ([], {"gradient_clip_val": 0.1})):
        torch.manual_seed(0)
        module = Waves()
        fit(tmp_path, module, *callbacks, **settings)
        runs.append(torch.cat([value.abs().flatten() for value in weights_of(module).values()]))
    assert torch.allclose(*runs, rtol=1e-5, atol=1e-7)
    guard = GradGuard()
    with pytest.warns(GradientWarning, match="Nonfinite"):
        fit(tmp_path, Waves({5: "nan"}), guard)
    assert guard.num_skipped == 1


def test_tied_weights_count_once(tmp_path):
    """The same tensor under two names is one parameter of the norm."""

    class Tied(LightningModule):
        def __init__(self):
            super().__init__()
            self.inner = torch.nn.Linear(FEATURES, FEATURES, bias=False)
            self.outer = torch.nn.Linear(FEATURES, FEATURES, bias=False)
            self.outer.weight = self.inner.weight
            self.norms = []

        def training_step(self, batch, batch_idx):
            return (self.outer(self.inner(batch[1])) - batch[1]).square().mean()

        def on_before_optimizer_step(self, optimizer):
            self.norms.append(float(self.inner.weight.grad.norm()))

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.01)

    module = Tied()
    guard, seen = _records()
    fit(tmp_path, module, guard)
    assert [record.measurement.global_norm for record in seen] == pytest.approx(module.norms)
    assert guard.last.measurement.names == ("inner.weight",)


@pytest.mark.smoke
def test_inject_in_a_fit_makes_the_guard_skip_that_step(tmp_path):
    """The rehearsal that the injector is made for."""
    module, guard = Net(), GradGuard()
    with inject(module, "nan", step=5, parameter="head.weight"), pytest.warns(GradientWarning, match=r"`head\.weight`"):
        fit(tmp_path, module, guard, batches=make_batches(12))
    assert [alert.step for alert in guard.alerts] == [5]
