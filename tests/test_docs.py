"""The pages of docs/ say what runs, and leave nothing out."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

from lightning_gradguard import GradGuard

DOCS = Path(__file__).parents[1] / "docs"
NEED_A_MODEL = ("forensics", "recovery", "reliability", "diagnosis")
"""Pages whose snippets are parts of a training of the reader's: they are compiled, not run."""


def snippets(path):
    """The Python snippets of a page, in order."""
    return re.findall(r"^```python\n(.*?)^```", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


PAGES = [path for path in (DOCS.parent / "README.md", *sorted(DOCS.glob("*.md"))) if snippets(path)]


@pytest.mark.filterwarnings("ignore::lightning_gradguard.GradientWarning")
@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_page_has_snippets_that_run(path, tmp_path, monkeypatch):
    """One after another, as a reader would type them; those that need a model of the reader's are compiled."""
    monkeypatch.chdir(tmp_path)
    names = {"__name__": path.stem}
    for snippet in snippets(path):
        code = compile(snippet, path.name, "exec")
        if path.stem not in NEED_A_MODEL and not snippet.startswith("# not run"):
            exec(code, names)


def test_options_page_names_every_option_of_the_constructor():
    """A new keyword without a row in the table is a mistake."""
    options = (DOCS / "options.md").read_text(encoding="utf-8")
    for name in inspect.signature(GradGuard.__init__).parameters:
        assert name == "self" or re.search(rf"^\|.*`{name}`.* \| ", options, flags=re.MULTILINE)


def test_pages_are_all_in_the_table_of_contents():
    """None that nobody finds."""
    index = (DOCS / "index.md").read_text(encoding="utf-8").split()
    assert [path.stem for path in DOCS.glob("*.md") if path.stem not in {"index", *index}] == []
