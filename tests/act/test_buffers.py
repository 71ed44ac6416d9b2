"""Buffers that a bad forward pass has damaged."""

from __future__ import annotations

import math

import torch
from torch import nn

from lightning_gradguard.act.buffers import MAX_NUMEL, BufferRepair


def test_repair_nothing_damaged_changes_nothing():
    """A buffer that moved but is finite stays where it is."""
    norm = nn.BatchNorm1d(2)
    repair = BufferRepair(norm.named_buffers())
    norm(torch.randn(4, 2))
    moved = norm.running_mean.clone()
    assert repair.repair_() == ()
    assert torch.equal(norm.running_mean, moved)


def test_repair_damaged_buffer_goes_back_to_the_last_good_value():
    """In place: the module's own tensors are repaired, and only the damaged one."""
    norm = nn.BatchNorm1d(2)
    repair = BufferRepair(norm.named_buffers())
    norm(torch.randn(4, 2))
    repair.remember()
    repair.confirm()
    mean, variance = norm.running_mean.clone(), norm.running_var.clone()
    norm.running_mean[1] = math.inf
    norm.running_var.mul_(2)
    assert repair.repair_() == ("running_mean",)
    assert torch.equal(norm.running_mean, mean)
    assert torch.equal(norm.running_var, 2 * variance)


def test_repair_remembered_damage_is_left():
    """What was infinite before, as a mask of attention is, is no damage of this step."""
    mask = torch.tensor([0.0, -math.inf])
    repair = BufferRepair([("mask", mask)])
    assert repair.repair_() == ()
    mask[0] = math.nan
    assert repair.repair_() == ("mask",)
    assert mask.tolist() == [0.0, -math.inf]


def test_repair_model_without_buffers_does_nothing():
    """The common case."""
    repair = BufferRepair([])
    repair.remember()
    repair.confirm()
    assert repair.repair_() == ()


def test_repair_remembered_but_not_confirmed_values_are_not_put_back():
    """The step they come from may turn out bad later."""
    mean = torch.ones(1)
    repair = BufferRepair([("mean", mean)])
    mean.fill_(math.nan)
    repair.remember()
    assert repair.repair_() == ("mean",)
    assert mean.item() == 1.0


def test_repair_leaves_integers_empty_and_large_buffers_alone():
    """Counters can't be NaN, and tables are not copied."""
    large = torch.full((MAX_NUMEL + 1,), 1.0)
    repair = BufferRepair([("count", torch.tensor(3)), ("empty", torch.ones(0)), ("table", large)])
    large.fill_(math.nan)
    assert repair.repair_() == ()


def test_remember_on_meta_reads_nothing():
    """The copies of a healthy step are queued on the device."""
    BufferRepair([("mean", torch.ones(3, device="meta"))]).remember()
