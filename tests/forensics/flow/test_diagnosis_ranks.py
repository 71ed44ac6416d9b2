"""Two ranks over gloo: one of them has the outlying sample, and both say so."""

from __future__ import annotations

from diagnosis_scenarios import BAD_BATCH, BAD_RANK, BAD_ROW, play
from ranks import on_ranks


def test_sample_of_one_rank_is_named_on_all_and_written_by_that_rank():
    """With row and rank; its batch is in the bundle."""
    played = on_ranks(2, play)
    for found in played:
        assert found["culprit"] == ["sample", [BAD_ROW], BAD_RANK]
        assert found["alerts"] == 1
    names = {name for found in played for name in found["bundles"]}
    assert names == {f"explosion-step{BAD_BATCH}-rank{BAD_RANK}.bundle.pt"}
