"""What an alert's kind, cause or phase means: the sections of `explanations.md`."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from lightning_gradguard.cli.terminal import fail, nearest

_FILE = Path(__file__).with_name("explanations.md")


@cache
def explanations() -> dict[str, str]:
    """The text of each, by name.

    >>> "NaN" in explanations()["nonfinite"]
    True
    """
    _, *sections = ("\n" + _FILE.read_text(encoding="utf-8")).split("\n## ")
    pairs = (section.partition("\n") for section in sections)
    return {name.strip(): text.strip() for name, _, text in pairs}


def explain(name: str) -> str:
    """The text of one; ends the command where there is none."""
    texts = explanations()
    if name.lower() not in texts:
        fail(f"Nothing is known of {name!r}. {nearest(name.lower(), texts)}")
    return texts[name.lower()]
