"""Two ranks go back together, to the same state bit for bit, whichever of them saw the fault."""

from __future__ import annotations

import pytest
from ranks import on_ranks
from rollback_scenarios import play


@pytest.fixture(scope="module")
def played(tmp_path_factory):
    """All scenarios, in one process group."""
    ranks = on_ranks(2, play, str(tmp_path_factory.mktemp("kept")))
    return lambda name: [_without_error(name, found[name]) for found in ranks]


def _without_error(name, found):
    assert "error" not in found, f"{name}: {found['error']}"
    return found


@pytest.mark.parametrize("name", ["ddp-memory", "ddp-disk", "fsdp2-memory", "fsdp2-disk", "tp-memory"])
def test_fault_on_one_rank_takes_all_back_to_the_same_state(name, played):
    """After batch 4 weights and each rank's optimizer state are those after batch 1; batch 5 is passed over."""
    first, second = played(name)
    assert first["weights"] == second["weights"]
    for rank in (first, second):
        assert rank["weights"][4] == rank["weights"][1] != rank["weights"][3]
        assert rank["states"][4] == rank["states"][1] != rank["states"][3]
        assert rank["alerts"] == [["nonfinite", "rollback"], ["rollback", "rollback"]]
        assert rank["global_step"] == len(rank["weights"]) == 7


@pytest.mark.parametrize("mode", ["ddp", "fsdp2"])
def test_snapshots_of_several_ranks_are_resumed_from(mode, played):
    """The latest good one is what the next run begins with, on both ranks."""
    for rank in played(f"{mode}-disk"):
        assert rank["resumed"] in rank["weights"]
        assert not [name for name in rank["files"] if name.endswith(".part")]


def test_folder_that_one_rank_can_not_write_is_an_alert_on_all(played):
    """They agree that there is no snapshot, and training goes on."""
    for rank in played("ddp-refused"):
        assert rank["alerts"] == [["snapshot", "warn"], ["nonfinite", "rollback"]]
        assert rank["global_step"] == 8


def test_samples_of_one_ranks_bad_batch_are_listed_once_and_kept_out_on_both(played):
    """Wherever the sampler of a later epoch sends them."""
    ranks = played("quarantine")
    (line,) = ranks[0]["lines"]
    assert 5 in line["samples"]
    assert ranks[line["rank"]]["seen"][line["batch_idx"]] == line["samples"]
    for rank in ranks:
        assert rank["num_skipped"] == 1
        assert len(rank["seen"]) == 12
        assert not set(line["samples"]) & {sample for batch in rank["seen"][4:] for sample in batch}
