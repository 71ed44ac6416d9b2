"""Files of one JSON object a line, such as `alerts.jsonl`: appended to by several processes, read whatever is in them.

The file may have been broken off by a kill, a full disk or a power cut, or come from a stranger. What is whole is read; what
is not is counted, and never stands in the way of what follows it.
"""

from __future__ import annotations

import errno
import json
import os
import re
import stat
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Generic, NoReturn, TypeVar

from lightning_gradguard.wording import counted

T = TypeVar("T")

MAX_LINE_BYTES = 8 * 2**20
"""A longer line is passed over without being held in memory."""

_MAX_DIGITS = 40
_SALVAGE_BYTES = 32 * 2**20
"""How much of a broken line is looked at, all attempts together, to find whole objects in it."""
_MAX_ATTEMPTS = 1000
_OBJECT = re.compile(r'\{\s*"')
_O_NONBLOCK = getattr(os, "O_NONBLOCK", 0)
_O_BINARY = getattr(os, "O_BINARY", 0)


@dataclass
class LeftOut:
    """What a reader could not use.

    Attributes:
        reasons: how often for each reason, in words.
        first_line: number of the first such line, from 1; 0: there is none.
    """

    reasons: Counter[str] = field(default_factory=Counter)
    first_line: int = 0

    @property
    def count(self) -> int:
        """Lines, or parts of lines, that were left out."""
        return self.reasons.total()

    def note(self, number: int, reason: str) -> None:
        """Count one more."""
        self.first_line = self.first_line or number
        self.reasons[reason] += 1

    def __str__(self) -> str:
        """For instance `2 lines left out, the first is line 7: not JSON (2)`."""
        what = ", ".join(f"{reason} ({count})" for reason, count in self.reasons.most_common(5))
        more = ", and other reasons" if len(self.reasons) > 5 else ""
        return f"{counted(self.count, 'line')} left out, the first is line {self.first_line:,}: {what}{more}"


def append(path: Path, entry: Mapping[str, Any], *, sync: bool = False) -> None:
    """Add one object as a line, in one write; folder and file are made.

    If the file ends in the middle of a line, a new one is begun. Several processes may append at once: the system appends
    each write as a whole.

    Args:
        path: the file.
        entry: the object.
        sync: wait until it is on the disk, so that it survives a power cut, too; without it, it survives the process.

    Raises:
        OSError: if it can't be written as a whole; what part of it was written does no harm.
        ValueError: if it is not strict JSON, or too long for a line.
    """
    line = json.dumps(entry, allow_nan=False).encode() + b"\n"
    if len(line) > MAX_LINE_BYTES:
        raise ValueError(f"A line must not exceed {MAX_LINE_BYTES:,} bytes, got {len(line):,}.")
    path.parent.mkdir(parents=True, exist_ok=True)
    # A named pipe without a reader would block for good.
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | _O_NONBLOCK | _O_BINARY, 0o666)
    try:
        line = b"\n" + line if _ends_inside_a_line(descriptor) else line
        num_written = os.write(descriptor, line)
        if num_written < len(line):
            raise OSError(errno.ENOSPC, f"Only {num_written} of {counted(len(line), 'byte')} could be written", str(path))
        if sync:
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _ends_inside_a_line(descriptor: int) -> bool:
    about = os.fstat(descriptor)
    if not stat.S_ISREG(about.st_mode) or not about.st_size:
        return False
    os.lseek(descriptor, -1, os.SEEK_END)
    return os.read(descriptor, 1) != b"\n"


class Writer:
    """Appends to a file, and keeps what can't be written until it can.

    Args:
        path: the file; it and its folder appear with the first entry.
        sync: see `append`.
        max_waiting: entries that are kept at most; then the oldest are given up.

    Attributes:
        num_lost: entries that were given up.
    """

    def __init__(self, path: Path, *, sync: bool = False, max_waiting: int = 1000) -> None:
        self.path = path
        self.num_lost = 0
        self._sync = sync
        self._max_waiting = max_waiting
        self._waiting: deque[Mapping[str, Any]] = deque()

    def write(self, entries: Iterable[Mapping[str, Any]] = ()) -> None:
        """Append what is still waiting, then these.

        Raises:
            OSError: if something can't be written now; it says how many entries are waiting.
            ValueError: for an entry that can never be written; it is given up.
        """
        self._waiting.extend(entries)
        while len(self._waiting) > self._max_waiting:
            self._give_up()
        while self._waiting:
            try:
                append(self.path, self._waiting[0], sync=self._sync)
            except OSError as error:
                number = len(self._waiting)
                waiting = f"{counted(number, 'line')} {'waits' if number == 1 else 'wait'}"
                raise OSError(error.errno, f"{error.strerror or error}; {waiting} to be written", str(self.path)) from error
            except ValueError:
                self._give_up()
                raise
            self._waiting.popleft()

    def _give_up(self) -> None:
        self._waiting.popleft()
        self.num_lost += 1


