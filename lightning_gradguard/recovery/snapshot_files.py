"""Files and folders of snapshots: who has written one, and its name."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path

_TENSORS_ALONE = ".distcp"
"""Ends the names of files that are never unpickled, in the folder of a checkpoint that ranks write together."""


def identity(path: Path) -> tuple[int, ...]:
    """Tells a file from any other in its place; a new name leaves it as it is.

    Of a folder it is that of all files in it that may be unpickled.

    Raises:
        OSError: if it is not there.
    """
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file() and file.suffix != _TENSORS_ALONE)
        return tuple(part for file in files for part in identity(file))
    about = path.stat()
    return about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns


def rename(source: Path, target: Path) -> None:
    """Give a file or folder its name, in one go, and on the disk when it returns; what has that name is replaced.

    Raises:
        OSError: if that can't be done.
    """
    if target.is_dir():
        shutil.rmtree(target)
    source.replace(target)
    with suppress(OSError):  # not every file system does this for folders
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def delete(path: Path) -> None:
    """Delete a file or a folder; nothing where it is not there.

    Raises:
        OSError: if that can't be done.
    """
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
