"""Whose a snapshot is, and its name."""

from __future__ import annotations

import errno
import os

from lightning_gradguard.recovery.snapshot_files import identity, rename


def test_identity_of_a_file_outlives_its_name_but_not_its_content(tmp_path):
    """Confirming a snapshot renames it."""
    path, other = tmp_path / "a", tmp_path / "b"
    path.write_bytes(b"1")
    before = identity(path)
    path.rename(other)
    assert identity(other) == before
    other.unlink()
    other.write_bytes(b"22")
    assert identity(other) != before


def test_identity_of_a_folder_changes_with_each_file_that_may_be_unpickled(tmp_path):
    """Ranks write checkpoints as folders; files of tensors alone may be another rank's business."""
    folder = tmp_path / "step-1.ckpt"
    (folder / "checkpoint").mkdir(parents=True)
    for name in ("meta.pt", "checkpoint/states.pt", "__0_0.distcp"):
        (folder / name).write_bytes(b"1")
    before = identity(folder)
    (folder / "__0_0.distcp").write_bytes(b"22")
    assert identity(folder) == before
    (folder / "checkpoint" / "states.pt").write_bytes(b"22")
    assert identity(folder) != before


def test_rename_works_where_folders_can_not_be_synced(tmp_path, monkeypatch):
    """As on some network file systems."""

    def refuse(_):
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", refuse)
    (tmp_path / "part").write_bytes(b"1")
    rename(tmp_path / "part", tmp_path / "whole")
    assert (tmp_path / "whole").read_bytes() == b"1"
