"""Batches that caused a skip or a rollback are listed, and kept out where that is asked for."""

from __future__ import annotations

import json
from contextlib import nullcontext

import pytest
import torch
from lightning_package import Callback, LightningModule, ModelCheckpoint
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset
from toys import Net, fit, make_batches, make_trainer

from lightning_gradguard import Detector, GradGuard, NonFinite, Rollback, Verdict
from lightning_gradguard.errors import GuardWarning
from lightning_gradguard.trainer.conflicts import ConflictError
from lightning_gradguard.trainer.recovery import quarantine

pytestmark = pytest.mark.filterwarnings(
    "ignore::lightning_gradguard.GradientWarning", "ignore:The '.*_dataloader' does not have many workers"
)
NUM_SAMPLES, BATCH_SIZE, BAD = 24, 4, 13


class Samples(Dataset):
    """Each sample is its number and some features; one has a NaN."""

    def __len__(self) -> int:
        return NUM_SAMPLES

    def __getitem__(self, index: int):
        features = torch.randn(3, generator=torch.Generator().manual_seed(index))
        return index, features * (torch.nan if index == BAD else 1.0)


class Line(LightningModule):
    """Linear regression that remembers which samples it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(3, 1)
        self.seen: list[list[int]] = []

    def training_step(self, batch, batch_idx):
        number, features = batch
        self.seen.append(torch.as_tensor(number).reshape(-1).tolist())
        return (self.net(features) - 1).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def loader(**settings) -> DataLoader:
    """Shuffled batches of four."""
    return DataLoader(Samples(), **{"batch_size": BATCH_SIZE, "shuffle": True, **settings})


def listed(root) -> list[dict]:
    """The lines of the file."""
    path = root / "gradguard" / "quarantine.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.mark.parametrize(
    "settings",
    [{}, {"num_workers": 1}, {"num_workers": 1, "persistent_workers": True}, {"batch_size": None}, {"drop_last": True}],
)
def test_bad_batch_is_listed_with_its_samples(settings, tmp_path):
    """In every epoch, whatever the loader fetches ahead."""
    model = Line()
    trainer = fit(tmp_path, model, GradGuard(quarantine="list"), batches=loader(**settings), max_epochs=2)
    per_epoch = len(model.seen) // 2
    bad = [index for index, samples in enumerate(model.seen) if BAD in samples]
    assert len(bad) == 2
    assert [(line["epoch"], line["batch_idx"], line["samples"]) for line in listed(tmp_path)] == [
        (index // per_epoch, index % per_epoch, model.seen[index]) for index in bad
    ]
    assert {(line["rank"], line["reason"]) for line in listed(tmp_path)} == {(0, "nonfinite")}
    assert "process_dataloader" not in vars(trainer.strategy)


@pytest.mark.smoke
@pytest.mark.parametrize("settings", [{}, {"batch_size": None}, {"num_workers": 1}, {"batch_size": 1}])
def test_samples_of_a_bad_batch_are_kept_out_of_later_epochs(settings, tmp_path):
    """As many batches of the same size are trained on as before."""
    model, guard = Line(), GradGuard(quarantine="skip")
    fit(tmp_path, model, guard, batches=loader(**settings), max_epochs=4)
    first = next(index for index, samples in enumerate(model.seen) if BAD in samples)
    per_epoch = len(model.seen) // 4
    assert per_epoch == NUM_SAMPLES // (settings.get("batch_size", BATCH_SIZE) or 1)
    later = {sample for samples in model.seen[per_epoch:] for sample in samples}
    assert later == {*range(NUM_SAMPLES)} - {BAD}  # the others of its batch are known to be innocent
    assert BAD in model.seen[first]
    assert {len(samples) for samples in model.seen} == {settings.get("batch_size", BATCH_SIZE) or 1}
    assert guard.num_skipped == len(listed(tmp_path)) == 1


def test_order_of_samples_with_a_quarantine_is_the_one_without(tmp_path):
    """Random states are drawn from as before, until something is kept out."""
    seen = []
    for guard in (GradGuard(nonfinite=None), GradGuard(nonfinite=None, quarantine="skip")):
        torch.manual_seed(0)
        model = Line()
        fit(tmp_path, model, guard, batches=loader(), max_epochs=3)
        seen.append(model.seen)
    assert seen[0] == seen[1]


@pytest.mark.parametrize("through", ["checkpoint", "file"])
def test_samples_are_kept_out_when_the_run_is_resumed(through, tmp_path):
    """The checkpoint carries them, and the file of the same folder does."""
    checkpoint = ModelCheckpoint(tmp_path / "kept", every_n_epochs=1, filename="last")
    fit(tmp_path, Line(), GradGuard(quarantine="skip"), checkpoint, batches=loader())
    root = tmp_path / "elsewhere" if through == "checkpoint" else tmp_path
    model, guard = Line(), GradGuard(quarantine="skip")
    trainer = make_trainer(root, guard, max_epochs=3)
    with (
        pytest.warns(UserWarning, match="callbacks used to create the checkpoint")
        if through == "checkpoint"
        else nullcontext()
    ):
        trainer.fit(model, loader(), ckpt_path=tmp_path / "kept" / "last.ckpt" if through == "checkpoint" else None)
    assert BAD not in {sample for samples in model.seen for sample in samples}
    assert len(listed(tmp_path)) == 1
    assert guard.num_skipped == (through == "checkpoint")


def test_rollback_lists_its_batch_and_knows_the_samples_after_those_passed_over(tmp_path):
    """Batches that nobody saw are counted all the same."""
    rollback = Rollback(every_n_steps=1, confirm_steps=1, skip_batches=2)
    model = Line()
    guard = GradGuard(nonfinite="rollback", rollback=rollback, quarantine="list")
    fit(tmp_path, model, guard, batches=loader(shuffle=False), max_epochs=2)
    assert [line["samples"] for line in listed(tmp_path)] == [[12, 13, 14, 15]] * 2
    assert [line["batch_idx"] for line in listed(tmp_path)] == [3, 3]
    assert model.seen[-1] == [12, 13, 14, 15]  # the last two are passed over


def test_window_with_a_nan_blames_its_micro_batch_and_one_with_an_explosion_all(tmp_path):
    """A norm is that of all micro-batches together."""

    class Spiky(Line):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * (1e9 if 23 in batch[0] else 1)

    model = Spiky()
    guard = GradGuard(explosion="skip", quarantine="list")
    guard._settings.detectors[1]._warmup_steps = 2
    fit(tmp_path, model, guard, batches=loader(shuffle=False, batch_size=2), accumulate_grad_batches=3)
    lines = [(line["batch_idx"], line["samples"], line["reason"]) for line in listed(tmp_path)]
    assert lines[0] == (6, [12, 13], "nonfinite")
    assert lines[1:] == [(9, [18, 19], "explosion"), (10, [20, 21], "explosion"), (11, [22, 23], "explosion")]


def test_batches_that_show_no_samples_are_listed_without(tmp_path):
    """A loader of one's own."""
    fit(tmp_path, Net({5: "nan"}), GradGuard(quarantine="list"))
    (line,) = listed(tmp_path)
    assert (line["epoch"], line["batch_idx"], line["step"], line["samples"]) == (0, 5, 5, None)


