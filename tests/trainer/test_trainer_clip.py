"""Clipping under a Trainer: equal to the Trainer's own, and refused beside it."""

from __future__ import annotations

import pytest
import torch
from lightning_package import LightningModule, MisconfigurationException
from toys import Net, fit, same, seeded, weights_of

from lightning_gradguard import ClipNorm, ClipValue, GradGuard


class OwnClipping(Net):
    """A user who clips in the hook that Lightning has for it."""

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        """Clip by norm."""
        self.clip_gradients(optimizer, 0.1, "norm")


class SumOfSquares(LightningModule):
    """One parameter whose gradient is its value."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.full((4,), value))

    def training_step(self, batch, batch_idx):
        return 0.5 * self.weight.square().sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)


def _weights(root, *callbacks, optimizer="adamw", **settings):
    module = seeded(lambda: Net(optimizer=optimizer))
    fit(root, module, *callbacks, **settings)
    return weights_of(module)


@pytest.mark.smoke
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_clip_norm_equals_the_trainers_own_to_the_last_bit(optimizer, tmp_path):
    """`clip=0.5` and `gradient_clip_val=0.5` train the same weights."""
    guard = GradGuard(clip=0.5)
    ours = _weights(tmp_path, guard, optimizer=optimizer)
    assert guard.num_clipped > 0
    assert same(ours, _weights(tmp_path, optimizer=optimizer, gradient_clip_val=0.5))


def test_clip_norm_under_accumulation_equals_the_trainers_own_to_the_last_bit(tmp_path):
    """The sum over the window is clipped, once."""
    guard = GradGuard(clip=ClipNorm(0.5))
    ours = _weights(tmp_path, guard, accumulate_grad_batches=3)
    assert 0 < guard.num_clipped <= guard.num_steps == 4
    assert same(ours, _weights(tmp_path, accumulate_grad_batches=3, gradient_clip_val=0.5))


def test_clip_value_equals_the_trainers_own_to_the_last_bit(tmp_path):
    """`ClipValue` and `gradient_clip_algorithm="value"` train the same weights."""
    guard = GradGuard(clip=ClipValue(0.1))
    ours = _weights(tmp_path, guard, optimizer="sgd")
    assert guard.num_clipped > 0
    assert same(ours, _weights(tmp_path, optimizer="sgd", gradient_clip_val=0.1, gradient_clip_algorithm="value"))


def test_clip_record_tells_norm_before_and_after(tmp_path):
    """Norm 6 clipped to 2: both norms, the factor and the count are there, and the weights moved by 2."""
    guard, module = GradGuard(clip=2.0), SumOfSquares(3.0)
    fit(tmp_path, module, guard, max_steps=1)
    assert guard.last.measurement.global_norm == pytest.approx(6.0)
    assert (guard.last.clip_coef, guard.last.clipped_norm) == (pytest.approx(1 / 3), pytest.approx(2.0))
    assert guard.num_clipped == 1
    assert module.weight.tolist() == pytest.approx([2.0] * 4)


def test_clip_above_every_norm_changes_no_bit(tmp_path):
    """A limit that is never reached is no limit."""
    guard = GradGuard(clip=1e6)
    assert same(_weights(tmp_path, guard), _weights(tmp_path))
    assert guard.num_clipped == 0


@pytest.mark.smoke
@pytest.mark.parametrize("error", [ValueError, MisconfigurationException])
def test_clip_with_gradient_clip_val_is_refused_with_the_remedy(error, tmp_path):
    """Clipping twice is a mistake, and either exception that a user may expect is raised."""
    module = Net()
    before = weights_of(module)
    with pytest.raises(error, match=r"`gradient_clip_val`.*got 1\.0.*Remove `gradient_clip_val`.*or `clip`"):
        fit(tmp_path, module, GradGuard(clip=1.0), gradient_clip_val=1.0)
    assert same(weights_of(module), before)


def test_clip_with_configure_gradient_clipping_is_refused_with_the_remedy(tmp_path):
    """A module that clips by itself is named."""
    with pytest.raises(ValueError, match=r"`configure_gradient_clipping`.*OwnClipping.*Remove the method, or `clip`"):
        fit(tmp_path, OwnClipping(), GradGuard(clip=1.0))


@pytest.mark.parametrize("clips", ["trainer", "module"])
def test_histograms_after_a_clipping_that_is_not_seen_are_refused_with_the_remedy(clips, tmp_path):
    """They would be of gradients that nobody trains with."""
    module, settings = (Net(), {"gradient_clip_val": 1.0}) if clips == "trainer" else (OwnClipping(), {})
    with pytest.raises(ValueError, match=r"`histograms_of` must be 'raw' .*, got 'clipped'.*Let GradGuard clip, by `clip`"):
        fit(tmp_path, module, GradGuard(histograms_of="clipped"), **settings)


def test_guard_without_clip_goes_with_gradient_clip_val(tmp_path):
    """A guard that only watches leaves clipping to the Trainer."""
    guard = GradGuard()
    assert same(_weights(tmp_path, guard, gradient_clip_val=0.5), _weights(tmp_path, gradient_clip_val=0.5))
    assert guard.num_clipped == 0


def test_guard_without_clip_goes_with_configure_gradient_clipping(tmp_path):
    """The same for the module's own clipping."""
    guarded, plain = seeded(OwnClipping), seeded(OwnClipping)
    fit(tmp_path, guarded, GradGuard())
    fit(tmp_path, plain)
    assert same(weights_of(guarded), weights_of(plain))


def test_two_guards_are_refused_with_the_remedy(tmp_path):
    """Not the Trainer's message about checkpoint keys, but what is wrong and what to do."""
    with pytest.raises(ValueError, match=r"`callbacks` must hold one GradGuard, got 2.*Put their settings into one"):
        fit(tmp_path, Net(), GradGuard(clip=1.0), GradGuard(explosion="stop"))


def test_clip_zero_of_the_trainer_is_no_conflict(tmp_path):
    """`gradient_clip_val=0` is how Lightning spells no clipping."""
    fit(tmp_path, Net(), GradGuard(clip=1.0), gradient_clip_val=0)


def test_clip_with_a_filter_leaves_the_excluded_parameters_alone(tmp_path):
    """One weight of two is measured and clipped; a pattern without a match ends the fit before its first step."""

    class Two(SumOfSquares):
        """A second weight."""

        def __init__(self) -> None:
            super().__init__(3.0)
            self.other = torch.nn.Parameter(torch.full((4,), 3.0))

        def training_step(self, batch, batch_idx):
            return 0.5 * (self.weight.square().sum() + self.other.square().sum())

    module, guard = Two(), GradGuard(clip=2.0, exclude=["oth*"])
    fit(tmp_path, module, guard, max_steps=1)
    assert guard.last.measurement.names == ("weight",)
    torch.testing.assert_close(weights_of(module), {"weight": torch.full((4,), 2.0), "other": torch.zeros(4)})
    with pytest.raises(ValueError, match=r"which matches none\. There are `weight`, `other`"):
        fit(tmp_path, Two(), GradGuard(include=["encoder.*"]), max_steps=1)
