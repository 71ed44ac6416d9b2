"""Alerts as lines of JSON."""

from __future__ import annotations

import json
from pathlib import Path

from lightning_gradguard.record import Record


class JsonlSink:
    """Appends each alert to a file as one line of strict JSON; see `Alert.to_dict`.

    Folder and file appear with the first alert, so that a run without one leaves nothing behind.

    Args:
        path: the file.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)

    def write(self, record: Record) -> None:
        """Append the record's alerts, and have them on disk when it returns."""
        if not record.alerts:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps(alert.to_dict(), allow_nan=False) + "\n" for alert in record.alerts]
        with self._path.open("a", encoding="utf-8") as file:
            file.write("".join(lines))

    def close(self) -> None:
        """Nothing to close: the file is open only while a line is written."""

    def __repr__(self) -> str:
        return f"JsonlSink({str(self._path)!r})"