class Stream(IterableDataset):
    """Nobody can tell its samples apart."""

    def __iter__(self):
        return iter([(0, torch.ones(3))] * 8)


@pytest.mark.parametrize(
    ("batches", "what"),
    [
        (DataLoader(Stream(), batch_size=2), "the iterable data set Stream"),
        (make_batches(4), "a Batches"),
        ([loader(), loader()], "2 loaders at once"),
    ],
)
def test_data_whose_samples_cannot_be_kept_out_is_refused(batches, what, tmp_path):
    """The message says what is needed, and what works."""
    with pytest.raises(ConflictError, match=f"`quarantine='skip'` needs one torch DataLoader.* got {what}.*'list'"):
        fit(tmp_path, Line(), GradGuard(quarantine="skip"), batches=batches)


def test_unknown_mode_is_refused():
    """The message names the two."""
    with pytest.raises(ValueError, match="`quarantine` must be 'list', 'skip' or None, got 'drop'"):
        GradGuard(quarantine="drop")


def test_file_that_cannot_be_written_is_one_warning_and_the_samples_are_kept_out(tmp_path):
    """Training goes on; a folder is where the file should be."""
    (tmp_path / "gradguard").mkdir()
    (tmp_path / "gradguard" / "quarantine.jsonl").mkdir()
    model, guard = Line(), GradGuard(quarantine="list")
    with pytest.warns(GuardWarning, match=r"can't be used.*quarantine.jsonl") as caught:
        fit(tmp_path, model, guard, batches=loader(), max_epochs=2)
    assert len([warning for warning in caught if warning.category is GuardWarning]) == 1
    assert guard.num_skipped == 2


def test_batch_that_is_none_does_not_shift_the_samples(tmp_path):
    """Hooks are not called for it."""

    def collate(samples):
        return None if samples[0][0] == 4 else torch.utils.data.default_collate(samples)

    with pytest.warns(UserWarning, match="train_dataloader yielded None"):
        fit(
            tmp_path,
            Line(),
            GradGuard(quarantine="list"),
            batches=DataLoader(Samples(), batch_size=BATCH_SIZE, collate_fn=collate),
        )
    assert [line["samples"] for line in listed(tmp_path)] == [[12, 13, 14, 15]]


