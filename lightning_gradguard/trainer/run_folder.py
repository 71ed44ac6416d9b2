"""Where a run's own files go."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

_ADDRESS = re.compile(r"([a-z][a-z0-9+.-]+):/+(.*)")
"""Two letters at least: `c:/` is a drive."""


def run_folder(trainer: Trainer) -> Path | None:
    """`gradguard` in the Trainer's log_dir, on this machine, wherever the program changes its directory to later.

    Of a log_dir that is elsewhere, as `s3://bucket/run`, the folder is `s3/bucket/run/gradguard` in the current directory:
    lines are appended and files renamed there, which object stores can't do.

    Must be called on all ranks, since the Trainer agrees on its log_dir between them.

    Returns:
        The folder, which may not be there yet; None if the run writes no files.
    """
    log_dir = trainer.log_dir
    if log_dir is None or trainer.fast_dev_run:  # type: ignore[attr-defined]  # set by a connector
        return None
    place = str(log_dir)
    if (address := _ADDRESS.fullmatch(place)) is not None:
        protocol, there = address.groups()
        place = f"/{there}" if protocol == "file" else f"{protocol}/{there}"
    return Path(place).absolute() / "gradguard"


def is_elsewhere(log_dir: str) -> bool:
    """Whether a log_dir is an address that is not on this machine."""
    address = _ADDRESS.fullmatch(log_dir)
    return address is not None and address[1] != "file"
