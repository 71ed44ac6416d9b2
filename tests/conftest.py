"""What all tests share: one thread per process, seeds, and no stray output."""

from __future__ import annotations

import logging

import pytest
import torch

# Doctests are looked for in every module, and several folders have a conftest: one name, so pytest would refuse the second.
collect_ignore_glob = ["conftest.py", "*/conftest.py", "*/*/conftest.py"]


@pytest.fixture(autouse=True)
def _deterministic():
    """Every test starts from the same random state; two workers share two cores."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    torch.distributions.Distribution.set_default_validate_args(True)  # `torch.compile` turns it off for the whole process


@pytest.fixture(autouse=True, scope="session")
def _quiet():
    """Lightning's banners would bury a failure."""
    for name in ("lightning.pytorch", "pytorch_lightning"):
        logging.getLogger(name).setLevel(logging.WARNING)
