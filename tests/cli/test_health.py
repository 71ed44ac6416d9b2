"""What makes a checkpoint unhealthy."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_gradguard.cli.health import examine, read
from lightning_gradguard.files.torch_files import UnreadableError


def checkpoint():
    """A healthy one, as Lightning writes it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(16, 8)).sum().backward()
    optimizer.step()
    return {
        "epoch": 1,
        "best": float("inf"),
        "callbacks": {"ModelCheckpoint": {"kth_value": torch.tensor(float("inf"))}},
        "state_dict": dict(model.state_dict()),
        "optimizer_states": [optimizer.state_dict()],
        "parts": [(torch.zeros(2), torch.empty(0)), torch.ones(2, dtype=torch.complex64), torch.ones(2).half()],
    }


def test_healthy_checkpoint_has_no_findings():
    """Integers, empty tensors and an infinite best score are in order."""
    health = examine(checkpoint())
    assert health.findings == ()
    assert health.num_tensors > 20
    assert health.num_elements > 300


def spoil_weight(content, value):
    """One element of a matrix."""
    content["state_dict"]["0.weight"][3, 4] = value


def spoil_moment(content, value):
    """One element of Adam's second moments."""
    content["optimizer_states"][0]["state"][0]["exp_avg_sq"][0, 0] = value


@pytest.mark.parametrize(
    ("spoil", "value", "name", "problem"),
    [
        (spoil_weight, float("nan"), "state_dict['0.weight']", "1 NaN of 64 elements"),
        (spoil_weight, float("inf"), "state_dict['0.weight']", "1 Inf of 64 elements"),
        (spoil_weight, 1e9, "state_dict['0.weight']", "largest magnitude 1e+09"),
        (spoil_weight, 1e4, "state_dict['0.weight']", "times the median"),
        (spoil_moment, -1.0, "optimizer_states[0]['state'][0]['exp_avg_sq']", "second moment is negative"),
        (spoil_moment, float("nan"), "optimizer_states[0]['state'][0]['exp_avg_sq']", "1 NaN"),
    ],
)
def test_sick_tensor_is_found_by_name(spoil, value, name, problem):
    """Weights and optimizer state."""
    content = checkpoint()
    spoil(content, value)
    (finding,) = examine(content).findings
    assert finding.name == name
    assert problem in finding.problem


def test_nan_among_the_numbers_is_found():
    """As a learning rate that a scheduler has spoiled."""
    content = checkpoint()
    content["optimizer_states"][0]["param_groups"][0]["lr"] = float("nan")
    (finding,) = examine(content).findings
    assert finding.name.endswith("['lr']")


def test_object_in_a_file_is_not_run_unless_trusted(tmp_path):
    """The message says what it is, and how to read it all the same."""
    path = tmp_path / "objects.pt"
    torch.save({"a": torch.nn.Linear(1, 1)}, path)
    with pytest.raises(UnreadableError, match="--trust"):
        read(path)
    assert isinstance(read(path, trust=True)["a"], nn.Linear)


class Bomb:
    """Its own code fails when it is read."""

    def __setstate__(self, state):
        raise RuntimeError("no such device\nmore")


def test_trusted_file_whose_own_code_fails_is_said_so(tmp_path):
    """In one line."""
    bomb = Bomb()
    bomb.value = 1
    torch.save({"a": bomb}, tmp_path / "bomb.pt")
    with pytest.raises(UnreadableError, match=r"can't be read: RuntimeError: no such device$"):
        read(tmp_path / "bomb.pt", trust=True)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 no archive"])
def test_file_that_is_no_checkpoint_is_said_so(tmp_path, content):
    """Empty, or broken off."""
    path = tmp_path / "broken.pt"
    path.write_bytes(content)
    with pytest.raises(UnreadableError):
        read(path)
