"""Ways in which a disk misbehaves, that work for root as well."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest


@contextmanager
def file_size_limit(num_bytes: int) -> Iterator[None]:
    """No file of this process may grow beyond it, as with a quota; root is not exempt."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@contextmanager
def full(folder: Path) -> Iterator[None]:
    """The file system of the folder has no room left; it must be one of `small_disk`."""
    filler = folder / "filler"
    with filler.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(b"x" * 4096)
        except OSError:
            pass
    try:
        yield
    finally:
        filler.unlink()


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Nothing can be written there; it must be a `small_disk`."""
    subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["mount", "-o", "remount,rw", str(folder)], check=True)


@contextmanager
def vanished(folder: Path) -> Iterator[None]:
    """Somebody deletes what is in it, once."""
    for path in folder.iterdir():
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()
    yield


@contextmanager
def replaced_by_a_file(folder: Path) -> Iterator[None]:
    """Each folder in it is a file for a while; then what was there is there again."""
    places = [path for path in folder.iterdir() if path.is_dir()]
    for path in places:
        path.rename(path.with_name(f"{path.name}.away"))
        while not path.is_file():
            # The thread of TensorBoard's writer may make the folder again just now.
            shutil.rmtree(path, ignore_errors=True)
            with suppress(OSError):
                path.write_text("in the way", encoding="utf-8")
    try:
        yield
    finally:
        for path in places:
            path.unlink()
            while (away := path.with_name(f"{path.name}.away")).exists():
                shutil.rmtree(path, ignore_errors=True)
                with suppress(OSError):
                    away.rename(path)


@contextmanager
def quota(folder: Path) -> Iterator[None]:
    """No file may grow at all."""
    with file_size_limit(0):
        yield


@contextmanager
def small_disk(folder: Path, size: str = "1m") -> Iterator[Path]:
    """A file system of its own in memory; skips the test where none can be mounted."""
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("file systems can't be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)
