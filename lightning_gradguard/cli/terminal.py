"""What is printed, such that a stranger's file can't do anything to a terminal."""

from __future__ import annotations

import difflib
import io
import json
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NoReturn

import typer
from rich.console import Console
from rich.text import Text

from lightning_gradguard.wording import counted

FOUND = 1
"""Exit code: something is wrong with what was looked at."""
UNUSABLE = 2
"""Exit code: the command line, or the file, can't be used."""

_MAX_CHARACTERS = 2000


def run_folder(place: Path) -> Path:
    """The run's folder where its folder `gradguard` was named; any other place as it is."""
    whole = place.resolve()
    return whole.parent if whole.name == "gradguard" and (whole / "alerts.jsonl").is_file() else place


def visible(text: object) -> str:
    r"""A text as it is, but for characters that are not printed: these as Python writes them; a long one is cut.

    >>> print(visible("w[mask] [/x] \x1b[31m é \u202e"))
    w[mask] [/x] \x1b[31m é \u202e
    """
    whole = str(text)
    shown = whole[:_MAX_CHARACTERS]
    if not shown.isprintable():
        shown = "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in shown)
    left = len(whole) - _MAX_CHARACTERS
    return shown if left <= 0 else f"{shown} ... ({counted(left, 'character')} more)"


def cell(text: object, style: str = "") -> Text:
    """For a table or a line; brackets are no markup."""
    return Text(visible(text), style)


def console(*, is_error: bool = False) -> Console:
    """Where results go, or what has to be said about them."""
    return Console(stderr=is_error, highlight=False)


def say(text: object, style: str = "") -> None:
    """Print a line of the result."""
    console().print(cell(text, style))


def remark(text: object) -> None:
    """Print something about the result, where scripts don't look for it."""
    console(is_error=True).print(cell(text))


def fail(text: object) -> NoReturn:
    """Say why the command can't go on, and end it."""
    remark(text)
    raise typer.Exit(UNUSABLE)


def one_line(error: BaseException) -> str:
    """An exception's type and message."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def print_json(content: Mapping[str, Any]) -> None:
    """Print one object in one line of strict JSON, in ASCII."""
    typer.echo(json.dumps(content, allow_nan=False))


def nearest(name: str, known: Collection[str]) -> str:
    """For the end of a message about a name that is not known: the most similar one, and all."""
    similar = difflib.get_close_matches(name, known, n=1)
    hint = f"Did you mean {similar[0]!r}? " if similar else ""
    return f"{hint}There are {', '.join(sorted(known))}."


def make_output_safe() -> None:
    """Write what the terminal's encoding has no sign for as an escape, instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
