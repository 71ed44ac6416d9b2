"""Of the diverging trainings at least 90 % come back with rollback at its default settings, and none without a guard."""

from __future__ import annotations

import logging

import pytest
from lightning.pytorch import seed_everything

from benchmarks.recovery.outcome import play
from benchmarks.recovery.trainings import FAULTS, NETWORKS


@pytest.fixture(scope="module")
def outcomes():
    """Every fault in every training, once."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    seed_everything(0, verbose=False)
    return {(fault, network): play(network, fault, 0) for fault in FAULTS for network in NETWORKS}


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_diverging_trainings_come_back_with_rollback(outcomes):
    """Within 5 % of the loss that they would have had."""
    back = [case for case, outcome in outcomes.items() if outcome.came_back]
    assert len(back) >= 0.9 * len(outcomes), set(outcomes) - set(back)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_diverging_trainings_without_a_guard_do_not(outcomes):
    """So the faults are ones."""
    assert [case for case, outcome in outcomes.items() if outcome.needed_no_guard] == []
