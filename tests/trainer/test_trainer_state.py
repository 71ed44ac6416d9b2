"""Checkpoints, resumed runs, and a second fit."""

from __future__ import annotations

import pytest
import torch
from lightning_package import ModelCheckpoint
from toys import Net, ResumableBatches, fit, make_batches, make_trainer, same, seeded, weights_of

from lightning_gradguard import (
    ClipValue,
    Detector,
    Explosion,
    GradGuard,
    GradientWarning,
    GuardWarning,
    NonFinite,
    Vanishing,
    Verdict,
)

FAULTS = {4: "nan", 19: "huge", 22: "huge"}

# The folder is used again on purpose.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
]


class Counting(Detector):
    """A detector with a memory of its own."""

    name = "counting"

    def __init__(self) -> None:
        super().__init__("log", cooldown=3)
        self.num_seen = 0

    def observe(self, measurement):
        """Fire at every seventh step."""
        self.num_seen += 1
        if self.num_seen % 7 == 0:
            return Verdict(self.name, float(self.num_seen), 7.0, "seven steps have passed", "nothing to do")
        return None

    def state_dict(self):
        """The count."""
        return {"num_seen": self.num_seen}

    def load_state_dict(self, state):
        """Go on counting."""
        self.num_seen = state["num_seen"]


def _guard(seen=None, **settings):
    defaults = {"clip": 0.5, "explosion": Explosion("skip", cooldown=20, patience=2), "detectors": [Counting()]}
    return GradGuard(**{**defaults, "sinks": [] if seen is None else [seen.append], **settings})


def _fit(root, module, guard, *, ckpt_path=None, faulty=True, epochs=1, batches=24, **settings):
    """Train with a checkpoint at each epoch's end, named by the number of the next epoch."""
    checkpoint = ModelCheckpoint(dirpath=root, filename="{epoch}", save_top_k=-1, every_n_epochs=1)
    trainer = make_trainer(root, guard, checkpoint, enable_checkpointing=True, max_epochs=epochs, **settings)
    if faulty:
        with pytest.warns(GradientWarning, match="at step"):
            trainer.fit(module, make_batches(batches), ckpt_path=ckpt_path)
    else:
        trainer.fit(module, make_batches(batches), ckpt_path=ckpt_path)
    return trainer


def _facts(record):
    """All that was measured and decided about a step."""
    return {
        "position": vars(record.position),
        "global_norm": record.measurement.global_norm if record.measurement.is_finite else "damaged",
        "norms": "damaged" if not record.measurement.is_finite else record.measurement.norms.tolist(),
        "limit": record.explosion_limit,
        "coef": record.clip_coef,
        "verdicts": [(verdict.kind, verdict.message) for verdict in record.verdicts],
        "decision": vars(record.decision),
        # Without their messages: those of replays compare with earlier batches.
        "alerts": [(alert.kind, alert.step, alert.action) for alert in record.alerts],
        "totals": vars(record.totals),
    }


@pytest.mark.smoke
def test_resumed_run_decides_as_one_that_ran_through(tmp_path):
    """Norms, limits, verdicts, patience, cooldowns, totals and weights of the second epoch, bit for bit."""
    through, resumed = [], []
    straight, first, second = (seeded(lambda: Net(FAULTS)) for _ in range(3))
    _fit(tmp_path / "a", straight, _guard(through), epochs=2)

    _fit(tmp_path / "b", first, _guard())
    guard = _guard(resumed)
    _fit(tmp_path / "b", second, guard, ckpt_path=tmp_path / "b" / "epoch=0.ckpt", epochs=2)

    assert [_facts(record) for record in resumed] == [_facts(record) for record in through[24:]]
    assert any(record.decision.skip for record in resumed)
    assert same(weights_of(second), weights_of(straight))
    assert (guard.num_steps, guard.num_skipped) == (48, through[-1].totals.num_skipped)


def test_resumed_run_saves_the_same_state_as_one_that_ran_through(tmp_path):
    """Baselines, streaks and counts in the last checkpoint are equal."""
    _fit(tmp_path / "a", seeded(lambda: Net(FAULTS)), _guard(), epochs=2)
    _fit(tmp_path / "b", seeded(lambda: Net(FAULTS)), _guard())
    _fit(tmp_path / "b", Net(FAULTS), _guard(), ckpt_path=tmp_path / "b" / "epoch=0.ckpt", epochs=2)
    states = [torch.load(tmp_path / run / "epoch=1.ckpt", weights_only=True)["callbacks"]["GradGuard"] for run in "ab"]
    assert states[0] == states[1]


