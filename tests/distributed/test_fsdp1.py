"""FSDP1 on two and four ranks over gloo: norms, decisions, clipping, and going back. See `fsdp1_scenarios.py`."""

from __future__ import annotations

import functools

import pytest
import torch
from fsdp1_scenarios import _KINDS as KINDS
from fsdp1_scenarios import BATCH, CLIPPERS, FEATURES, NUM_STEPS, Student, name_of, play, reference_clipped, reference_norms
from logged import assert_logged_as_in_one_process

_QUICK = {"FULL_SHARD-original-layers", "SHARD_GRAD_OP-original-root", "NO_SHARD-flat-layers"}
_WAYS = [name_of(*kind) for kind in KINDS]
WAYS = [pytest.param(way, marks=[] if way in _QUICK else pytest.mark.slow) for way in _WAYS]
FAULTS = [
    pytest.param(
        f"{action}-{way}", marks=[] if way in ("FULL_SHARD-original-layers", "NO_SHARD-flat-layers") else pytest.mark.slow
    )
    for action in ("skip", "stop", "raise")
    for way in _WAYS
    if way.endswith("layers")
]
CLIPPED = [
    pytest.param(way, marks=[] if way == "FULL_SHARD-original-layers" else pytest.mark.slow)
    for way in ("FULL_SHARD-original-layers", "FULL_SHARD-flat-root", "NO_SHARD-original-layers", "HYBRID_SHARD-flat-layers")
]
_OTHERS = ["accumulation", "watched", "refused", "resumed-disk", "rollback-disk"]
_OTHERS += [
    f"{what}-{kind}" for what in ("collectives", "bf16", "fp16", "rollback", "lbfgs") for kind in ("original", "flat")
]


@pytest.fixture(scope="module")
def played(request, once_on_ranks, tmp_path_factory):
    """Plays, in one process group for two ranks and one for four, what the selected tests of this file ask for."""
    items = [item for item in request.session.items if item.path == request.path and hasattr(item, "callspec")]
    selected = [item.callspec.params for item in items]
    names = [f"healthy-{it['way']}" for it in selected if "way" in it]
    names += [it["fault"] for it in selected if "fault" in it]
    names += [f"clipped-{it['clipped_way']}" for it in selected if "clipped_way" in it]
    names = [*dict.fromkeys([*names, *_OTHERS])]

    @functools.cache
    def of(num_ranks):
        group = [name for name in names if ("HYBRID" in name) == (num_ranks == 4)]
        return once_on_ranks("fsdp1", num_ranks, play, group, str(tmp_path_factory.mktemp("fsdp1")))

    def find(name):
        ranks = [found[name] for found in of(4 if "HYBRID" in name else 2)]
        for rank, found in enumerate(ranks):
            assert not isinstance(found, dict) or "error" not in found, f"rank {rank}: {found['error']}"
        return ranks

    return find


@functools.cache
def _reference():
    return torch.tensor(reference_norms())


@pytest.mark.parametrize("way", WAYS)
def test_fsdp1_norms_are_those_of_one_process_over_twenty_steps(way, played):
    """Of each parameter, within 1e-6; under its own name, with its whole size."""
    found = played(f"healthy-{way}")[0]
    parameters = dict(Student().named_parameters())
    assert found["names"] == list(parameters)
    assert found["numels"] == [parameter.numel() for parameter in parameters.values()]
    assert found["ndims"] == [parameter.ndim for parameter in parameters.values()]
    norms = torch.tensor(found["norms"])
    assert norms.shape == (NUM_STEPS, len(parameters))
    assert float(((norms - _reference()) / _reference()).abs().max()) < 1e-6


@pytest.mark.parametrize("way", WAYS)
def test_fsdp1_healthy_training_is_the_one_without_a_guard(way, played):
    """To the last bit, on each rank, without an alert."""
    for rank in played(f"healthy-{way}"):
        assert rank["same"]
        assert (rank["num_steps"], rank["alerts"]) == (NUM_STEPS, 0)


@pytest.mark.parametrize("way", ["FULL_SHARD-original-layers", "SHARD_GRAD_OP-original-root"])
def test_fsdp1_norms_are_those_of_gathered_gradients(way, played):
    """Which FSDP1 itself puts together."""
    found = played(f"healthy-{way}")[0]
    for norms, gathered in zip(found["norms"], found["gathered"], strict=True):
        assert norms == pytest.approx([gathered[name] for name in found["names"]], rel=1e-6)


@pytest.mark.parametrize("fault", FAULTS)
def test_fsdp1_nan_loss_on_one_rank_changes_nothing_on_any(fault, played):
    """Neither weights nor optimizer state; all ranks decide alike, and the alert names the rank."""
    action = fault.partition("-")[0]
    for rank in played(fault):
        assert (
            rank["moved"]
            == {"skip": [True] * 2 + [False] + [True] * 3, "stop": [True] * 2 + [False], "raise": [True] * 2}[action]
        )
        assert rank["num_skipped"] == 1
        assert rank["alerts"] == [["nonfinite", action, 2, 0, 1]]
        assert set(rank["names"]) == {name for name, _ in Student().named_parameters()}
        assert (rank["stopped_at"], rank["raised_at"]) == {"skip": (None, None), "stop": (2, None), "raise": (2, 2)}[action]


