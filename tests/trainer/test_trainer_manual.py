"""Manual optimization with two optimizers."""

from __future__ import annotations

import pytest
import torch
from lightning_package import LightningModule, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from toys import FEATURES, SPOIL, Snapshots, fit, make_batches, make_trainer, same, seeded

from lightning_gradguard import GradGuard, GradientWarning


class Twins(LightningModule):
    """Two models that never meet, an optimizer each; `faults` says which batch spoils whose loss."""

    def __init__(self, faults=None, *, interleaved: bool = True) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.left = torch.nn.Linear(FEATURES, 1)
        self.right = torch.nn.Linear(FEATURES, 1)
        self.faults = dict(faults or {})
        self.interleaved = interleaved

    def _loss(self, side, batch):
        number, x, y = batch
        loss = torch.nn.functional.mse_loss(getattr(self, side)(x), y)
        return SPOIL[self.faults[int(number), side]](loss) if (int(number), side) in self.faults else loss

    def training_step(self, batch, batch_idx):
        optimizers = dict(zip(("left", "right"), self.optimizers(), strict=True))
        if self.interleaved:
            for side, optimizer in optimizers.items():
                optimizer.zero_grad()
                self.manual_backward(self._loss(side, batch))
                optimizer.step()
            return
        for side, optimizer in optimizers.items():
            optimizer.zero_grad()
            self.manual_backward(self._loss(side, batch))
        for optimizer in optimizers.values():
            optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.Adam(side.parameters(), lr=0.01) for side in (self.left, self.right)]


def test_two_optimizers_each_step_is_counted(tmp_path):
    """Twelve batches are twenty-four decisions, twelve for each; the Trainer counts likewise."""
    guard = GradGuard()
    trainer = fit(tmp_path, Twins(), guard)
    assert guard.num_steps == trainer.global_step == 24
    assert guard.last.totals.num_steps == 12
    assert (guard.last.position.optimizer, guard.last.position.step) == (1, 23)


class Uneven(Twins):
    """The right one steps twice a batch, and nobody clears gradients before the next batch does."""

    def training_step(self, batch, batch_idx):
        left, right = self.optimizers()
        for side, optimizer in (("left", left), ("right", right), ("right", right)):
            optimizer.zero_grad()
            self.manual_backward(self._loss(side, batch))
            optimizer.step()


def test_two_optimizers_nan_in_one_of_several_passes_leaves_the_other_alone(tmp_path):
    """What the left one's last step has left in its gradients is not taken for a part of the right one's passes."""
    guard = GradGuard()
    with pytest.warns(GradientWarning, match="Nonfinite"):
        fit(tmp_path, Uneven({(5, "right"): "nan"}), guard)
    assert guard.num_skipped == 2
    assert {alert.optimizer for alert in guard.alerts} == {1}


@pytest.mark.smoke
@pytest.mark.parametrize("fault", ["nan", "nan_loss"])
@pytest.mark.parametrize(("bad", "good", "index"), [("left", "right", 0), ("right", "left", 1)])
def test_two_optimizers_nan_in_one_loss_skips_only_that_one(bad, good, index, fault, tmp_path):
    """The other's step of the same batch is applied."""
    guard, snapshots = GradGuard(), Snapshots()
    with pytest.warns(GradientWarning, match=f"optimizer {index}"):
        fit(tmp_path, Twins({(5, bad): fault}), guard, snapshots)
    (alert,) = guard.alerts
    assert (alert.optimizer, alert.step, alert.batch_idx, alert.micro_batch) == (index, 10 + index, 5, 0)
    assert guard.num_skipped == 1
    before, after = snapshots.weights[4], snapshots.weights[5]
    assert torch.equal(after[f"{bad}.weight"], before[f"{bad}.weight"])
    assert not torch.equal(after[f"{good}.weight"], before[f"{good}.weight"])
    assert same(snapshots.optimizers[5][index], snapshots.optimizers[4][index])
    assert all(report.name.startswith(bad) for report in alert.parameters)


@pytest.mark.parametrize("fault", ["nan", "nan_loss"])
@pytest.mark.parametrize(("bad", "good", "index"), [("left", "right", 0), ("right", "left", 1)])
def test_two_optimizers_both_backwards_before_both_steps_nan_skips_only_its_own(bad, good, index, fault, tmp_path):
    """Whose loss it was is not told by the order of calls; the other optimizer's step is healthy."""
    guard, snapshots = GradGuard(), Snapshots()
    with pytest.warns(GradientWarning, match=f"optimizer {index}"):
        fit(tmp_path, Twins({(5, bad): fault}, interleaved=False), guard, snapshots)
    assert [alert.optimizer for alert in guard.alerts] == [index]
    before, after = snapshots.weights[4], snapshots.weights[5]
    assert torch.equal(after[f"{bad}.weight"], before[f"{bad}.weight"])
    assert not torch.equal(after[f"{good}.weight"], before[f"{good}.weight"])


