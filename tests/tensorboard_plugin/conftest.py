"""What the tests of the tab share."""

from __future__ import annotations

import pytest
from answers import Tab


@pytest.fixture
def tab(tmp_path):
    """The tab over a folder of runs, read as TensorBoard does."""
    return Tab(tmp_path)
