"""Event files that outlive a full disk.

TensorBoard's writer has a thread that writes what was queued. It dies at the first error, prints a traceback, and raises
that error from whatever is logged next, by whomever: a disk that is full for a moment while the guard writes would end the
training later on, in the user's own `self.log`.

A writer of the guard's own would keep the two apart, but TensorBoard reads the event files of a folder one after another,
and passes over what is added to an earlier one; in a folder of its own the guard would be another run. So both share the
logger's writer, and what is put into it here is beneath the thread: where a record can't be written, the thread goes on,
and later records go into a new file beside the first one.
"""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path

from tensorboard.compat import tf
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard import SummaryWriter


def make_lasting(writer: SummaryWriter) -> LastingRecordWriter | None:
    """Put a `LastingRecordWriter` beneath the thread of a writer, if there is none yet. It stays there until that is closed.

    Returns:
        It; None if this version of TensorBoard has no place for it.
    """
    event_writer = writer._get_file_writer().event_writer  # type: ignore[no-untyped-call]
    try:
        queue = event_writer._async_writer
        if not isinstance(queue._writer, LastingRecordWriter):
            lasting = LastingRecordWriter(queue._writer, event_writer._file_name)
            queue._writer = queue._worker._record_writer = lasting
        found: LastingRecordWriter = queue._writer
    except AttributeError:
        return None
    return found


class LastingRecordWriter:
    """Stands in for the `RecordWriter` of an event file; its methods run in TensorBoard's thread and raise nothing.

    Args:
        writer: of the file.
        path: the file.

    Attributes:
        error: why something was lost since `raise_error`; None: nothing was.
        num_lost: records that were lost.
    """

    def __init__(self, writer: RecordWriter, path: str) -> None:
        self._writer: RecordWriter | None = writer
        self._path = path
        self._num_files = 1
        self.error: Exception | None = None
        self.num_lost = 0

    def raise_error(self) -> None:
        """Raise why something was lost, if something was, once."""
        if self.error is not None:
            error, self.error = self.error, None
            raise OSError(
                f"{error}. Events are lost until they can be written again; they then go into a new file beside "
                f"{Path(self._path).name}"
            ) from error

    def write(self, data: bytes) -> None:
        """Write a record, or lose it."""
        if self._writer is None:
            self._open_another()
        if self._writer is None:
            self.num_lost += 1
            return
        try:
            self._writer.write(data)
        except Exception as error:  # noqa: BLE001 - the thread must live
            self.num_lost += 1
            self._fail(error)

    def flush(self) -> None:
        """Write out what the file system's own writer holds back."""
        if self._writer is not None:
            try:
                self._writer.flush()
            except Exception as error:  # noqa: BLE001 - the thread must live
                self._fail(error)

    def close(self) -> None:
        """Close the file."""
        if self._writer is not None:
            try:
                self._writer.close()
            except Exception as error:  # noqa: BLE001 - the training is over, and has to end in peace
                self._fail(error)

    def _fail(self, error: Exception) -> None:
        # A part of the record may stand at the end of the file, and nothing can be read behind it.
        self.error, self._writer = error, None

    def _open_another(self) -> None:
        """Begin a file whose name comes after this one's, so that TensorBoard reads it next."""
        path = f"{self._path}.{self._num_files:04d}"
        try:
            tf.io.gfile.makedirs(str(Path(path).parent))
            writer = RecordWriter(tf.io.gfile.GFile(path, "wb"))
            writer.write(Event(wall_time=time.time(), file_version="brain.Event:2").SerializeToString())
            writer.flush()
        except Exception as error:  # noqa: BLE001 - the thread must live
            self._fail(error)
            with suppress(OSError):
                Path(path).unlink()
        else:
            self._writer, self._num_files = writer, self._num_files + 1
