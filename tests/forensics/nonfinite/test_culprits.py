"""Ways of damage, frames, samples and their proofs, in real fits."""

from __future__ import annotations

import json
import random
import warnings

import numpy as np
import torch
import zoo
from lightning.pytorch import LightningModule, Trainer
from test_investigation import QUIET, Cosine, batches, fit
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_gradguard import GradGuard, GuardWarning

NAN = float("nan")


class Line(LightningModule):
    """A linear layer and whatever else."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(zoo.WIDTH, 1)
        self.add()

    def add(self):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)


def culprit_of(module, batch, **settings):
    """Of one step on one batch."""
    loader = DataLoader([batch], batch_size=None, collate_fn=lambda batch: batch)
    return fit(module, GradGuard(**settings), loader).alerts[0].culprit


class Dropped(Line):
    """A row of zeros becomes NaN, goes through a linear layer, and is left out."""

    def add(self):
        self.unit = Cosine()

    def training_step(self, batch, batch_idx):
        good = batch.abs().sum(1) > 0
        return self.net(self.unit(batch))[good].square().mean()


def zero_row(row=3):
    """A batch with a sample of zeros."""
    x = torch.randn(zoo.BATCH, zoo.WIDTH, generator=torch.Generator().manual_seed(0))
    x[row] = 0.0
    return x


def test_damage_that_the_loss_leaves_out_is_named_where_it_is_born_with_its_way():
    """Born, dropped, back in."""
    culprit = culprit_of(Dropped(), zero_row())
    assert (culprit.phase, culprit.module, culprit.op, culprit.samples) == ("forward", "unit", "div", (3,))
    assert "`index` in `training_step`, test_culprits.py" in culprit.message
    assert "leaves it out of the loss, but it comes into the gradients through `AddmmBackward0` in `net`" in culprit.message
    assert "finite inputs" not in culprit.message


def test_damage_that_nobody_saw_being_dropped_is_told_all_the_same():
    """A loss of rows that were read through a NumPy array."""

    class Detour(Dropped):
        def training_step(self, batch, batch_idx):
            hidden = self.net(self.unit(batch))
            return hidden.square().mean() * 0.0 + hidden.detach()[:2].mean()

    culprit = culprit_of(Detour(), zero_row())
    assert (culprit.module, culprit.op) == ("unit", "div")


def test_frames_are_the_users_calls_innermost_first():
    """Helpers by name, `training_step` last; libraries are folded."""

    class Helps(Line):
        def training_step(self, batch, batch_idx):
            return self._energy(self.net(batch))

        def _energy(self, hidden):
            return self._logs(hidden * 0.0).mean()

        def _logs(self, hidden):
            return sum(torch.log(value) for value in [hidden])

    culprit = culprit_of(Helps(), zero_row())
    names = [frame.function for frame in culprit.frames if not frame.function.startswith("<")]
    assert names == ["Helps._logs", "Helps._energy", "Helps.training_step"]
    assert culprit.frames[0].source == culprit.source == "return sum(torch.log(value) for value in [hidden])"
    assert "in `Helps._logs`, test_culprits.py" in culprit.message
    assert len(culprit.frames) <= 5


def test_parameters_of_as_many_rows_as_samples_have_no_samples():
    """Neither certain nor probable ones."""

    class Splats(Line):
        def add(self):
            start = torch.randn(zoo.BATCH, zoo.WIDTH)
            start[3] = 0.0
            self.rotation, self.unit = nn.Parameter(start), Cosine()

        def training_step(self, batch, batch_idx):
            return (self.net(batch) * self.unit(self.rotation)).square().mean()

    culprit = culprit_of(Splats(), torch.randn(zoo.BATCH, zoo.WIDTH))
    assert (culprit.module, culprit.samples, culprit.probable_samples) == ("unit", None, None)
    assert "row" not in culprit.message


def test_samples_that_can_not_be_followed_are_proved_by_replays():
    """The loss of all is one number."""

    class Total(Line):
        def training_step(self, batch, batch_idx):
            return F.mse_loss(self.net(batch[0]), batch[1])

    y = torch.zeros(zoo.BATCH, 1)
    y[[2, 5]] = 1e30
    culprit = culprit_of(Total(), (torch.randn(zoo.BATCH, zoo.WIDTH), y))
    assert (culprit.op, culprit.samples) == ("mse_loss", (2, 5))


def test_samples_that_fail_only_together_are_not_certain():
    """Two that are equal: the distance between them has no slope."""

    class Pairs(Line):
        def training_step(self, batch, batch_idx):
            hidden = self.net(batch).expand(-1, 2)
            upper = torch.ones(zoo.BATCH, zoo.BATCH).triu(1).bool()
            return (hidden[:, None] - hidden[None]).square().sum(-1)[upper].sqrt().mean()

    x = torch.randn(zoo.BATCH, zoo.WIDTH)
    x[5] = x[2]
    assert culprit_of(Pairs(), x).samples is None


def test_sample_dim_says_where_samples_lie():
    """Features first."""

    class Columns(Line):
        def training_step(self, batch, batch_idx):
            return self.net(batch.log().T).mean()

    x = torch.rand(zoo.WIDTH, 5) + 0.1
    x[2, 4] = 0.0
    assert culprit_of(Columns(), x, sample_dim=1).samples == (4,)
    assert culprit_of(Columns(), x, sample_dim={"batch": 1}).samples == (4,)


def test_language_model_with_time_first_is_told_apart():
    """By what meets in the recurrence."""

    class Tagger(Line):
        def add(self):
            self.rnn = nn.GRU(zoo.WIDTH, zoo.WIDTH)

        def training_step(self, batch, batch_idx):
            x, y = batch
            return F.mse_loss(self.net(self.rnn(x.log())[0])[..., 0], y)

    x = torch.rand(7, 5, zoo.WIDTH) + 0.1
    x[6, 4, 0] = 0.0
    assert culprit_of(Tagger(), (x, torch.zeros(7, 5))).samples == (4,)


def test_quarantine_leaves_out_the_certain_rows_alone(tmp_path):
    """Three bad samples of 64."""

    class Logs(Line):
        def training_step(self, batch, batch_idx):
            x, y = batch
            return ((self.net(x)[:, 0] - y.log()) ** 2).mean()

    draw = torch.Generator().manual_seed(1)
    y = torch.rand(64, generator=draw) + 0.1
    y[17], y[40], y[41] = 0.0, -1.0, 0.0
    data = TensorDataset(torch.randn(64, zoo.WIDTH, generator=draw), y)
    guard = GradGuard(quarantine="skip", max_replays=20)
    settings = {**QUIET, "default_root_dir": tmp_path, "accelerator": "cpu"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        Trainer(max_epochs=4, callbacks=[guard], **settings).fit(Logs(), DataLoader(data, batch_size=16, shuffle=True))
    lines = (tmp_path / "gradguard" / "quarantine.jsonl").read_text().splitlines()
    listed = {sample for line in lines for sample in json.loads(line)["samples"]}
    assert listed == {17, 40, 41}


def test_batch_of_a_subclass_with_attributes_is_replayed():
    """And its samples are known."""

    class Named(torch.Tensor):
        pass

    class Uses(Line):
        def training_step(self, batch, batch_idx):
            return (self.net(batch) * batch.scale).mean() + batch.log().as_subclass(
                torch.Tensor
            ).mean() * self.net.bias.mean()

    x = (torch.rand(zoo.BATCH, zoo.WIDTH) + 0.1).as_subclass(Named)
    x.scale = 2.0
    x[3, 1] = 0.0
    culprit = culprit_of(Uses(), x)
    assert (culprit.op, culprit.samples, culprit.reproduced) == ("log", (3,), True)


def test_batch_of_an_iterator_is_not_replayed_and_says_why():
    """The step has used it up."""

    class Reads(Line):
        def training_step(self, batch, batch_idx):
            return sum(self.net(part).log().mean() for part in batch["parts"])

    batch = {"parts": iter([torch.zeros(2, zoo.WIDTH)] * 2)}
    guard = GradGuard()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        module = Reads()
        nn.init.constant_(module.net.bias, -1.0)
        trainer = Trainer(max_epochs=1, accelerator="cpu", callbacks=[guard], **QUIET)
        trainer.fit(module, DataLoader([batch], batch_size=None, collate_fn=lambda batch: batch))
    said = [str(entry.message) for entry in caught if issubclass(entry.category, GuardWarning)]
    assert any("`batch['parts']` is an iterator, which the step has used up" in text for text in said)
    assert guard.alerts[0].culprit is None


def test_global_random_states_are_those_from_before_the_step():
    """Of python and numpy."""

    class Draws(zoo.Zoo):
        def predict(self, x):
            noise = random.random() + np.random.rand() + np.random.randn()  # noqa: NPY002 - as such code is written
            return self.net(x) * noise / (x.abs().sum(1, keepdim=True) > 0)

    guard = fit(Draws(), GradGuard(), batches(bad={2}))
    assert guard.alerts[0].culprit.reproduced
    assert guard.alerts[0].culprit.error == 0.0
