"""Copies in CPU memory, the ring of snapshots, and the settings of a rollback."""

from __future__ import annotations

import pickle

import pytest
import torch
from builders import examples
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightning_gradguard import Guard, Rollback
from lightning_gradguard.recovery import HostTensor, Ring, available_bytes, copy_to_host, num_bytes, put_back
from lightning_gradguard.recovery.finite import find_nonfinite
from lightning_gradguard.recovery.quarantine import Incident, QuarantineFile, WatchedSampler

TREE = {
    "a": torch.arange(6.0).view(2, 3).T,
    "b": [torch.tensor(2), (torch.ones(2, dtype=torch.float16), None)],
    "c": {"n": 3},
}


def test_copy_put_back_into_live_tensors_restores_values_in_place():
    """Whoever holds the tensors sees the old values; what is no tensor is copied."""
    live = {"a": TREE["a"].clone(), "b": [TREE["b"][0].clone(), (TREE["b"][1][0].clone(), None)], "c": {"n": 3}}
    saved = copy_to_host(live)
    live["a"].mul_(2)
    live["b"][1][0].zero_()
    live["c"]["n"] = 4
    back = put_back(saved, live)
    assert back["a"] is live["a"]
    assert torch.equal(live["a"], TREE["a"])
    assert torch.equal(live["b"][1][0], torch.ones(2, dtype=torch.float16))
    assert back["c"] == {"n": 3}
    assert saved["c"] is not back["c"]


def test_copy_put_back_where_nothing_lives_makes_new_tensors():
    """As for the state of an optimizer that has been cleared."""
    saved = copy_to_host({"exp_avg": torch.ones(3), "steps": [torch.tensor(1.0)]})
    back = put_back(saved, None)
    back["exp_avg"].zero_()
    assert torch.equal(put_back(saved, {"exp_avg": torch.zeros(4)})["exp_avg"], torch.ones(3))
    assert back["steps"][0].device.type == "cpu"


def test_copy_into_earlier_copy_uses_its_memory():
    """And makes new memory only where shape or dtype differ."""
    first = copy_to_host([torch.ones(3), torch.ones(2)])
    second = copy_to_host([torch.zeros(3), torch.zeros(4)], first)
    assert second[0].value.data_ptr() == first[0].value.data_ptr()
    assert second[1].value.shape == (4,)
    assert isinstance(second[1], HostTensor)


def test_copy_of_a_sparse_tensor_comes_back():
    """Nothing of it can be written in place."""
    live = torch.tensor([0.0, 2.0]).to_sparse()
    saved = copy_to_host([live])
    (back,) = put_back(saved, [torch.zeros(2).to_sparse()])
    assert back.to_dense().tolist() == [0.0, 2.0]


def test_num_bytes_of_a_tree_counts_its_tensors():
    """And of a copy the same."""
    assert num_bytes(TREE) == 6 * 4 + 8 + 2 * 2 == num_bytes(copy_to_host(TREE))


def test_available_memory_is_a_positive_number_of_bytes_or_unknown():
    """It can't be more than the machine has."""
    found = available_bytes()
    assert found is None or 0 < found < 1 << 50


@examples
@given(
    st.lists(st.sampled_from(["healthy", "doubtful", "take", "return"]), max_size=60), st.integers(2, 4), st.integers(0, 3)
)
def test_ring_over_any_run_keeps_a_good_one_and_never_more_than_asked(events, keep, confirm_steps):
    """Good are exactly those that were followed by enough healthy steps without a doubtful one between."""
    ring: Ring[int] = Ring(keep, confirm_steps)
    ring.add(0, 0, is_good=True)
    healthy_since: dict[int, int] = {}
    for step, event in enumerate(events, 1):
        if event == "take" and ring.has_room:
            ring.make_room()
            ring.add(step, step)
            healthy_since[step] = 0
        elif event == "healthy":
            healthy_since = {taken: count + 1 for taken, count in healthy_since.items()}
            ring.confirm()
        elif event in ("doubtful", "return"):
            ring.drop_pending()
            healthy_since = {taken: count for taken, count in healthy_since.items() if count >= confirm_steps}
            if event == "return":
                ring.drop_last()
        assert 1 <= len(ring.entries) <= keep
        assert ring.good is not None
        for entry in ring.entries:
            assert entry.is_good == (entry.step == 0 or healthy_since[entry.step] >= confirm_steps)


