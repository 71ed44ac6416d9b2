"""DeepSpeed's ZeRO 1, 2 and 3 on two ranks over gloo; skipped where it is not installed. See `deepspeed_scenarios.py`."""

from __future__ import annotations

import functools
from importlib.util import find_spec

import pytest
import torch

if find_spec("deepspeed") is None:
    pytest.skip("needs DeepSpeed: pip install deepspeed", allow_module_level=True)

from deepspeed_scenarios import (
    BATCH,
    CLIPPERS,
    FEATURES,
    NUM_STEPS,
    SCENARIOS,
    Student,
    play,
    reference_clipped,
    reference_norms,
)
from logged import assert_logged_as_in_one_process

STAGES = (1, 2, 3)
HAS_FP16 = torch.ops.mkldnn._is_mkldnn_fp16_supported()
"""Of the processor; DeepSpeed asks for it."""
EXPECTED = {"skip": ([True, True, False, True, True, True], None, None), "stop": ([True, True, False], 2, None)}
EXPECTED["raise"] = ([True, True], 2, 2)


@pytest.fixture(scope="module")
def played(once_on_ranks, tmp_path_factory):
    """Plays all scenarios in one process group, and looks one up."""

    def find(name):
        names = [each for each in SCENARIOS if HAS_FP16 or not each.startswith("fp16")]
        folder = tmp_path_factory.mktemp("deepspeed")
        with pytest.MonkeyPatch.context() as patch:
            # In the usual place a compilation that was killed has left a lock, and torch would wait for it for ever.
            patch.setenv("TORCH_EXTENSIONS_DIR", str(folder / "extensions"))
            ranks = once_on_ranks("deepspeed", 2, play, names, str(folder))
        for rank, found in enumerate(found[name] for found in ranks):
            assert "error" not in found, f"rank {rank}: {found['error']}"
        return [found[name] for found in ranks]

    return find


@functools.cache
def _clipped():
    return reference_clipped()


HEALTHY = pytest.mark.parametrize(
    ("stage", "kind"), [(0, "healthy"), *((stage, kind) for stage in STAGES for kind in ("healthy", "healthy-offload"))]
)


@HEALTHY
def test_deepspeed_norms_are_those_of_one_process_over_twenty_steps(stage, kind, played):
    """Of each parameter, within 1e-6, also where it does not divide by the number of ranks; with its name and whole size."""
    found = played(f"{kind}-{stage}")[0]
    parameters = dict(Student().named_parameters())
    assert found["names"] == list(parameters)
    assert found["numels"] == [parameter.numel() for parameter in parameters.values()]
    assert found["ndims"] == [parameter.ndim for parameter in parameters.values()]
    norms, expected = torch.tensor(found["norms"]), torch.tensor(reference_norms())
    assert norms.shape == expected.shape == (NUM_STEPS, len(parameters))
    assert float(((norms - expected) / expected).abs().max()) < 1e-6


@HEALTHY
def test_deepspeed_healthy_training_is_the_one_without_a_guard(stage, kind, played):
    """To the last bit, on each rank, without an alert."""
    for rank in played(f"{kind}-{stage}"):
        assert rank["same"]
        assert (rank["num_steps"], rank["alerts"]) == (NUM_STEPS, 0)


@pytest.mark.parametrize("kind", ["skip", "stop", "raise", "skip-offload"])
@pytest.mark.parametrize("stage", STAGES)
def test_deepspeed_nan_loss_on_one_rank_changes_nothing_on_any(stage, kind, played):
    """Neither weights nor optimizer state; all ranks decide alike, and DeepSpeed counts the skip."""
    action = kind.partition("-")[0]
    for rank in played(f"{kind}-{stage}"):
        assert (rank["moved"], rank["stopped_at"], rank["raised_at"]) == EXPECTED[action]
        assert rank["alerts"] == [["nonfinite", action, 2, 0, 1]]
        assert rank["engine"] == {"skip": [6, 1], "stop": [3, 1], "raise": None}[action]