def test_resumed_run_without_the_state_would_decide_otherwise(tmp_path):
    """What the two tests above compare depends on the state: a fresh guard is still warming up."""
    resumed = []
    _fit(tmp_path, seeded(lambda: Net(FAULTS)), _guard(resumed))
    assert resumed[0].explosion_limit == float("inf")
    assert resumed[-1].explosion_limit < float("inf")


@pytest.mark.smoke
def test_checkpoint_is_read_with_weights_only(tmp_path):
    """Plain types, after alerts of every kind too."""
    _fit(tmp_path, Net(FAULTS), _guard())
    (state,) = torch.load(tmp_path / "epoch=0.ckpt", weights_only=True)["callbacks"]["GradGuard"]["guards"]
    assert state["totals"]["num_steps"] == 24
    assert "'num_seen': 24" in repr(state)  # the memory of the user's own detector


def test_checkpoint_in_the_middle_of_a_cooldown_keeps_silent_after_resuming(tmp_path):
    """An alert at the last step of the first epoch, a hit at the first step of the second: no second alert, and the first
    one is there again.
    """
    guards = [GradGuard(explosion=Explosion("skip", max_norm=1e3, ratio=None, cooldown=5)) for _ in range(2)]
    _fit(tmp_path, Net({23: "huge"}), guards[0])
    path = tmp_path / "epoch=0.ckpt"
    _fit(tmp_path, Net({0: "huge"}), guards[1], ckpt_path=path, epochs=2, faulty=False)
    assert (guards[1].alerts, guards[1].num_skipped) == (guards[0].alerts, 2)


def test_resume_with_another_clipper_warns_and_goes_on(tmp_path):
    """The rest of the state is restored."""
    _fit(tmp_path, Net(), GradGuard(clip=0.5), faulty=False)
    guard = GradGuard(clip=ClipValue(0.1))
    with pytest.warns(GuardWarning, match="holds ClipNorm for the clipper, which is ClipValue now"):
        _fit(tmp_path, Net(), guard, ckpt_path=tmp_path / "epoch=0.ckpt", epochs=2, faulty=False)
    assert guard.num_steps == 48


def test_resume_with_one_more_detector_warns_and_goes_on(tmp_path):
    """A detector that the checkpoint does not know starts without history."""
    _fit(tmp_path, Net(), GradGuard(vanishing=None), faulty=False)
    guard = GradGuard()
    with pytest.warns(GuardWarning, match="holds nothing for the detector `vanishing`"):
        _fit(tmp_path, Net(), guard, ckpt_path=tmp_path / "epoch=0.ckpt", epochs=2, faulty=False)
    assert guard.num_steps == 48


def test_resume_with_one_detector_less_goes_on(tmp_path):
    """State that nobody wants is left alone."""
    _fit(tmp_path, Net(), GradGuard(), faulty=False)
    guard = GradGuard(nonfinite=None, explosion=None, vanishing=None)
    _fit(tmp_path, Net(), guard, ckpt_path=tmp_path / "epoch=0.ckpt", epochs=2, faulty=False)
    assert guard.num_steps == 48


def test_resume_with_a_clipper_where_there_was_none_warns_and_goes_on(tmp_path):
    """Clipping begins with the resumed run."""
    _fit(tmp_path, Net(), GradGuard(), faulty=False)
    guard = GradGuard(clip=1e-3)
    with pytest.warns(GuardWarning, match="holds nothing for the clipper"):
        _fit(tmp_path, Net(), guard, ckpt_path=tmp_path / "epoch=0.ckpt", epochs=2, faulty=False)
    assert (guard.num_steps, guard.num_clipped) == (48, 24)


def test_resume_with_other_settings_of_a_detector_uses_the_new_ones(tmp_path):
    """The history is kept, the limit is computed from it anew."""
    _fit(tmp_path, Net(), GradGuard(), faulty=False)
    guard = GradGuard(explosion=Explosion("warn", max_norm=1e-6))
    _fit(tmp_path, Net(), guard, ckpt_path=tmp_path / "epoch=0.ckpt", epochs=2)
    assert guard.alerts[0].step == 24
    assert guard.alerts[0].limit == 1e-6


