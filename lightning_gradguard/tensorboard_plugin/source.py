"""The lines of code around a culprit, where its file is at hand and still the one that ran."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

MAX_FRAMES = 5
_AROUND = 3
_MAX_BYTES = 2**20


def frames(culprit: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The calls that led to a culprit, innermost first, each with the lines around it.

    Returns:
        `{file, line, function, lines}` each; `lines` are pairs of number and text.
    """
    given = [entry for entry in culprit.get("frames") or () if isinstance(entry, Mapping)]
    if not given and culprit.get("source"):
        given = [{key: culprit.get(key) for key in ("file", "line", "source")}]
    return [_frame(entry) for entry in given[:MAX_FRAMES]]


def _frame(entry: Mapping[str, Any]) -> dict[str, Any]:
    file, line, source = entry.get("file"), entry.get("line"), str(entry.get("source") or "")
    lines: list[tuple[int | None, str]] = [(line if isinstance(line, int) else None, source)] if source else []
    if isinstance(file, str) and isinstance(line, int) and source:
        lines = _around(Path(file), line, source) or lines
    return {"file": file, "line": line, "function": str(entry.get("function") or ""), "lines": lines}


def _around(path: Path, line: int, source: str) -> list[tuple[int | None, str]]:
    """The lines next to one; none unless that line reads as it did: a log may name any file, and files change."""
    if path.suffix != ".py" or not path.is_absolute():
        return []
    try:
        if path.stat().st_size > _MAX_BYTES:
            return []
        texts = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return []
    if not 0 < line <= len(texts) or texts[line - 1].strip() != source.strip():
        return []
    first = max(line - _AROUND, 1)
    return [(first + index, text) for index, text in enumerate(texts[first - 1 : line + _AROUND])]
