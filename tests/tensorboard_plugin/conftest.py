"""What the tests of the tab share."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from answers import Tab
from page import Page
from serving import ROOT, browser, tensorboard


@pytest.fixture
def tab(tmp_path):
    """The tab over a folder of runs, read as TensorBoard does."""
    return Tab(tmp_path)


@pytest.fixture(scope="session")
def real_runs(tmp_path_factory):
    """Runs of a real Trainer with GradGuard."""
    folder = tmp_path_factory.mktemp("real")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    script = Path(__file__).with_name("real_runs.py")
    subprocess.run(
        [sys.executable, "-W", "ignore", str(script), str(folder)], check=True, capture_output=True, env=environment
    )
    return folder


@pytest.fixture(scope="session")
def driver():
    """One browser for all."""
    with browser() as found:
        yield found


@pytest.fixture(scope="session")
def real_address(real_runs):
    """A TensorBoard on the real runs."""
    with tensorboard(real_runs) as found:
        yield found


@pytest.fixture
def real_page(driver, real_address):
    """A look at the real runs, at the end of which the console must hold no error."""
    driver.get("about:blank")  # ends what an earlier page still asks of a server that has gone
    found = Page(driver, real_address)
    found.leave()
    found.errors()
    yield found
    found.resize(1500, 950)
    assert found.errors() == []