@pytest.mark.parametrize("action", EXPECTED)
def test_deepspeed_without_zero_nan_loss_changes_nothing(action, played):
    """Nothing is stepped there, so that DeepSpeed has nothing to count."""
    for rank in played(f"{action}-0"):
        assert (rank["moved"], rank["stopped_at"], rank["raised_at"]) == EXPECTED[action]
        assert rank["alerts"] == [["nonfinite", action, 2, 0, 1]]
        assert rank["engine"] == {"skip": [6, 0], "stop": [3, 0], "raise": None}[action]


@pytest.mark.parametrize("kind", ["exploded", "bf16", "exploded-offload"])
@pytest.mark.parametrize("stage", STAGES)
def test_deepspeed_step_that_the_guard_alone_finds_bad_is_skipped_by_deepspeed(stage, kind, played):
    """In bf16 DeepSpeed does not look for NaN by itself; in offloaded partitions it has looked before."""
    for rank in played(f"{kind}-{stage}"):
        assert rank["moved"] == [True, True, False, True, True]
        assert rank["num_skipped"] == 1
        assert rank["engine"] == [5, 1]


@pytest.mark.parametrize("clipper", CLIPPERS)
@pytest.mark.parametrize("stage", [0, *STAGES])
def test_deepspeed_clippers_clip_as_on_whole_gradients(stage, clipper, played):
    """Factor and norm after it, step by step, and the weights that come of it, as in one process."""
    found, expected = played(f"clipped-{stage}")[0][clipper], _clipped()[clipper]
    steps = torch.tensor(found["steps"])
    torch.testing.assert_close(steps, torch.tensor(expected["steps"]), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(torch.tensor(found["weights"]), torch.tensor(expected["weights"]), rtol=1e-4, atol=1e-5)
    assert float(steps[:, 0].min()) < 1.0


@pytest.mark.parametrize("stage", [0, *STAGES])
def test_deepspeed_accumulation_is_one_decision_a_window(stage, played):
    """Though the Trainer calls for each micro-batch; the alert names the one whose loss was NaN."""
    ranks = played(f"accumulated-{stage}")
    assert len(ranks[0]["norms"]) == NUM_STEPS // 2
    assert ranks[0]["norms"] == pytest.approx(played("accumulated-1")[0]["norms"], rel=1e-6)
    for rank in ranks:
        assert rank["alerts"] == [["nonfinite", "skip", 1, 1, 1]]
        assert rank["moved"] == [False, True, False, False, False, True]
        assert rank["engine"] == [3, 1 if stage else 0]


@pytest.mark.parametrize("stage", STAGES)
def test_deepspeed_histograms_and_updates_are_of_whole_parameters(stage, played):
    """Each of 1 + 91 + 13 + 143 + 11 elements once; updates of matrices from the second step on."""
    found = played(f"watched-{stage}")[0]
    assert found["counted"] == [259.0] * 4
    assert [len(row) for row in found["updates"]] == [0, 5, 5, 5]
    is_matrix = ["weight" in name for name in found["names"]]
    for row in found["updates"][1:]:
        assert [0.0 < value < 0.2 for value in row] == is_matrix


@pytest.mark.parametrize("stage", STAGES)
def test_deepspeed_other_norms_and_histograms_after_clipping_are_of_whole_parameters(stage, played):
    """As in one process."""
    batch = torch.randn(BATCH, FEATURES, generator=torch.Generator().manual_seed(1))
    assert_logged_as_in_one_process(played(f"watched-{stage}"), Student(), batch)


@pytest.mark.parametrize("stage", STAGES)
def test_deepspeed_healthy_step_is_one_collective_of_the_guards(stage, played):
    """Of 4 bytes a parameter and 16 a rank."""
    for rank in played(f"collectives-{stage}"):
        assert rank["sizes"] == [4 * 7 + 16 * 2]


@pytest.mark.parametrize("stage", STAGES)
def test_deepspeed_gradients_are_never_gathered(stage, played):
    """No tensor in a guarded step is as large as the largest parameter, of 143 elements: a rank looks at its own part."""
    for rank in played(f"collectives-{stage}"):
        assert 0 < rank["largest"] < 143


@pytest.mark.parametrize("stage", [0, *STAGES])
def test_deepspeed_resumed_run_clips_and_trains_as_in_one_go(stage, played):
    """To the last bit."""
    ranks = played(f"resumed-{stage}")
    assert ranks[0]["in_one_go"] == ranks[0]["in_two"]
    assert all(rank["same"] for rank in ranks)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("clip", "`gradient_clipping` must be unset where GradGuard clips, got 1.0"),
        ("histograms", "`histograms_of` must be 'raw' where DeepSpeed clips, got 'clipped'"),
        ("fp16", "`clip` must be None under DeepSpeed in fp16"),
        ("nvme", "`offload_optimizer.device` must be 'cpu' or 'none' for GradGuard, got 'nvme'"),
        ("stage", "must be of stage 1, 2 or 3 for GradGuard in bf16 and fp16, got an optimizer of type"),
    ],
)
def test_deepspeed_refuses_what_it_does_itself_or_hides(what, message, played):
    """With the setting to change; by the config alone, where that says it, before a model is built."""
    for rank in played("refused"):
        assert message in rank[what]["said"]
        assert rank[what]["is_built"] == (what == "stage")


