"""Mixed precision on a CPU: fp16 with a GradScaler, and bf16."""

from __future__ import annotations

import warnings

import pytest
import torch
from lightning_package import MixedPrecision
from toys import Net, Snapshots, fit, make_batches, same, seeded, weights_of

from lightning_gradguard import GradGuard, GradientWarning, GuardWarning

SCALE = 2.0**10


def _fp16(init_scale=SCALE):
    scaler = torch.amp.GradScaler("cpu", init_scale=init_scale, growth_interval=1000)
    return MixedPrecision("16-mixed", "cpu", scaler=scaler)


class Fused(Net):
    """A fused optimizer, which leaves unscaling to its own kernel."""

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01, fused=True)


@pytest.mark.parametrize("model", [Net, Fused])
def test_fp16_norm_is_that_of_the_true_gradients(model, tmp_path):
    """The same norms as in full precision, within fp16's rounding, not a thousand times as large."""
    norms = {}
    for name, settings in (("scaled", {"plugins": [_fp16()]}), ("plain", {})):
        seen = norms.setdefault(name, [])
        guard = GradGuard(sinks=[lambda record, seen=seen: seen.append(record.measurement.global_norm)])
        fit(tmp_path, seeded(model), guard, batches=make_batches(1), **settings)
    assert norms["scaled"] == pytest.approx(norms["plain"], rel=0.02)


@pytest.mark.parametrize("clip", [None, 0.5])
def test_fp16_healthy_training_equals_one_without_a_guard(clip, tmp_path):
    """Bit for bit, with the Trainer's own clipping where ours clips."""
    guarded, plain, guard = seeded(Net), seeded(Net), GradGuard(clip=clip)
    fit(tmp_path, guarded, guard, plugins=[_fp16()])
    fit(tmp_path, plain, plugins=[_fp16()], gradient_clip_val=clip)
    assert (guard.num_steps, guard.alerts) == (12, [])
    assert same(weights_of(guarded), weights_of(plain))


def test_fp16_fused_healthy_training_equals_one_without_a_guard(tmp_path):
    """The guard unscales where the kernel would have; a power of two loses no bit."""
    guarded, plain = seeded(Fused), seeded(Fused)
    fit(tmp_path, guarded, GradGuard(), plugins=[_fp16()])
    fit(tmp_path, plain, plugins=[_fp16()])
    assert same(weights_of(guarded), weights_of(plain))


def test_fp16_fused_optimizer_can_be_clipped(tmp_path):
    """Which the Trainer itself refuses."""
    guard = GradGuard(clip=0.5)
    fit(tmp_path, seeded(Fused), guard, plugins=[_fp16()])
    assert guard.num_clipped > 0
    assert guard.last.clipped_norm <= 0.5 + 1e-4


@pytest.mark.smoke
@pytest.mark.parametrize("model", [Net, Fused])
def test_fp16_nan_loss_is_skipped_and_alerted(model, tmp_path):
    """A NaN in the loss is no matter of scale."""
    guard, snapshots, module = GradGuard(), Snapshots(), model({5: "nan"})
    with pytest.warns(GradientWarning, match="Nonfinite at step 5 "):
        fit(tmp_path, module, guard, snapshots, plugins=[_fp16()])
    assert [alert.kind for alert in guard.alerts] == ["nonfinite"]
    assert same(snapshots.weights[5], snapshots.weights[4])
    assert not same(snapshots.weights[6], snapshots.weights[5])


def test_fp16_scale_that_is_too_large_at_first_is_no_alert(tmp_path):
    """The scaler finds its scale by overflowing a few times; the guard counts those steps as skipped."""
    guard, module = GradGuard(), Net()
    fit(tmp_path, module, guard, plugins=[_fp16(init_scale=2.0**20)], batches=make_batches(24))
    assert guard.alerts == []
    assert 0 < guard.num_skipped < 12
    assert all(value.isfinite().all() for value in weights_of(module).values())


@pytest.mark.smoke
def test_bf16_training_has_no_scaler_and_no_alert(tmp_path):
    """bf16 has float32's range; the weights are those of a run without a guard."""
    guarded, plain, guard = seeded(Net), seeded(Net), GradGuard()
    fit(tmp_path, guarded, guard, precision="bf16-mixed")
    fit(tmp_path, plain, precision="bf16-mixed")
    assert (guard.num_steps, guard.alerts) == (12, [])
    assert same(weights_of(guarded), weights_of(plain))


def test_float64_training_is_measured_in_float64(tmp_path):
    """`precision="64-true"` changes nothing either."""

    class Double(Net):
        def training_step(self, batch, batch_idx):
            number, x, y = batch
            return super().training_step((number, x.double(), y.double()), batch_idx)

    guarded, plain, guard = seeded(Double), seeded(Double), GradGuard(clip=0.5)
    fit(tmp_path, guarded, guard, precision="64-true")
    fit(tmp_path, plain, precision="64-true", gradient_clip_val=0.5)
    assert guarded.head.weight.dtype == torch.float64
    assert same(weights_of(guarded), weights_of(plain))


class _Clips(Net):
    """By its own method, or by torch's function."""

    automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        self.clip(optimizer)
        optimizer.step()

    def clip(self, optimizer):
        self.clip_gradients(optimizer, gradient_clip_val=0.5, gradient_clip_algorithm="norm")


class _ClipsByFunction(_Clips):
    def clip(self, optimizer):
        torch.nn.utils.clip_grad_norm_(self.parameters(), 0.5)


class _ClipsAfterBackward(Net):
    def on_after_backward(self):
        torch.nn.utils.clip_grad_norm_(self.parameters(), 0.5)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (_Clips, "still multiplied by the GradScaler's scale, 1024"),
        (_ClipsByFunction, "was 0.5 before the GradScaler's scale, 1024"),
        (_ClipsAfterBackward, "was 0.5 before the GradScaler's scale, 1024"),
    ],
)
def test_fp16_clipping_by_the_module_before_unscaling_is_pointed_out_once(module, message, tmp_path):
    """Its limit holds for numbers that are a thousand times as large."""
    norms = []
    guard = GradGuard(sinks=[lambda record: norms.append(record.measurement.global_norm)])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(tmp_path, module(), guard, plugins=[_fp16()], batches=make_batches(7))
    about = [str(each.message) for each in caught if "the scaled numbers" in str(each.message)]
    assert len(about) == 1
    assert message in about[0]
    assert max(norms) == pytest.approx(0.5 / SCALE, rel=0.01)


def test_fp16_clipping_of_unscaled_gradients_is_not_pointed_out(tmp_path):
    """The Trainer's own, and none at all."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for settings in ({"gradient_clip_val": 0.01}, {}):
            fit(tmp_path, Net(), GradGuard(), plugins=[_fp16()], batches=make_batches(7), **settings)
    assert not [each for each in caught if each.category is GuardWarning]
