"""Two ranks over gloo: one of them has the bad sample, and all of them know."""

from __future__ import annotations

import pytest
from rank_scenarios import BAD_RANK, play
from ranks import on_ranks


@pytest.fixture(scope="module")
def played():
    """Each rank's findings."""
    return on_ranks(2, play)


@pytest.mark.parametrize("mode", ["ddp", "gathers", "fsdp2"])
def test_culprit_on_one_rank_is_told_on_all(mode, played):
    """With rank, sample and operator; also where `training_step` has its own collectives, and where weights are shards."""
    for found in played:
        assert found[mode]["culprit"] == ["forward", "unit", "div", [3], BAD_RANK]
        assert "culprit: `div` in `unit`" in found[mode]["message"]
        assert found[mode]["leaves_no_trace"]


@pytest.mark.parametrize("mode", ["ddp", "gathers"])
def test_gradients_of_a_replay_are_compared_as_ddp_averages_them(mode, played):
    """Ranks replay alone, without DDP."""
    for found in played:
        assert found[mode]["reproduced"] == [True, pytest.approx(0.0, abs=1e-6)]


def test_replaying_every_step_under_ddp_leaves_no_trace(played):
    """On healthy batches."""
    for found in played:
        assert found["torture"] == {"leaves_no_trace": True, "number": 5}
