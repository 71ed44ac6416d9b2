"""Each engine with a NaN loss on one of two ranks, for nox with other versions; the other files have the rest."""

from __future__ import annotations

import fsdp1_scenarios
import pytest
import scenarios
import torch

# slow: the other files say it, too. The time is for two processes that import everything beside others that do.
pytestmark = [pytest.mark.smoke, pytest.mark.slow, pytest.mark.timeout(900)]
TRAINS_FSDP2_ON_CPUS = not torch.__version__.startswith("2.6.")
"""torch 2.6 ends in an error of its own where a module is cut up among CPUs."""


def play():
    """What each engine has made of it, by its name."""
    engines = ["ddp", "fsdp2", "tp"] if TRAINS_FSDP2_ON_CPUS else ["ddp", "tp"]
    found = {engine: scenarios.faulty(engine, "loss") for engine in engines}
    found["fsdp1"] = fsdp1_scenarios.faulty(at=scenarios.BAD_BATCH)
    return found


@pytest.fixture(scope="module")
def played(once_on_ranks):
    """In one process group."""
    return once_on_ranks("smoke", 2, play)


@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "tp", "fsdp1"])
def test_nan_loss_on_one_rank_skips_the_step_on_both(engine, played):
    """And only that one, with an alert that names the rank."""
    if engine == "fsdp2" and not TRAINS_FSDP2_ON_CPUS:
        pytest.skip("not with this version of torch on a CPU")
    for rank in played:
        (alert,) = rank[engine]["alerts"]
        assert (alert[0], alert[-1]) == ("nonfinite", 1)
        assert (rank[engine]["num_steps"], rank[engine]["num_skipped"]) == (scenarios.NUM_STEPS, 1)
