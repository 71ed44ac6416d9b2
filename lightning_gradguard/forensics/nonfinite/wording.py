"""Parts of the sentences about a culprit."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_gradguard.forensics.nonfinite.blame import Way
from lightning_gradguard.forensics.nonfinite.source_location import SourceLocation, shown_file

_NUM_ROWS_SHOWN = 5
_SELECTING = ("index", "index_select", "gather", "masked_fill", "masked_select", "nan_to_num", "where")
"""Operators of which a finite result of damaged input means that the damage was not selected."""


def place_in_words(location: SourceLocation, root: str = "training_step", *, is_hook: bool = False) -> str:
    """As in "in `head`, model.py:11,"."""
    hooked = location.hook_on or f"a tensor of `{location.module or root}`"
    where = f"in a hook on {hooked}" if is_hook else f"in {_caller(location, root)}"
    return where if location.line is None else f"{where}, {location.line},"


def _caller(location: SourceLocation, root: str) -> str:
    """The module; where it is a helper's line, that too."""
    helper = _helper(location)
    if not location.module:
        return f"`{helper or root}`"
    return f"`{location.module}`" + (f" (`{helper}`)" if helper else "")


def _helper(location: SourceLocation) -> str:
    """The function whose line it is, "" where the module says as much."""
    line = location.line
    place = None if line is None else (shown_file(line.file), line.number)
    at_line = [index for index, it in enumerate(location.frames) if (it.file, it.line) == place]
    named = [it.function for it in location.frames[at_line[0] :]] if at_line else []
    name = next((name for name in named if "<" not in name), "")  # neither a lambda nor a comprehension
    return "" if name.rpartition(".")[2] in ("forward", "training_step") else name


def way_in_words(way: Way | None, root: str = "training_step") -> str:
    """How damage came into the gradients that the loss does not show; as it ends a sentence."""
    if way is None:
        return ""
    entry = f"`{way.entry.node}` {place_in_words(way.entry.location, root)}".rstrip(",")
    if way.drop is None:
        return f"; the loss does not show it, but it comes into the gradients through {entry}"
    drop = f"`{way.drop.op}` {place_in_words(way.drop.location, root)}"
    selects = way.drop.op in _SELECTING or way.drop.is_partial
    left = "leaves it out of the loss" if selects else "gives a finite result"
    return f"; {drop} {left}, but it comes into the gradients through {entry}"


def rows_in_words(rows: Sequence[int] | None, how: str = "") -> str:
    """As it ends a sentence.

    >>> rows_in_words((3,)), rows_in_words((3, 7), " probably"), rows_in_words(None)
    (' in row 3', ', probably in rows 3 and 7', '')
    """
    if not rows:
        return ""
    begin = f",{how} in" if how else " in"
    if len(rows) == 1:
        return f"{begin} row {rows[0]}"
    shown = [str(row) for row in rows[:_NUM_ROWS_SHOWN]]
    if len(rows) > _NUM_ROWS_SHOWN:
        return f"{begin} rows {', '.join(shown)} and {len(rows) - _NUM_ROWS_SHOWN} more"
    return f"{begin} rows {', '.join(shown[:-1])} and {shown[-1]}"
