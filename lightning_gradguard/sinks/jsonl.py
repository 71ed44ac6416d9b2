"""Alerts as lines of JSON."""

from __future__ import annotations

from pathlib import Path

from lightning_gradguard.files.json_lines import Writer
from lightning_gradguard.record import Record

VERSION = 1
"""Of the lines; `files/schemas/alert.schema.json` says what they hold. A field may be added without a new one."""


class JsonlSink:
    """Appends each alert to a file as one line of strict JSON: `Alert.to_dict`, and the `version` of the lines.

    Folder and file appear with the first alert, so that a run without one leaves nothing behind. Alerts that can't be
    written, because the disk is full or the folder is gone, wait for the next record, up to 1,000 of them.

    Args:
        path: the file.
        sync: wait for each line to be on the disk, so that it survives a power cut; without it, it survives the process.
    """

    wants_every_step = False

    def __init__(self, path: str | Path, *, sync: bool = False) -> None:
        self._writer = Writer(Path(path), sync=sync)

    def write(self, record: Record) -> None:
        """Append the record's alerts, after those that are still waiting.

        Raises:
            OSError: if they can't be written now.
        """
        self._writer.write({"version": VERSION, **alert.to_dict()} for alert in record.alerts)

    def close(self) -> None:
        """Append what is still waiting. Nothing else to close: the file is open only while a line is written."""
        self._writer.write()

    def __repr__(self) -> str:
        return f"JsonlSink({str(self._writer.path)!r})"
