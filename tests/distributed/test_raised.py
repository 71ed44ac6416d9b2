"""Two ranks under DDP whose training step ends in an exception because of NaN."""

from __future__ import annotations

import sys

import pytest
from raised_scenarios import BAD_BATCH, NUM_BATCHES, ROW, UNTOUCHED, all_raise, elsewhere, ends_alone, every_kind
from raisers import BY_OTHERS, BY_TORCH
from ranks import on_ranks

HAS_NOTES = sys.version_info >= (3, 11)


_QUICK = ("forward", "detect_anomaly", *UNTOUCHED)
_SLOW = ("backward", "fsdp2", "gathers")
_ON_EITHER_RANK = [0, pytest.param(1, marks=pytest.mark.slow)]


@pytest.fixture(scope="module")
def together(once_on_ranks, tmp_path_factory):
    """What came of fits in which both ranks raise."""
    return once_on_ranks("raised-together", 2, all_raise, str(tmp_path_factory.mktemp("together")))


@pytest.fixture(scope="module")
def one_raises(once, tmp_path_factory):
    """What came of a fit in which one rank raises, on each of them."""

    def play(cell, bad_rank):
        cells = _QUICK if cell in _QUICK else _SLOW
        name = f"raised-{bad_rank}-{cells[0]}"
        return once(name, lambda: ends_alone(bad_rank, cells, tmp_path_factory.mktemp(name)))[cell]

    return play


@pytest.mark.slow
def test_step_with_a_collective_of_its_own_is_not_replayed_alone(one_raises):
    """Nobody would take part: the exception passes untouched, and nothing hangs."""
    first, second = one_raises("gathers", 0)
    assert (first["error"], second["error"]) == ("ValueError", "RuntimeError")
    assert first["alerts"] == second["alerts"] == []
    assert first["notes"] == []


@pytest.mark.parametrize(("name", "steps"), [("torch", NUM_BATCHES), ("accumulated", 3), ("top", NUM_BATCHES)])
def test_exception_on_all_ranks_is_passed_over_together(name, steps, together):
    """As a skipped step, with the row, and without a collective that hangs."""
    first, second = (rank[name] for rank in together)
    for rank in (first, second):
        assert (rank["error"], rank["steps"], rank["skipped"]) == (None, steps, 1)
        (alert,) = rank["alerts"]
        assert alert[:3] == ["nonfinite", 1 if name == "accumulated" else BAD_BATCH, BAD_BATCH]
        assert alert[5].endswith("The step is skipped.") or "The step is skipped. It is kept for" in alert[5]
        assert rank["rows"] == [[ROW]]
        assert rank["buffers_are_finite"]
    assert first["weights"] == second["weights"]
    assert first["alerts"] == second["alerts"]


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    """What came of each kind."""
    return on_ranks(2, every_kind, str(tmp_path_factory.mktemp("kinds")))


@pytest.mark.slow
@pytest.mark.parametrize("name", [*BY_TORCH, *BY_OTHERS])
def test_every_kind_of_exception_on_all_ranks_has_one_end(name, kinds):
    """Torch's are passed over together; those of others end both, with the alert."""
    first, second = (rank[name] for rank in kinds)
    assert first["alerts"] == second["alerts"]
    assert first["weights"] == second["weights"]
    for rank in (first, second):
        (alert,) = rank["alerts"]
        assert alert[:3] == ["nonfinite", BAD_BATCH, BAD_BATCH]
        assert rank["rows"] == [[ROW]]
        if name in BY_TORCH:
            assert (rank["error"], rank["steps"], rank["skipped"]) == (None, NUM_BATCHES, 1)
        else:
            assert "The exception passes on." in alert[5]
            assert rank["error"] in ("AssertionError", "ValueError", "RuntimeError")


def test_exception_of_others_on_all_ranks_passes_on_with_one_alert(together):
    """The same one on both, with its rank."""
    first, second = (rank["own"] for rank in together)
    assert first["alerts"] == second["alerts"]
    for rank in (first, second):
        assert rank["error"] == "ValueError"
        assert rank["rows"] == [[ROW]]
        assert "The exception passes on." in rank["alerts"][0][5]
        assert not HAS_NOTES or rank["notes"] == [rank["alerts"][0][5]]


