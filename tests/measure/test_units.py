"""Norms of output units from flat shards, cut anywhere, are those of whole tensors."""

from __future__ import annotations

import pytest
import torch

from lightning_gradguard import Guard
from lightning_gradguard.measure.distributed import is_sharded
from lightning_gradguard.measure.shards import FlatShard
from lightning_gradguard.measure.units import spread, unit_norms

SHAPES = [(5, 3), (7,), (), (1, 4), (2, 3, 4), (4, 1)]


class Cut(FlatShard):
    """A range of a whole tensor."""

    owner = None
    share = 1.0

    def __init__(self, whole, start, stop):
        self.shape, self.start = whole.shape, start if stop > start else 0
        self._here = whole.reshape(-1)[start:stop]

    @property
    def grad(self):
        return self._here

    @grad.setter
    def grad(self, value):
        self._here = None

    def weight(self):
        return self._here


def cuts(shape):
    """A tensor of this shape in three pieces, wherever the cuts fall; some are empty."""
    whole = torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))
    numel = whole.numel()
    for first in range(numel + 1):
        for second in range(first, numel + 1):
            yield whole, [Cut(whole, 0, first), Cut(whole, first, second), Cut(whole, second, numel)]


@pytest.mark.parametrize("shape", SHAPES)
def test_unit_norms_of_pieces_add_up_to_those_of_the_whole(shape):
    """Their squares do, unit by unit."""
    for whole, pieces in cuts(shape):
        (expected,) = unit_norms([whole], [whole], torch.float32)
        norms = unit_norms([piece.grad for piece in pieces], pieces, torch.float32)
        torch.testing.assert_close(sum(norm.square() for norm in norms).sqrt(), expected.reshape(-1))


@pytest.mark.parametrize("shape", SHAPES)
def test_spread_multiplies_each_element_by_the_value_of_its_unit(shape):
    """Whatever part of the unit is here."""
    for whole, pieces in cuts(shape):
        num_units = shape[0] if len(shape) > 1 else 1
        values = torch.arange(1.0, num_units + 1)
        spreaded = spread([values] * 3, [piece.grad for piece in pieces], pieces)
        scaled = torch.cat([value * piece.grad for value, piece in zip(spreaded, pieces, strict=True)])
        expected = whole * (values.view(-1, *[1] * (len(shape) - 1)) if len(shape) > 1 else 1.0)
        torch.testing.assert_close(scaled, expected.reshape(-1))


def test_shard_is_sharded_on_one_rank_too():
    """Its gradient is nowhere else, as under an engine on one device."""
    assert is_sharded([Cut(torch.ones(2), 0, 2)])
    assert not is_sharded([torch.ones(2)])


def test_guard_of_flattened_parameters_without_an_engine_is_refused():
    """Rather than to measure one rank's piece."""
    model = torch.nn.Linear(2, 1)
    model.weight._fsdp_flattened = True
    with pytest.raises(ValueError, match="`weight`, which FSDP1 or DeepSpeed has cut up"):
        Guard(model.named_parameters())
