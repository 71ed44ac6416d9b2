"""Two ranks over gloo: norms, decisions and their agreement. What each rank did stands in `scenarios.py`."""

from __future__ import annotations

import pytest
from ranks import on_ranks
from scenarios import BAD_BATCH, NUM_STEPS, play, reference_norms


@pytest.fixture(scope="module")
def played():
    """Each scenario's findings, by rank; all are played in one process group."""
    ranks = on_ranks(2, play, 2)
    return lambda name: _without_error([found[name] for found in ranks])


@pytest.fixture(scope="module")
def played_by_four():
    """The same for four ranks."""
    ranks = on_ranks(4, play, 4)
    return lambda name: _without_error([found[name] for found in ranks])


def _without_error(ranks):
    for rank, found in enumerate(ranks):
        assert "error" not in found or isinstance(found["error"], float), f"rank {rank}: {found['error']}"
    return ranks


@pytest.mark.parametrize("mode", ["ddp", "ddp-unused", "fsdp2", "tp"])
def test_norms_equal_those_of_one_process_on_the_global_batches(mode, played):
    """Whatever part of each gradient a rank holds; TP here mixes DTensors and plain tensors."""
    assert played(f"healthy-{mode}")[0]["norms"] == pytest.approx(reference_norms(), rel=1e-5)


@pytest.mark.parametrize("mode", ["ddp", "ddp-unused", "fsdp2", "tp"])
def test_healthy_training_is_the_one_without_a_guard(mode, played):
    """To the last bit, on each rank, without an alert; also where parameters never get a gradient."""
    for rank in played(f"healthy-{mode}"):
        assert rank["weights"] == rank["unguarded"]
        assert (rank["num_steps"], rank["num_skipped"], rank["alerts"]) == (NUM_STEPS, 0, [])


def test_ddp_accumulation_alert_names_rank_and_micro_batch(played):
    """Gradients are rank-local until the window's last micro-batch, so they tell whose the NaN was."""
    for rank in played("ddp-accumulation"):
        assert rank["alerts"] == [["nonfinite", BAD_BATCH // 3, BAD_BATCH % 3, 1]]
        assert (rank["num_steps"], rank["num_skipped"]) == (2, 1)


@pytest.mark.parametrize("mode", ["ddp", "fsdp2", "tp"])
def test_nan_loss_with_finite_gradients_on_one_rank_skips_on_all(mode, played):
    """The other rank sees nothing wrong by itself."""
    first, second = played(f"loss-{mode}")
    assert first["num_skipped"] == second["num_skipped"] == 1
    assert first["alerts"] == second["alerts"] == [["nonfinite", BAD_BATCH, 0, 1]]
    assert first["weights"] == second["weights"]


def test_ddp_nan_batch_repairs_the_running_statistics_on_all_ranks(played):
    """DDP sends rank 0's buffers to all."""
    for rank in played("batchnorm"):
        assert rank["num_skipped"] == 1
        assert rank["buffers_are_finite"]


_MOVING = {"center", "nested", "sparse", "expanded", "share.seen", "teacher.weight", "other.weight"}


@pytest.mark.parametrize(
    ("scenario", "bad", "rate"),
    [
        ("skip-ddp", 4, 0.01 * 0.9**8),
        ("skip-ddp-first", 0, 0.01 * 0.9**3),
        ("skip-fsdp2", 4, 0.01 * 0.9**8),
        ("skip-ddp-window", 10, 0.01 * 0.9**12),
        ("skip-fsdp2-window", 10, 0.01 * 0.9**12),
    ],
)
def test_skipped_step_leaves_all_as_it_was_on_each_rank(scenario, bad, rate, played):
    """Buffers of all kinds, teachers, weights, the optimizer's state, though one rank alone was bad; the next goes on."""
    for rank in played(scenario):
        assert rank["num_skipped"] == 1
        assert rank["changed"][bad] == []
        assert set(rank["changed"][bad + 1]) >= _MOVING
        assert all("body.weight" in changed for step, changed in enumerate(rank["changed"]) if step != bad)
        assert rank["rate"] == pytest.approx(rate)


def test_norm_over_uneven_empty_and_plain_shards_is_the_whole_ones(played):
    """Five rows on two ranks, one row on two ranks, a tensor that both hold."""
    for rank in played("clip-none"):
        assert rank["global_norm"] == pytest.approx(rank["by_hand"], rel=1e-6)


@pytest.mark.parametrize("clip", ["clip-1", "clip-2", "clip-inf", "clip-value"])
def test_clip_of_sharded_gradients_equals_torchs_of_whole_ones(clip, played):
    """Norms of three types, and the clipping of values."""
    first, second = played(clip)
    assert first["coef"] == second["coef"] < 1.0
    assert max(first["error"], second["error"]) < 1e-7


def test_overflow_of_a_sharded_norm_is_told_from_damage(played):
    """Elements near 1e25 are finite, their squares are not in float32; both ranks compute the same norm."""
    first, second = played("overflow")
    assert first["overflowed"]
    assert not first["skip"]
    assert first["global_norm"] == second["global_norm"] == pytest.approx(4.451127e25, rel=1e-6)


def test_nan_in_the_shard_of_one_rank_skips_where_the_shard_is_empty(played):
    """A parameter with fewer rows than there are ranks."""
    with_row, without = played("empty-shard")
    assert (with_row["numel"], without["numel"]) == (4, 0)
    for rank in (with_row, without):
        assert rank["skip"]
        assert rank["is_gone"]
        assert (rank["name"], rank["num_nan"]) == ("p1", 1)


def test_healthy_step_under_ddp_is_one_collective_of_16_bytes_a_rank(played):
    """What each rank saw of the losses; the gradients were summed by DDP already."""
    for rank in played("collectives-ddp"):
        assert rank["sizes"] == [16 * rank["num_ranks"]]


def test_healthy_step_of_sharded_gradients_is_one_collective_of_4_bytes_a_tensor(played):
    """And the same 16 bytes a rank."""
    for rank in played("collectives-fsdp2"):
        assert rank["sizes"] == [4 * rank["num_tensors"] + 16 * rank["num_ranks"]]


def test_four_ranks_norms_of_a_mesh_of_two_by_two_equal_those_of_one_process(played_by_four):
    """FSDP2 over tensor parallelism, whose plain layer is sharded by FSDP2 alone."""
    ranks = played_by_four("healthy-2d")
    assert ranks[0]["norms"] == pytest.approx(reference_norms(), rel=1e-5)
    for rank in ranks:
        assert rank["weights"] == rank["unguarded"]


@pytest.mark.parametrize("bad_rank", [0, 3])
def test_four_ranks_nan_loss_on_one_skips_on_all(bad_rank, played_by_four):
    """The alert names the rank."""
    for rank in played_by_four(f"loss-2d-{bad_rank}"):
        assert rank["num_skipped"] == 1
        assert rank["alerts"] == [["nonfinite", BAD_BATCH, 0, bad_rank]]


def test_four_ranks_healthy_step_is_one_collective_too(played_by_four):
    """Its size grows by 16 bytes a rank."""
    for rank in played_by_four("collectives-fsdp2"):
        assert rank["sizes"] == [4 * rank["num_tensors"] + 16 * 4]
