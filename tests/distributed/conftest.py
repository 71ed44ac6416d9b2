"""Findings of several ranks, made once for all workers of a test run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from filelock import FileLock
from ranks import on_ranks


@pytest.fixture(scope="session")
def once_on_ranks(tmp_path_factory, worker_id):
    """`on_ranks`, but for a name under which all workers of the run share what comes back."""
    base = tmp_path_factory.getbasetemp()
    folder = Path(base if worker_id == "master" else base.parent)

    def play(name, num_ranks, work, *args):
        path = folder / f"{name}-{num_ranks}.json"
        with FileLock(path.with_suffix(".lock")):
            if not path.exists():
                path.write_text(json.dumps(on_ranks(num_ranks, work, *args)))
        return json.loads(path.read_text())

    return play
