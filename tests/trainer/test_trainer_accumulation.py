"""Windows of several backward passes."""

from __future__ import annotations

import pytest
from toys import Net, Snapshots, fit, same, seeded, weights_of

from lightning_gradguard import GradGuard, GradientWarning


def _run(root, faults, guard=None, **settings):
    """Windows of four over ten batches: 0-3, 4-7, and a last one of 8 and 9."""
    guard = guard or GradGuard()
    with pytest.warns(GradientWarning, match="at step"):
        fit(root, Net(faults), guard, accumulate_grad_batches=4, limit_train_batches=10, **settings)
    return guard


@pytest.mark.smoke
@pytest.mark.parametrize("batch", [4, 5, 6, 7])
@pytest.mark.parametrize("fault", ["nan", "nan_loss"])
def test_accumulation_alert_names_the_micro_batch(fault, batch, tmp_path):
    """Whichever of the window's four it is, also where only the loss is NaN."""
    (alert,) = _run(tmp_path, {batch: fault}).alerts
    assert (alert.step, alert.epoch, alert.micro_batch) == (1, 0, batch - 4)


def test_accumulation_alert_names_the_first_of_two_micro_batches(tmp_path):
    """The gradients stay NaN after the first."""
    (alert,) = _run(tmp_path, {5: "nan", 7: "nan"}).alerts
    assert alert.micro_batch == 1


@pytest.mark.parametrize("batch", [8, 9])
def test_accumulation_partial_last_window_names_the_micro_batch(batch, tmp_path):
    """An epoch's last batch always steps."""
    guard = _run(tmp_path, {batch: "nan"})
    (alert,) = guard.alerts
    assert (alert.step, alert.micro_batch) == (2, batch - 8)
    assert guard.num_steps == 3


def test_accumulation_window_after_a_partial_one_counts_from_zero(tmp_path):
    """The second epoch begins a new window."""
    first, second = _run(tmp_path, {1: "nan"}, max_epochs=2).alerts
    assert (first.step, first.epoch, first.micro_batch) == (0, 0, 1)
    assert (second.step, second.epoch, second.micro_batch) == (3, 1, 1)


def test_accumulation_alert_names_the_batch_that_did_the_damage(tmp_path):
    """`batch_idx` and `micro_batch` belong together: batch 5 is micro-batch 1 of the window that began with 4."""
    (alert,) = _run(tmp_path, {5: "nan"}).alerts
    assert (alert.batch_idx, alert.micro_batch) == (5, 1)


@pytest.mark.parametrize("fault", ["nan", "nan_loss"])
def test_accumulation_bad_window_is_skipped_whole(fault, tmp_path):
    """Four batches without a change, and the loss of a NaN counts although every gradient is finite."""
    guard, snapshots = GradGuard(), Snapshots()
    with pytest.warns(GradientWarning, match="Nonfinite at step 1 "):
        fit(tmp_path, Net({5: fault}), guard, snapshots, accumulate_grad_batches=4)
    assert (guard.num_steps, guard.num_skipped) == (3, 1)
    assert same(snapshots.weights[7], snapshots.weights[3])
    assert same(snapshots.optimizers[7], snapshots.optimizers[3])


def test_accumulation_healthy_window_records_how_many_passes_it_had(tmp_path):
    """Three windows, the last one shorter; the loss is that of the last pass."""
    seen, losses = [], []

    class Noting(Net):
        def training_step(self, batch, batch_idx):
            losses.append(super().training_step(batch, batch_idx))
            return losses[-1]

    settings = {"accumulate_grad_batches": 4, "limit_train_batches": 10}
    fit(tmp_path, Noting(), GradGuard(sinks=[lambda record: seen.append(record.measurement)]), **settings)
    assert [measurement.num_micro_batches for measurement in seen] == [4, 4, 2]
    assert all(measurement.damage is None for measurement in seen)
    # Lightning divides the loss by the size of a full window before it calls backward.
    assert [4 * measurement.loss for measurement in seen] == pytest.approx([losses[index].item() for index in (3, 7, 9)])


def test_accumulation_alert_message_names_the_micro_batch(tmp_path):
    """The sentence alone says where to look."""
    (alert,) = _run(tmp_path, {6: "nan"}).alerts
    assert "micro-batch 2" in alert.message


def test_accumulation_norm_that_overflows_float32_is_an_explosion_not_a_nan(tmp_path):
    """The gradients between the micro-batches are finite, though their norm can't be computed in float32."""
    guard = GradGuard(explosion="skip")
    with pytest.warns(GradientWarning, match="beyond what float32 arithmetic can square"):
        fit(tmp_path, Net({5: "enormous"}), guard, accumulate_grad_batches=4)
    assert [(alert.kind, alert.step) for alert in guard.alerts] == [("explosion", 1)]
    assert 1e20 < guard.alerts[0].value < 1e30


def test_accumulation_without_every_backward_looks_at_the_step_only(tmp_path):
    """The damage is found and skipped, the micro-batch is not known."""
    guard = _run(tmp_path, {5: "nan"}, GradGuard(every_backward=False))
    assert [(alert.step, alert.micro_batch) for alert in guard.alerts] == [(1, 0)]
    assert guard.num_skipped == 1


def test_accumulation_without_every_backward_misses_a_nan_loss(tmp_path):
    """What the option gives up: nobody looks at the loss, and the gradients are finite."""
    guard = GradGuard(every_backward=False)
    fit(tmp_path, Net({5: "nan_loss"}), guard, accumulate_grad_batches=4)
    assert (guard.alerts, guard.num_skipped) == ([], 0)


def test_every_backward_changes_no_weight(tmp_path):
    """Looking more often is only looking."""
    with_it, without = seeded(Net), seeded(Net)
    fit(tmp_path, with_it, GradGuard(clip=0.5), accumulate_grad_batches=4)
    fit(tmp_path, without, GradGuard(clip=0.5, every_backward=False), accumulate_grad_batches=4)
    assert same(weights_of(with_it), weights_of(without))
