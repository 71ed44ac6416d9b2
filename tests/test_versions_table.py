"""The rows of docs/versions.md come from the runs that they tell of."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest

SCRIPT = Path(__file__).parents[1] / "docs" / "versions_table.py"
REPORT = """<testsuites><testsuite>
<testcase name="a"/><testcase name="b"/><testcase name="c"><failure/></testcase><testcase name="d"><skipped/></testcase>
</testsuite></testsuites>"""


@pytest.fixture
def table(tmp_path):
    """The script's module, a report and a page with one row."""
    spec = importlib.util.spec_from_file_location("versions_table", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (tmp_path / "report.xml").write_text(REPORT)
    page = tmp_path / "versions.md"
    page.write_text(f"before\n{module.BEGIN}\n{module.HEAD}\n|---|\n| oldest | 3.10 |\n{module.END}\nafter\n")
    return lambda name: (module.main(name, str(tmp_path / "report.xml"), page), page.read_text().splitlines())[1]


def test_versions_row_is_added_and_others_stay(table):
    """A run of one environment says nothing about another."""
    lines = table("newest")
    assert lines[0] == "before"
    assert lines[-1] == "after"
    assert "| oldest | 3.10 |" in lines
    (row,) = (line for line in lines if line.startswith("| newest |"))
    assert f"| {np.__version__} | 2 | 1 | 1 |" in row


def test_versions_row_of_an_environment_is_replaced(table):
    """The last run counts."""
    table("oldest")
    assert sum(line.startswith("| oldest |") for line in table("oldest")) == 1
