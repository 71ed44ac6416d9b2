"""The findings, made once for all tests and all workers of a run."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
from cells import CELLS, Cell
from findings import findings_of


@pytest.fixture(scope="session")
def findings(tmp_path_factory, worker_id):
    """Looks up what each rank found in a cell."""
    base = tmp_path_factory.getbasetemp()
    folder = Path(base if worker_id == "master" else base.parent) / "conformance"
    folder.mkdir(exist_ok=True)
    of_group = functools.cache(lambda group: findings_of(group, folder))
    return lambda cell: of_group(cell.group)[str(cell)]


@pytest.fixture(
    scope="session",
    params=[pytest.param(cell, id=str(cell), marks=[] if cell.is_quick else pytest.mark.slow) for cell in CELLS],
)
def cell(request) -> Cell:
    """Each cell that can exist, one after another."""
    return request.param


@pytest.fixture
def found(cell, findings):
    """What each rank found in this cell; an error in there is one here."""
    ranks = findings(cell)
    for rank, entry in enumerate(ranks):
        assert "error" not in entry, f"rank {rank}: {entry['error']}"
    return ranks
