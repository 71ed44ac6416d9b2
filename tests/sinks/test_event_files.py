"""Event files on a disk that fails: TensorBoard's thread lives, and what can be written is."""

from __future__ import annotations

import shutil

import pytest
from disk_faults import file_size_limit
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from lightning_gradguard.sinks.event_files import make_lasting


def steps_in(folder):
    """Of one tag, over all files."""
    return [event.step for event in EventAccumulator(str(folder)).Reload().Scalars("x")]


def test_events_after_a_full_disk_go_into_a_new_file(tmp_path):
    """Those of the meantime are lost, and counted; the error is told once."""
    writer = SummaryWriter(str(tmp_path))
    lasting = make_lasting(writer)
    assert make_lasting(writer) is lasting
    for step in range(10):
        if step == 3:
            with file_size_limit(0):
                writer.add_scalar("x", 1.0, step)
                writer.flush()
        else:
            writer.add_scalar("x", 1.0, step)
            writer.flush()
    writer.close()
    assert steps_in(tmp_path) == [0, 1, 2, 4, 5, 6, 7, 8, 9]
    assert lasting.num_lost == 1
    assert len(list(tmp_path.iterdir())) == 2
    with pytest.raises(OSError, match="Events are lost until they can be written again"):
        lasting.raise_error()
    lasting.raise_error()


def test_folder_that_is_gone_is_made_again(tmp_path):
    """What was in it is gone."""
    writer = SummaryWriter(str(tmp_path / "run"))
    lasting = make_lasting(writer)
    writer.add_scalar("x", 1.0, 0)
    writer.flush()
    shutil.rmtree(tmp_path / "run")
    for step in (1, 2):
        writer.add_scalar("x", 1.0, step)
    writer.close()
    assert steps_in(tmp_path / "run") == [2]
    assert lasting.num_lost == 1


def test_failure_of_flush_and_close_ends_nothing(tmp_path):
    """A file system may write only then."""
    writer = SummaryWriter(str(tmp_path))
    lasting = make_lasting(writer)

    class Late:
        def flush(self):
            raise OSError("full")

        close = flush

    for method in (lasting.flush, lasting.close):
        lasting._writer = Late()
        method()
        assert lasting._writer is None
        method()
    with pytest.raises(OSError, match="full"):
        lasting.raise_error()
    writer.close()


def test_tensorboard_that_is_made_otherwise_is_left_alone(tmp_path):
    """There is no place for it, and all else works."""
    writer = SummaryWriter(str(tmp_path))
    queue = writer._get_file_writer().event_writer._async_writer
    worker = queue.__dict__.pop("_worker")
    assert make_lasting(writer) is None
    queue._worker = worker
    writer.close()