def test_two_optimizers_stop_in_the_first_ends_the_fit_after_the_batch(tmp_path):
    """The second optimizer still takes its step of this batch, as Lightning has it."""
    guard = GradGuard(nonfinite="stop")
    with pytest.warns(GradientWarning, match="training stops"):
        fit(tmp_path, Twins({(5, "left"): "nan"}), guard)
    assert guard.num_steps == 12
    assert guard.stopped_by.optimizer == 0


def test_two_optimizers_clip_each_by_its_own_norm(tmp_path):
    """One limit, applied to each."""
    guard = GradGuard(clip=1e-3)
    fit(tmp_path, Twins(), guard)
    assert guard.num_clipped == guard.num_steps == 24
    assert guard.last.clipped_norm == pytest.approx(1e-3, rel=1e-2)


def test_two_optimizers_share_no_baseline(tmp_path):
    """Losses a thousand times apart, in turns: no alert, since each optimizer has a history of its own."""

    class Uneven(Twins):
        def _loss(self, side, batch):
            return super()._loss(side, batch) * (1e3 if side == "left" else 1.0)

    guard = GradGuard()
    fit(tmp_path, Uneven(), guard, max_epochs=5)
    assert (guard.num_steps, guard.alerts) == (120, [])


def test_two_optimizers_have_tags_of_their_own(tmp_path):
    """`gradguard/0/...` and `gradguard/1/...`, each with its own parameters."""
    logger = TensorBoardLogger(tmp_path)
    trainer = make_trainer(tmp_path, GradGuard(histogram_every_n_steps=4), logger=logger)
    with pytest.warns(GradientWarning, match="Nonfinite"):
        trainer.fit(Twins({(5, "right"): "nan"}), make_batches(12))
    events = EventAccumulator(logger.log_dir).Reload()
    tags = events.Tags()
    for index in (0, 1):
        assert {f"gradguard/{index}/global_norm", f"gradguard/{index}/clip_coef"} <= set(tags["scalars"])
        assert f"gradguard/{index}/log10_norms" in tags["histograms"]
    assert {"gradguard/0/norm/left", "gradguard/1/norm/right"} <= set(tags["scalars"])
    assert {"gradients/0/left.weight", "gradients/1/right.weight"} <= set(tags["histograms"])
    assert "gradguard/global_norm" not in tags["scalars"]
    assert [tag for tag in tags["tensors"] if tag.startswith("gradguard/")] == ["gradguard/1/alerts"]


def test_two_optimizers_untoggled_gan_nan_in_the_generators_loss_skips_the_generator_only(tmp_path):
    """The generator's backward pass spoils the discriminator's gradients too, which are then zeroed and never used."""

    class Gan(Twins):
        def training_step(self, batch, batch_idx):
            number, x, _ = batch
            for_left, for_right = self.optimizers()
            loss = self.right(x * self.left(x)).square().mean()
            for_left.zero_grad()
            self.manual_backward(loss * torch.nan if int(number) == 5 else loss)
            for_left.step()
            for_right.zero_grad()
            self.manual_backward(self.right(x).square().mean())
            for_right.step()

    guard, snapshots = GradGuard(), Snapshots()
    with pytest.warns(GradientWarning, match="Nonfinite at step 10 .* optimizer 0"):
        fit(tmp_path, Gan(), guard, snapshots)
    assert (len(guard.alerts), guard.num_skipped) == (1, 1)
    assert not torch.equal(snapshots.weights[5]["right.weight"], snapshots.weights[4]["right.weight"])


def test_two_optimizers_state_resumes_each_by_itself(tmp_path):
    """Uneven losses: each history is restored to the optimizer that it is of."""

    class Uneven(Twins):
        def _loss(self, side, batch):
            return super()._loss(side, batch) * (1e3 if side == "left" else 1.0)

    limits = []
    for epochs, path in ((2, None), (1, None), (2, tmp_path / "twins.ckpt")):
        seen = []
        guard = GradGuard(sinks=[lambda record, seen=seen: seen.append((record.position.step, record.explosion_limit))])
        trainer = make_trainer(tmp_path, guard, max_epochs=epochs)
        trainer.fit(seeded(Uneven), make_batches(20), ckpt_path=path)
        if epochs == 1:
            trainer.save_checkpoint(tmp_path / "twins.ckpt")
        limits.append(seen)
    through, _, resumed = limits
    assert resumed == through[40:]
    assert resumed[0][1] > 100 * resumed[1][1]
