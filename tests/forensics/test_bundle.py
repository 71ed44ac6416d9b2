"""A bad step as a file: what is in it, what is left out, and that it can be replayed."""

from __future__ import annotations

import math
import os
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

from lightning_gradguard.forensics.bundle import Bundle, num_bytes, plain_tree, versions
from lightning_gradguard.forensics.rerun import rerun

ALERT = {"kind": "nonfinite", "step": 3, "action": "skip", "message": "m", "remedy": "r", "parameters": [], "culprit": None}


class Divides(nn.Module):
    """Divides by the mean of each row, which is zero for a row of zeros."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 1)
        self.norm = nn.BatchNorm1d(1)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return nn.functional.mse_loss(self.norm(self.layer(x / x.mean(1, keepdim=True))), y)


class Pair(NamedTuple):
    """A batch of a kind that pickles by its class."""

    x: Any
    y: Any


def entry(batch, batch_idx=0):
    """One micro-batch."""
    return {"batch": batch, "batch_idx": batch_idx, "rng": torch.get_rng_state(), "cuda_rng": None}


def bad_batch():
    """Row 2 is zero."""
    x = torch.rand(6, 4) + 0.5
    x[2] = 0.0
    return x, torch.zeros(6, 1)


def test_bundle_comes_back_as_it_was(tmp_path):
    """Read with `weights_only=True`, and nothing else is left in the folder."""
    module = Divides()
    bundle = Bundle(ALERT, {"clip": "None"}, versions())
    room = bundle.take("batches", [entry(bad_batch())], 1 << 20)
    bundle.take("model", module.state_dict(), room)
    path = tmp_path / "deep" / "a.bundle.pt"
    bundle.save(path)
    again = Bundle.load(path)
    assert again.alert == ALERT
    assert again.left_out == []
    assert torch.equal(again.batches[0]["batch"][0], bundle.batches[0]["batch"][0])
    assert again.model.keys() == module.state_dict().keys()
    assert [entry.name for entry in path.parent.iterdir()] == ["a.bundle.pt"]
    assert set(torch.load(path, weights_only=True)["versions"]) >= {"torch", "python", "lightning_gradguard"}


def test_what_has_no_room_is_left_out_and_said():
    """With sizes."""
    bundle = Bundle(ALERT)
    room = bundle.take("batches", [entry(torch.zeros(256, 1024))], 2 << 20)
    assert bundle.take("model", {"w": torch.zeros(1 << 20)}, room) == room
    assert bundle.model is None
    assert bundle.left_out == ["model: 4.0 MiB, with 1.0 MiB left"]


def test_failed_write_leaves_neither_file_nor_draft(tmp_path, monkeypatch):
    """As with a disk that is full."""

    def fail(*_):
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no space"):
        Bundle(ALERT).save(tmp_path / "a.bundle.pt")
    assert list(tmp_path.iterdir()) == []


def test_tree_of_all_sorts_becomes_plain():
    """Containers stay, subclasses become their base, and what is neither tensor nor plain is named."""
    left_out = []
    tree = {
        "p": Pair(torch.ones(2), np.float64(2.0)),
        3: [np.arange(2), "s", None, True],
        "o": {1, 2},
        (1,): nn.Parameter(torch.ones(1)),
    }
    plain = plain_tree(tree, left_out, "batch")
    assert type(plain["p"]) is tuple
    assert type(plain["p"][1]) is float
    assert plain[3][0].tolist() == [0, 1]
    assert plain["o"] is None
    assert left_out == ["batch['o']: a set"]
    assert num_bytes(tree) == 8 + 16 + 4
    assert type(plain["(1,)"]) is torch.Tensor


def test_file_that_is_no_bundle_is_refused(tmp_path):
    """With where bundles are."""
    torch.save({"state_dict": {}}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="not a bundle of format 1"):
        Bundle.load(tmp_path / "x.pt")


@pytest.mark.smoke
def test_rerun_names_the_operator_and_the_row():
    """On a fresh module, without a Trainer; the module's buffers are as they were then."""
    torch.manual_seed(0)
    trained = Divides()
    bundle = Bundle(ALERT, batches=[entry(bad_batch())], model=trained.state_dict())
    module = Divides()
    again = rerun(module, bundle)
    assert math.isnan(again.losses[0])
    assert again.culprit.op == "div"
    assert again.culprit.samples == (2,)
    assert module.norm.running_mean.isfinite().all()


def test_rerun_of_an_explosion_names_the_sample():
    """From the healthy batch that is in the bundle too."""
    torch.manual_seed(0)
    x, y = torch.rand(6, 4) + 0.5, torch.zeros(6, 1)
    wrong = y.clone()
    wrong[4] = 1000.0
    bundle = Bundle({**ALERT, "kind": "explosion"}, batches=[entry((x, wrong))], healthy=(x, y))
    again = rerun(Divides(), bundle)
    assert again.culprit.cause == "sample"
    assert again.culprit.samples == (4,)


def test_rerun_of_a_step_that_is_in_order_blames_nobody():
    """For a bundle whose fault was elsewhere."""
    x, y = torch.rand(6, 4) + 0.5, torch.zeros(6, 1)
    again = rerun(Divides(), Bundle(ALERT, batches=[entry((x, y)), entry((x, y), 1)]))
    assert again.culprit is None
    assert len(again.losses) == 2


class _Manual(Divides):
    automatic_optimization = False


@pytest.mark.parametrize(
    ("module", "batches", "match"),
    [(nn.Linear(1, 1), [1], "training_step"), (_Manual(), [1], "manual optimization"), (Divides(), [], "no batches")],
)
def test_rerun_says_what_does_not_fit(module, batches, match):
    """Before anything is run."""
    with pytest.raises(ValueError, match=match):
        rerun(module, Bundle(ALERT, batches=batches))


class Raises(Divides):
    """Does not bear NaN."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        if bool(loss.isnan()):
            raise ValueError("NaN")
        return loss


def test_rerun_of_a_step_that_raises_names_the_operator():
    """Its loss counts as NaN, as the guard has counted it."""
    torch.manual_seed(0)
    again = rerun(Raises(), Bundle(ALERT, batches=[entry(bad_batch())]))
    assert [math.isnan(loss) for loss in again.losses] == [True]
    assert again.culprit.op == "div"


class Picky(Divides):
    """Refuses a batch without anything large."""

    def training_step(self, batch, batch_idx):
        if float(batch[1].max()) < 100.0:
            raise ValueError("nothing large")
        return super().training_step(batch, batch_idx)


def test_rerun_of_an_explosion_whose_sample_can_not_be_exchanged_goes_on_without_that():
    """What the step itself shows is there."""
    torch.manual_seed(0)
    x, y = torch.rand(6, 4) + 0.5, torch.zeros(6, 1)
    y[4] = 1000.0
    again = rerun(Picky(), Bundle({**ALERT, "kind": "explosion"}, batches=[entry((x, y))]))
    assert len(again.losses) == 1
    assert again.norm > 100.0
    assert again.culprit is None or again.culprit.samples is None