@pytest.mark.parametrize(
    "name",
    [
        "rollback-0",
        "disk-1",
        "disk-3",
        *(f"rollback{kind}-{stage}" for kind in ("", "-offload", "-bf16") for stage in STAGES),
    ],
)
def test_deepspeed_rollback_brings_each_ranks_part_back(name, played):
    """After batch 4 all weights, those in fp32 too, and the optimizer's state are those after batch 1."""
    for rank in played(name):
        assert rank["digests"][5] == rank["digests"][2] != rank["digests"][4]
        assert [alert[:2] for alert in rank["alerts"]] == [["nonfinite", "rollback"], ["rollback", "rollback"]]


@pytest.mark.skipif(not HAS_FP16, reason="needs a processor with fp16")
@pytest.mark.parametrize("kind", ["fp16", "fp16-offload"])
@pytest.mark.parametrize("stage", STAGES)
def test_deepspeed_fp16_skip_of_the_guards_leaves_the_loss_scale(stage, kind, played):
    """Norms are of true gradients; what DeepSpeed would take for an overflow is none."""
    ranks = played(f"{kind}-{stage}")
    for rank in ranks:
        assert rank["moved"] == [True] * 6 + [False, True]
        assert rank["alerts"] == ["explosion"]
        assert (rank["scale"], rank["engine"]) == (2.0**8, [8, 1])
    expected = torch.tensor(reference_norms()[:3]).norm(dim=1)
    torch.testing.assert_close(torch.tensor(ranks[0]["norms"][:3]), expected, rtol=0.01, atol=0.0)


@pytest.mark.skipif(not HAS_FP16, reason="needs a processor with fp16")
@pytest.mark.parametrize("stage", STAGES)
def test_deepspeed_fp16_overflow_is_no_alert_and_lowers_the_loss_scale(stage, played):
    """By half each time, until it fits."""
    ranks = played(f"fp16-overflow-{stage}")
    overflows = ranks[0]["overflows"]  # sinks are the first rank's
    num_overflows = sum(overflows)
    assert overflows[:2] == [True, True]
    for rank in ranks:
        assert rank["scale"] == 2.0 ** (20 - num_overflows)
        assert rank["moved"] == [not is_overflow for is_overflow in overflows]
        assert rank["moved"][5]
        assert (rank["alerts"], rank["engine"]) == ([], [8, num_overflows])