def test_validation_data_is_left_alone_and_a_dry_run_writes_nothing(tmp_path):
    """Only training is watched."""

    class Validated(Line):
        def validation_step(self, batch, batch_idx):
            pass

    val_loader = loader(shuffle=False)
    for settings in ({"max_epochs": 1}, {"fast_dev_run": 5}):
        trainer = make_trainer(tmp_path / str(len(settings)), GradGuard(quarantine="skip"), **settings)
        trainer.fit(Validated(), loader(shuffle=False), val_loader)
    assert type(val_loader.batch_sampler) is BatchSampler
    assert len(list(tmp_path.rglob("quarantine.jsonl"))) == 1


def test_batches_long_ago_are_forgotten(tmp_path, monkeypatch):
    """Memory does not grow with the epoch."""
    monkeypatch.setattr(quarantine, "_MAX_BATCHES", 2)
    guard = GradGuard(quarantine="list")
    sizes = []

    class Sizes(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            sizes.append(len(guard._fit._quarantine._samples))

    fit(tmp_path, Line(), Sizes(), guard, batches=loader(shuffle=False))
    assert max(sizes) == 2
    assert [line["samples"] for line in listed(tmp_path)] == [[12, 13, 14, 15]]


@pytest.mark.filterwarnings("ignore:.*`dataloader_iter`")
def test_module_that_fetches_its_own_batches_is_refused_or_warned_of(tmp_path):
    """Nobody knows what it has seen."""

    class Fetches(Net):
        def training_step(self, dataloader_iter):
            batch, batch_idx, _ = next(dataloader_iter)
            return super().training_step(batch, batch_idx)

    with pytest.raises(ConflictError, match="`training_step` takes `dataloader_iter`"):
        fit(tmp_path, Fetches(), GradGuard(quarantine="skip"))
    with pytest.warns(GuardWarning, match="No batches are listed in quarantine"):
        fit(tmp_path, Fetches({3: "nan"}), GradGuard(quarantine="list"))
    assert listed(tmp_path) == []


def test_bad_batch_is_listed_where_nothing_is_replayed(tmp_path):
    """Its number is known all the same."""
    fit(tmp_path, Net({3: "nan"}), GradGuard(quarantine="list", max_replays=0), batches=make_batches(6))
    assert [line["batch_idx"] for line in listed(tmp_path)] == [3]


class Warns(Detector):
    """Has something to say of each step."""

    name = "warns"

    def observe(self, measurement):
        return Verdict(self.name, 1.0, 0.0, "as always", "none")


def test_batch_is_listed_for_the_finding_that_skips_its_step(tmp_path):
    """Another one that only warns of it is no reason."""
    fit(tmp_path, Line(), GradGuard(quarantine="list", detectors=[Warns("warn")]), batches=loader())
    assert [line["reason"] for line in listed(tmp_path)] == ["nonfinite"]


def test_lines_that_can_not_be_read_are_said_when_the_list_is_taken_up_again(tmp_path):
    """All others count."""
    (tmp_path / "gradguard").mkdir()
    (tmp_path / "gradguard" / "quarantine.jsonl").write_text('{"samples": [1]}\n{"sam\n')
    model = Line()
    with pytest.warns(GuardWarning, match=r"1 line left out.*All other lines count"):
        fit(tmp_path, model, GradGuard(quarantine="skip"), batches=loader())
    assert 1 not in {sample for samples in model.seen for sample in samples}


class TwoBad(Samples):
    """Another sample has a NaN as well."""

    def __getitem__(self, index):
        number, features = super().__getitem__(index)
        return number, features * (torch.nan if index == 5 else 1.0)


class Raising(Line):
    """Does not bear NaN."""

    def training_step(self, batch, batch_idx):
        _, features = batch
        return -torch.distributions.Normal(self.net(features), 1.0).log_prob(torch.zeros(())).mean()


def test_rows_of_a_step_that_raised_are_kept_out_also_where_no_alert_tells_of_it(tmp_path):
    """The second exception is within the cooldown of the first."""
    guard = GradGuard(quarantine="skip", nonfinite=NonFinite("skip", cooldown=100))
    fit(tmp_path, Raising(), guard, batches=DataLoader(TwoBad(), batch_size=BATCH_SIZE))
    assert (guard.num_skipped, len(guard.alerts)) == (2, 1)
    assert [line["samples"] for line in listed(tmp_path)] == [[5], [BAD]]