def test_resume_from_a_checkpoint_without_a_guard_starts_afresh(tmp_path):
    """A run that had no guard can get one."""
    module = Net()
    trainer = make_trainer(tmp_path)
    trainer.fit(module, make_batches(12))
    trainer.save_checkpoint(tmp_path / "plain.ckpt")
    guard = GradGuard()
    _fit(tmp_path, Net(), guard, ckpt_path=tmp_path / "plain.ckpt", epochs=2, faulty=False, batches=12)
    assert guard.num_steps == 12


def test_checkpoint_of_a_guarded_run_is_tested_without_a_warning(tmp_path):
    """`trainer.test` with a guard among its callbacks complains of nothing, and a fit after it starts afresh."""

    class Tested(Net):
        def test_step(self, batch, batch_idx):
            return None

    trainer = make_trainer(tmp_path, GradGuard())
    trainer.fit(Tested(), make_batches(4))
    trainer.save_checkpoint(tmp_path / "guarded.ckpt")
    guard = GradGuard()
    make_trainer(tmp_path, guard).test(Tested(), make_batches(2), ckpt_path=tmp_path / "guarded.ckpt", verbose=False)
    assert guard.num_steps == 0
    fit(tmp_path, Net(), guard)
    assert guard.num_steps == 12


def test_second_fit_of_the_same_trainer_goes_on_counting(tmp_path):
    """Totals, alerts and baselines live on, as the Trainer's own counters do."""
    guard, module = GradGuard(), Net({5: "nan"})
    trainer = make_trainer(tmp_path, guard)
    with pytest.warns(GradientWarning, match="at step 5 "):
        trainer.fit(module, make_batches(12))
    trainer.fit_loop.max_epochs = 2
    with pytest.warns(GradientWarning, match="at step 17 "):
        trainer.fit(module, make_batches(12))
    assert (guard.num_steps, guard.num_skipped) == (24, 2)
    assert [alert.step for alert in guard.alerts] == [5, 17]


def test_second_fit_after_a_stop_can_go_on(tmp_path):
    """The reason of the first stop does not stick to a fit that runs to its end."""
    guard, module = GradGuard(nonfinite="stop"), Net({5: "nan"})
    trainer = make_trainer(tmp_path, guard)
    with pytest.warns(GradientWarning, match="at step 5 "):
        trainer.fit(module, make_batches(12))
    assert guard.stopped_by is not None
    module.faults.clear()
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, make_batches(12))
    assert guard.stopped_by is None
    assert len(guard.alerts) == 1


def test_guard_in_a_new_trainer_starts_afresh(tmp_path):
    """A new run is a new history."""
    guard = GradGuard(clip=1e-3)
    fit(tmp_path, Net(), guard)
    fit(tmp_path, Net(), guard)
    assert (guard.num_steps, guard.num_clipped) == (12, 12)


def test_two_trainers_share_no_state_through_a_configured_detector(tmp_path):
    """A detector object given to two guards keeps no history of the first run."""
    explosion, limits = Explosion("warn"), []
    for _ in range(2):
        seen = []
        guard = GradGuard(nonfinite=NonFinite(), explosion=explosion, vanishing=Vanishing(), sinks=[seen.append])
        fit(tmp_path, seeded(Net), guard, batches=make_batches(20))
        limits.append([record.explosion_limit for record in seen])
    assert limits[0] == limits[1]


@pytest.mark.smoke
def test_checkpoint_in_the_middle_of_an_epoch_resumes_exactly(tmp_path):
    """Saved after 18 of 24 batches; the steps after it decide as in the run that went on."""
    through, resumed = [], []
    for name, seen, path in (("a", through, None), ("b", resumed, tmp_path / "a" / "step=18.ckpt")):
        checkpoint = ModelCheckpoint(dirpath=tmp_path / name, filename="{step}", save_top_k=-1, every_n_train_steps=18)
        guard = GradGuard(clip=0.5, sinks=[seen.append])
        trainer = make_trainer(tmp_path, guard, checkpoint, enable_checkpointing=True, max_steps=22)
        trainer.fit(seeded(Net), ResumableBatches(make_batches(24).batches), ckpt_path=path)
    tail = [(record.position.step, record.explosion_limit, record.totals) for record in through[18:]]
    assert [(record.position.step, record.explosion_limit, record.totals) for record in resumed] == tail