def test_sampler_in_whose_first_batches_nothing_is_left_gives_the_first_healthy_one():
    """Single indices, batches, and entries that are no indices."""
    assert list(WatchedSampler([0, 1, 2, 3], {0, 1, 3})) == [2, 2, 2, 2]
    assert list(WatchedSampler([[0, 1], [2, 3]], {0, 1})) == [[2, 3], [2, 3]]
    named = WatchedSampler([["a", "b"]], {0})
    assert list(named) == [["a", "b"]]
    assert named.take() is None
    assert list(WatchedSampler([[0], [1]], {0, 1})) == [[0], [1]]


def test_sampler_that_is_watched_shows_what_the_inner_one_has():
    """And survives a pickle."""
    inner = torch.utils.data.BatchSampler(range(6), 2, drop_last=False)
    watched = pickle.loads(pickle.dumps(WatchedSampler(inner, {1})))
    assert (watched.batch_size, len(watched)) == (2, 3)
    assert list(watched) == [[0, 0], [2, 3], [4, 5]]


def test_quarantine_file_with_half_a_line_gives_the_others(tmp_path):
    """A power cut in the middle of writing."""
    file = QuarantineFile(tmp_path / "deep" / "quarantine.jsonl")
    assert file.read()[0] == set()
    file.append([Incident(0, 1, 1, 0, "nonfinite", (3, 4)), Incident(0, 2, 2, 0, "explosion", None)])
    with (tmp_path / "deep" / "quarantine.jsonl").open("a") as raw:
        raw.write('{"epoch": 1, "sam')
    assert file.read()[0] == {3, 4}
    with (tmp_path / "deep" / "quarantine.jsonl").open("a") as raw:
        raw.write('\n{"epoch": 2}\n{"samples": "7"}\n{"samples": [8, 9.5]}\n{"samples": [5]}\n')
    samples, left_out = file.read()
    assert (samples, left_out.count) == ({3, 4, 5}, 4)
    assert "quarantine.jsonl" in repr(file)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("every_n_steps", 0),
        ("confirm_steps", -1),
        ("keep", 1),
        ("skip_batches", -1),
        ("lr_factor", 0.0),
        ("lr_factor", 1.5),
        ("cooldown_steps", -1),
        ("max_rollbacks", 0),
    ],
)
def test_rollback_with_a_setting_out_of_range_raises(setting, value):
    """The message names it and its value."""
    with pytest.raises(ValueError, match=f"`{setting}` must be .* got {value}"):
        Rollback(**{setting: value})


def test_rollback_in_a_guard_without_a_trainer_is_refused():
    """It has nothing to go back to."""
    with pytest.raises(ValueError, match="`nonfinite` must be one that a guard alone can take"):
        Guard(nn.Linear(2, 1).named_parameters(), nonfinite="rollback")


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors", "ignore:Sparse CSR tensor support")
def test_nonfinite_tensors_are_named():
    """NaN and Inf, in any dtype; what is large is not."""
    big = torch.full((3,), torch.finfo(torch.float32).max)
    tensors = {
        "fine": torch.ones(3),
        "big": big,
        "half": torch.tensor([1.0, float("inf")], dtype=torch.float16),
        "complex": torch.tensor([1 + 1j * float("nan")]),
        "float8": torch.ones(2).to(torch.float8_e4m3fn),
        "empty": torch.zeros(0),
        "whole": torch.ones(2, dtype=torch.int64),
        "coo": torch.tensor([0.0, float("nan")]).to_sparse(),
        "csr": torch.tensor([[0.0, float("nan")]]).to_sparse_csr(),
        "mkldnn": torch.tensor([0.0, float("inf")]).to_mkldnn(),
        "nested": torch.nested.nested_tensor([torch.ones(2), torch.tensor([float("nan")])]),
        "jagged": torch.nested.nested_tensor([torch.ones(2), torch.tensor([float("nan")])], layout=torch.jagged),
        "nan": torch.tensor([[0.0, float("nan")]]),
    }
    layouts = ["coo", "csr", "mkldnn", "nested", "jagged"]
    assert find_nonfinite(tensors.items()) == ["half", "complex", *layouts, "nan"]
    masks = {"mask": torch.tensor([0.0, -float("inf")]), "damaged": torch.tensor([-float("inf"), float("nan")])}
    assert find_nonfinite(masks.items(), may_be_infinite=True) == ["damaged"]
