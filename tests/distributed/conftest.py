"""Findings of several ranks, made once for all workers of a test run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from filelock import FileLock
from ranks import on_ranks


@pytest.fixture(scope="session")
def once(tmp_path_factory, worker_id):
    """Does something under a name under which all workers of the run share what comes back, plain data."""
    base = tmp_path_factory.getbasetemp()
    folder = Path(base if worker_id == "master" else base.parent)

    def play(name, work):
        path = folder / f"{name}.json"
        with FileLock(path.with_suffix(".lock")):
            if not path.exists():
                path.write_text(json.dumps(work()))
        return json.loads(path.read_text())

    return play


@pytest.fixture(scope="session")
def once_on_ranks(once):
    """`on_ranks`, once under a name."""
    return lambda name, num_ranks, work, *args: once(f"{name}-{num_ranks}", lambda: on_ranks(num_ranks, work, *args))