def test_fsdp1_accumulation_alert_names_micro_batch_and_rank(played):
    """By the loss: each rank sees its own shards of the gradients, whoever has damaged them."""
    for rank in played("accumulation"):
        assert rank["alerts"] == [["nonfinite", "skip", 1, 1, 1]]
        assert rank["moved"] == [False, True, False, False, False, True]


@pytest.mark.parametrize("clipper", CLIPPERS)
@pytest.mark.parametrize("clipped_way", CLIPPED)
def test_fsdp1_clippers_clip_as_on_whole_gradients(clipped_way, clipper, played):
    """Factor and norm after it, step by step, as in one process on the global batches."""
    found = torch.tensor(played(f"clipped-{clipped_way}")[0][clipper])
    expected = torch.tensor(reference_clipped()[clipper])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
    assert float(found[:, 0].min()) < 1.0


def test_fsdp1_histograms_count_each_element_once(played):
    """Of the parameters that are not excluded: 3 + 91 + 13 + 143 + 11."""
    assert played("watched")[0]["counted"] == [261.0] * 3


def test_fsdp1_other_norms_and_histograms_after_clipping_are_of_whole_parameters(played):
    """As in one process."""
    batch = torch.randn(BATCH, FEATURES, generator=torch.Generator().manual_seed(1), dtype=torch.float64).float()
    assert_logged_as_in_one_process(played("watched"), Student(), batch)


def test_fsdp1_updates_are_measured_on_whole_matrices(played):
    """From the second step on, but for vectors, and not of a step that was skipped."""
    found = played("watched")[0]
    assert [len(row) for row in found["updates"]] == [0, 5, 5, 5, 0]
    is_matrix = ["weight" in name for name in found["names"]]
    for row in found["updates"][1:4]:
        assert [0.0 < value < 0.2 for value in row] == is_matrix


def test_fsdp1_damage_in_an_excluded_parameter_skips_the_step(played):
    """On one rank, in a bias of which the other may hold nothing."""
    assert played("watched")[0]["skipped"] == [False, False, False, True, False]


@pytest.mark.parametrize("kind", ["original", "flat"])
def test_fsdp1_healthy_step_is_one_collective(kind, played):
    """Of 4 bytes a parameter and 16 a rank."""
    for rank in played(f"collectives-{kind}"):
        assert rank["sizes"] == [4 * 7 + 16 * 2]


@pytest.mark.parametrize("kind", ["original", "flat"])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_fsdp1_mixed_precision_is_measured_and_skipped(precision, kind, played):
    """Norms of true size; a skip for an explosion leaves a scaler's scale as it is."""
    ranks = played(f"{precision}-{kind}")
    assert ranks[0]["skipped"] == [False, False, True, False]
    for rank in ranks:
        assert rank["moved"] == [False, True, False, True, False, False, False, True]
        assert rank["scale"] == (2.0**8 if precision == "fp16" else None)
    for norms, gathered in zip(ranks[0]["norms"], ranks[0]["gathered"], strict=kind == "original"):
        assert norms == pytest.approx(gathered, rel=1e-6)


def test_fsdp1_resumed_from_a_sharded_checkpoint_clips_and_trains_as_in_one_go(played):
    """To the last bit."""
    ranks = played("resumed-disk")
    assert ranks[0]["in_one_go"] == ranks[0]["in_two"]
    assert all(rank["same"] for rank in ranks)


@pytest.mark.parametrize("name", ["rollback-original", "rollback-flat", "rollback-disk"])
def test_fsdp1_rollback_brings_each_ranks_part_back(name, played):
    """After batch 4 the weights and the optimizer's state are those after batch 1."""
    for rank in played(name):
        assert rank["digests"][5] == rank["digests"][2] != rank["digests"][4]
        assert [alert[:2] for alert in rank["alerts"]] == [["nonfinite", "rollback"], ["rollback", "rollback"]]


def test_fsdp1_names_no_culprit(played):
    """Nothing is replayed there."""
    for rank in played("skip-FULL_SHARD-original-layers"):
        assert rank["culprits"] == [None]


def test_fsdp1_refuses_lbfgs_on_shards(played):
    """With the reason, and what to do."""
    for message in played("refused"):
        assert message.startswith("`configure_optimizers` must not return LBFGS where FSDPStrategy shards")
        assert "Use DDPStrategy" in message


@pytest.mark.parametrize("kind", ["original", "flat"])
def test_fsdp1_lbfgs_without_sharding_is_guarded(kind, played):
    """There each rank holds everything whole."""
    for rank in played(f"lbfgs-{kind}"):
        assert rank["same"]
        assert rank["moved"] == [True, False, True]
        assert rank["alerts"] == [["nonfinite", "skip", 2, 1]]
