"""The pages of docs/ say what runs, and leave nothing out."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

import pytest

import lightning_gradguard
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


def defaults_of(callable_):
    """Each argument with its default; without one, `inspect.Parameter.empty`."""
    return {name: each.default for name, each in inspect.signature(callable_).parameters.items()}


def code_in(cell):
    """What stands in backticks."""
    return re.findall(r"`(.*?)`", cell)


def rows(page):
    """The tables of a page, as lists of cells; bars in code are none of the table's."""
    lines = (DOCS / page).read_text(encoding="utf-8").splitlines()
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines if line.startswith("| `")]


def test_options_page_has_every_option_with_its_default():
    """A new keyword without a row in the table is a mistake, and so is a default that was changed."""
    defaults = defaults_of(GradGuard)
    said = {}
    for names, default, *_ in rows("options.md"):
        if re.fullmatch(r"`\w+`(, `\w+`)*", names):
            said |= dict(zip(code_in(names), map(ast.literal_eval, code_in(default)), strict=True))
    assert said == defaults


def test_pages_of_detectors_and_clippers_have_their_settings():
    """With their defaults, as far as the pages name them; clippers with all."""
    for name, settings, *_ in rows("detectors.md"):
        defaults = defaults_of(getattr(lightning_gradguard, code_in(name)[0]))
        said = dict(each.split("=") for each in code_in(settings))
        assert {key: ast.literal_eval(value) for key, value in said.items()}.items() <= defaults.items()
    signatures = [re.fullmatch(r"`(\w+)\((.*)\)`", clipper) for clipper, *_ in rows("clippers.md")]
    for name, arguments in [found.groups() for found in signatures if found]:
        defaults = defaults_of(getattr(lightning_gradguard, name))
        said = eval(f"lambda {arguments}: None")
        assert (name, defaults_of(said)) == (name, defaults)


def test_pages_are_all_in_the_table_of_contents():
    """None that nobody finds."""
    index = (DOCS / "index.md").read_text(encoding="utf-8").split()
    assert [path.stem for path in DOCS.glob("*.md") if path.stem not in {"index", *index}] == []
