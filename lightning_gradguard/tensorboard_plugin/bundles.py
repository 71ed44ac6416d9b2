"""Where the file of a bad step lies, and how to run that step again."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def folder_of(log_dir: str | None, run: str) -> Path | None:
    """The folder of a run's event files; None if it is not on this machine."""
    if not log_dir or "://" in log_dir:
        return None
    root = Path(log_dir).expanduser().resolve()
    folder = (root / run).resolve()
    return folder if folder.is_relative_to(root) and folder.is_dir() else None


def bundle_of(folder: Path | None, alert: Mapping[str, Any]) -> dict[str, str] | None:
    """Path and command of the bundle that was written of an alert's step; None if there is none here."""
    step, kind = alert["step"], str(alert["kind"])
    if folder is None or "/" in kind or not isinstance(step, int):
        return None
    names = (f"{kind}-step{step}.bundle.pt", f"{kind}-step{step}-rank{alert['rank']}.bundle.pt")
    path = next((path for name in names if (path := folder / "gradguard" / name).is_file()), None)
    if path is None:
        return None
    command = f"gradguard replay {shlex.quote(str(path))} --module package.module:function"
    return {"path": str(path), "command": command}