class Reader(Generic[T]):
    """Reads a file that may grow: each call of `read` gives what has been added since.

    Args:
        path: the file.
        convert: makes of an object what is wanted; raises `ValueError` with the reason where it lacks something.

    Attributes:
        left_out: what could not be used so far.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder) / "some.jsonl"
    ...     _ = path.write_text(chr(10).join(['{"a": 1}', "null", '{"a": [2']))
    ...     reader = Reader(path, lambda entry: entry["a"])
    ...     print(list(reader.read()), reader.left_out)
    [1] 2 lines left out, the first is line 2: no JSON object (1), no whole JSON (1)
    """

    def __init__(self, path: Path, convert: Callable[[dict[str, Any]], T]) -> None:
        self._path = path
        self._convert = convert
        self._offset = 0
        self._num_lines = 0
        self.left_out = LeftOut()

    def read(self, *, is_growing: bool = False) -> Iterator[T]:
        """Whatever is whole and valid, in the file's order.

        Args:
            is_growing: whether somebody is writing the file: a last line that has no end yet is left for the next call.

        Raises:
            OSError: if the file can't be read.
        """
        with _open_regular(self._path) as file:
            if file.seek(0, os.SEEK_END) < self._offset:  # it was begun anew
                self._offset = self._num_lines = 0
            file.seek(self._offset)
            for line, is_whole in _lines(file):
                if is_growing and not is_whole:
                    return
                self._offset = file.tell()
                self._num_lines += 1
                yield from self._entries(line)

    def _entries(self, line: bytes | None) -> Iterator[T]:
        if line is None:
            self._note(f"longer than {MAX_LINE_BYTES:,} bytes")
            return
        if self._num_lines == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if not line.strip():
            return
        try:
            content = _DECODER.decode(line.decode("utf-8"))
        except UnicodeDecodeError:
            yield from self._salvage(line, "not UTF-8")
        except json.JSONDecodeError:
            yield from self._salvage(line, "no whole JSON")
        except RecursionError:
            self._note("nested too deeply")
        except ValueError as error:
            self._note(str(error))
        else:
            yield from self._converted(content)

    def _converted(self, content: Any) -> Iterator[T]:
        if not isinstance(content, dict):
            self._note("no JSON object")
            return
        try:
            value = self._convert(content)
        except (ValueError, RecursionError) as error:
            self._note(str(error) or "not valid")
        else:
            yield value

    def _salvage(self, line: bytes, reason: str) -> Iterator[T]:
        """The whole objects in a line that as such is none: a half one that was left open may stand before them."""
        text = line.decode("utf-8", errors="replace")
        position, attempts = 0, min(_MAX_ATTEMPTS, 1 + _SALVAGE_BYTES // len(line))
        self._note(reason)
        while attempts and (start := _OBJECT.search(text, position)) is not None:
            attempts -= 1
            try:
                content, position = _DECODER.raw_decode(text, start.start())
                value = self._convert(content)
            except (ValueError, RecursionError):
                position = start.start() + 1
            else:
                yield value

    def _note(self, reason: str) -> None:
        self.left_out.note(self._num_lines, reason)


def _open_regular(path: Path) -> BinaryIO:
    descriptor = os.open(path, os.O_RDONLY | _O_NONBLOCK | _O_BINARY)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "Is no regular file", str(path))
    return os.fdopen(descriptor, "rb")


def _lines(file: BinaryIO) -> Iterator[tuple[bytes | None, bool]]:
    """Each line and whether it has an end; None in the place of one that is too long."""
    while line := file.readline(MAX_LINE_BYTES + 1):
        if len(line) <= MAX_LINE_BYTES:
            yield line, line.endswith(b"\n")
            continue
        while line and not line.endswith(b"\n"):
            line = file.readline(MAX_LINE_BYTES)
        yield None, bool(line)


def _integer(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise ValueError("a number of too many digits")
    return int(digits)


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} as a number")


_DECODER = json.JSONDecoder(parse_int=_integer, parse_constant=_refuse)