def test_later_fit_is_not_disturbed(together):
    """Messages belong to one fit."""
    assert [(rank["healthy"]["steps"], rank["healthy"]["alerts"]) for rank in together] == [(NUM_BATCHES, [])] * 2


@pytest.mark.parametrize("bad_rank", _ON_EITHER_RANK)
@pytest.mark.parametrize("cell", ["forward", "detect_anomaly", pytest.param("backward", marks=pytest.mark.slow)])
def test_exception_on_one_rank_ends_all_with_its_alert(cell, bad_rank, one_raises):
    """The other one waits in the backward pass until the process that raised has ended."""
    ranks = one_raises(cell, bad_rank)
    _assert_told_to_all(ranks, bad_rank)
    error = "ValueError" if cell == "forward" else "RuntimeError"
    assert (ranks[bad_rank]["error"], ranks[1 - bad_rank]["error"]) == (error, "RuntimeError")
    for rank in ranks:
        assert rank["rows"] == [[ROW]]


@pytest.mark.slow
@pytest.mark.parametrize("bad_rank", [0, 1])
def test_exception_on_one_rank_of_a_sharded_model_ends_all_with_what_is_seen(bad_rank, one_raises):
    """Nothing can be replayed."""
    ranks = one_raises("fsdp2", bad_rank)
    _assert_told_to_all(ranks, bad_rank)
    for rank in ranks:
        assert f"was raised, and `batch` holds NaN in row {ROW}. The exception passes on." in rank["alerts"][0][5]


def _assert_told_to_all(ranks, bad_rank):
    """The same alert on both, as a note, in bounded time."""
    assert ranks[0]["alerts"] == ranks[1]["alerts"]
    for rank in ranks:
        assert rank["seconds"] < 100  # the process group alone would wait for two minutes
        (alert,) = rank["alerts"]
        assert alert[:4] == ["nonfinite", BAD_BATCH, BAD_BATCH, bad_rank]
        assert not HAS_NOTES or rank["notes"] == [alert[5]]


@pytest.mark.parametrize("name", UNTOUCHED)
def test_exception_with_another_reason_on_all_ranks_is_untouched(name, together):
    """No alert, not passed over, and nobody waits for the other rank."""
    for rank in together:
        _assert_untouched(name, rank[name])


@pytest.mark.parametrize("bad_rank", _ON_EITHER_RANK)
@pytest.mark.parametrize("name", UNTOUCHED)
def test_exception_with_another_reason_on_one_rank_is_untouched(name, bad_rank, one_raises):
    """The other rank's is the one of a lost connection, as without a guard."""
    ranks = one_raises(name, bad_rank)
    _assert_untouched(name, ranks[bad_rank])
    other = ranks[1 - bad_rank]
    assert (other["error"], other["alerts"], other["notes"]) == ("RuntimeError", [], [])
    assert "gloo" in other["words"]
    assert other["seconds"] < 100


def _assert_untouched(name, rank):
    error, words, raised_in = {
        "worker": ("ValueError", "Caught ValueError in DataLoader worker process 0.", "reraise"),
        "lost GPU": ("RuntimeError", "CUDA error: device-side assert triggered", "ending"),
        "exit": ("SystemExit", "3", "ending"),
        "keyboard": ("SystemExit", "1", "_call_and_handle_interrupt"),  # which Lightning makes of it
        "misconfigured": ("MisconfigurationException", "not like this", "ending"),
        "memory": ("OutOfMemoryError", "CUDA out of memory. Tried to allocate 2.00 GiB.", "ending"),
    }[name]
    assert (rank["error"], rank["words"].split("\n")[0], rank["raised_in"]) == (error, words, raised_in)
    assert (rank["steps"], rank["skipped"], rank["alerts"]) == (BAD_BATCH, 0, [])
    assert rank["seconds"] < 100  # nobody has waited for what no rank says
    if name == "lost GPU" and HAS_NOTES:
        (note,) = rank["notes"]
        assert "the step can't be replayed" in note
    else:
        assert rank["notes"] == []


