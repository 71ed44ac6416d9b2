"""Where the forensics' tests run."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    """A Trainer without a folder writes alerts and bundles where it is started."""
    monkeypatch.chdir(tmp_path)
