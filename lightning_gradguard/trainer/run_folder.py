"""Where a run's own files go."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


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
    protocol, separator, place = str(log_dir).rpartition("://")
    if separator:
        place = place if protocol == "file" else f"{protocol}/{place}"
    return Path(place).absolute() / "gradguard"