def test_exception_of_torchs_anomaly_detector_on_all_ranks_has_one_alert(together):
    """It passes on once DDP has gradients under way; where there are none yet the batch is passed over."""
    for name in ("detect_anomaly", "detect_anomaly, top"):
        first, second = (rank[name] for rank in together)
        assert first["alerts"] == second["alerts"]
        assert first["weights"] == second["weights"]
        for rank in (first, second):
            (alert,) = rank["alerts"]
            assert alert[:3] == ["nonfinite", BAD_BATCH, BAD_BATCH]
            assert 'returned nan values in its 0th output"' in alert[5]
            assert rank["rows"] == [[ROW]]
            if name == "detect_anomaly":
                assert (rank["error"], rank["skipped"]) == ("RuntimeError", 0)
                assert not HAS_NOTES or rank["notes"] == [alert[5]]
            else:
                assert (rank["error"], rank["steps"], rank["skipped"]) == (None, NUM_BATCHES - 1, 1)


@pytest.mark.parametrize("name", ["check_finite", "check_finite, alone"])
def test_early_stopping_of_a_loss_that_is_nan_ends_all_ranks_after_the_skipped_step(name, together):
    """Nothing is raised; all ranks stop after the first of three epochs, also where one alone has such a loss."""
    first, second = (rank[name] for rank in together)
    assert first["alerts"] == second["alerts"]
    assert first["weights"] == second["weights"]
    for rank in (first, second):
        assert (rank["error"], rank["steps"], rank["skipped"]) == (None, NUM_BATCHES, 1)
        (alert,) = rank["alerts"]
        assert alert[:4] == ["nonfinite", BAD_BATCH, BAD_BATCH, 1 if name == "check_finite, alone" else 0]
        assert rank["rows"] == [[ROW]]


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    """What came of fits under other strategies in which both ranks raise."""
    return on_ranks(2, elsewhere, str(tmp_path_factory.mktemp("others")))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["unused", "unused, backward"])
def test_exception_with_parameters_that_take_no_part_is_passed_over(name, others):
    """The replay sets off nothing of DDP's, which counts the parameters that a backward pass reaches."""
    first, second = (rank[name] for rank in others)
    assert first["alerts"] == second["alerts"]
    assert first["weights"] == second["weights"]
    for rank in (first, second):
        assert (rank["error"], rank["steps"], rank["skipped"]) == (None, NUM_BATCHES, 1)
        assert rank["rows"] == [[ROW]]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["static", "fsdp2", "fsdp2, own", "fsdp2, backward", "tp", "fsdp1"])
def test_exception_under_other_engines_passes_on_with_its_alert(name, others):
    """With a culprit where each rank holds all weights, else with what is seen."""
    first, second = (rank[name] for rank in others)
    assert first["alerts"] == second["alerts"]
    for rank in (first, second):
        assert rank["error"] in ("ValueError", "RuntimeError")
        (alert,) = rank["alerts"]
        assert alert[:3] == ["nonfinite", BAD_BATCH, BAD_BATCH]
        assert f"`batch` holds NaN in row {ROW}. The exception passes on." in alert[5]
        assert ("was raised, and" in alert[5]) == (name != "static")
        assert not HAS_NOTES or rank["notes"] == [alert[5]]


@pytest.mark.slow
def test_exception_that_does_not_speak_of_nan_is_untouched_where_nothing_is_replayed(others):
    """There is NaN in the batch, but nobody knows whether it is why."""
    for rank in others:
        assert (rank["fsdp2, unrelated"]["error"], rank["fsdp2, unrelated"]["alerts"]) == ("KeyError", [])


def test_exception_in_the_backward_pass_of_all_ranks_ends_them_with_one_alert(together):
    """Gradients are on their way between the ranks by then."""
    first, second = (rank["backward"] for rank in together)
    assert first["alerts"] == second["alerts"]
    for rank in (first, second):
        assert rank["error"] == "RuntimeError"
        assert rank["rows"] == [[ROW]]
        assert "The exception passes on." in rank["alerts"][0][5]
