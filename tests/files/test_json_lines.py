"""Files of one JSON object a line: what is whole is read, whatever stands beside it."""

from __future__ import annotations

import errno
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from builders import examples
from disk_faults import file_size_limit
from hypothesis import given
from hypothesis import strategies as st

from lightning_gradguard.files import json_lines
from lightning_gradguard.files.json_lines import MAX_LINE_BYTES, Reader, Writer, append

ODD_LINES = {
    "bad UTF-8": b"\xff\xfe\x00{",
    "NUL": b"\x00" * 4096,
    "UTF-16": json.dumps({"n": 1}).encode("utf-16"),
    "null": b"null",
    "list": b"[1]",
    "string": b'"n"',
    "missing field": b'{"m": 1}',
    "wrong type": b'{"n": "1"}',
    "NaN as a number": b'{"n": NaN}',
    "deep": b"[" * 100_000,
    "deep object": b'{"n":' * 100_000,
    "many digits": b'{"n": ' + b"1" * 1_000_000 + b"}",
    "two values": b'{"m": 1} 2',
    "lone quote": b'"',
    "too long": b"x" * (MAX_LINE_BYTES + 1),
    "too long for an object": b'{"n": 1, "m": "' + b"x" * MAX_LINE_BYTES + b'"}',
}


def number_in(entry):
    """The field that the tests' objects have."""
    if type(entry.get("n")) is not int:
        raise ValueError("`n` is not valid")
    return entry["n"]


def read(path):
    """All numbers, and what was left out."""
    reader = Reader(path, number_in)
    return list(reader.read()), reader.left_out


@pytest.mark.parametrize("odd", ODD_LINES.values(), ids=ODD_LINES)
def test_odd_line_is_counted_and_the_others_are_read(odd, tmp_path):
    """Before it and after it."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"n": 1}\n' + odd + b'\n{"n": 2}\n')
    found, left_out = read(path)
    assert found == [1, 2]
    assert (left_out.count, left_out.first_line) == (1, 2)


@pytest.mark.parametrize("content", [b"", b"\n\n", b'\xef\xbb\xbf{"n": 1}\n', b'{"n": 1}\r\n', b'{"n": 1}'])
def test_ordinary_file_leaves_nothing_out(content, tmp_path):
    """Also an empty one, blank lines, a byte order mark, Windows' line ends, and no end of the last line."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    found, left_out = read(path)
    assert found == [1] * (b"1" in content)
    assert left_out.count == 0


def test_half_line_does_not_swallow_the_whole_ones_that_were_glued_to_it(tmp_path):
    """As earlier versions wrote them."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"n": 1, "te{"n": 2}{"n": 3}\n{"n": 4}\n')
    found, left_out = read(path)
    assert found == [2, 3, 4]
    assert str(left_out) == "1 line left out, the first is line 1: no whole JSON (1)"


@examples
@given(st.lists(st.one_of(st.integers(-(10**9), 10**9), st.binary(max_size=60)), max_size=12))
def test_whole_lines_among_any_bytes_are_all_read(tmp_path_factory, parts):
    """In order. The odd ones stand on lines of their own, and none is a whole object by chance."""
    path = tmp_path_factory.mktemp("any") / "a.jsonl"
    lines = [json.dumps({"n": part}).encode() if isinstance(part, int) else part.replace(b"{", b"") for part in parts]
    path.write_bytes(b"\n".join(lines))
    assert read(path)[0] == [part for part in parts if isinstance(part, int)]


@examples
@given(st.integers(0, 80))
def test_line_appended_after_any_cut_is_read(tmp_path_factory, cut):
    """Whatever a kill has left of the file."""
    path = tmp_path_factory.mktemp("cut") / "a.jsonl"
    whole = b"".join(b'{"n": %d, "text": "\\u00e9"}\n' % number for number in range(3))
    path.write_bytes(whole[:cut])
    append(path, {"n": 9})
    found, _ = read(path)
    assert found == [*range(whole[:cut].count(b"}")), 9]


def test_growing_file_is_read_from_where_the_last_call_ended(tmp_path):
    """A line that is being written waits; a file that was begun anew is read from its beginning."""
    path = tmp_path / "a.jsonl"
    reader = Reader(path, number_in)
    path.write_bytes(b'{"n": 1}\n{"n": 2')
    assert list(reader.read(is_growing=True)) == [1]
    with path.open("ab") as file:
        file.write(b'2}\n{"n": 3}\n')
    assert list(reader.read(is_growing=True)) == [22, 3]
    path.write_bytes(b'{"n": 4}\n')
    assert list(reader.read(is_growing=True)) == [4]
    assert reader.left_out.count == 0


def test_long_line_is_passed_over_without_being_held_in_memory(tmp_path):
    """A gigabyte in one line, most of it a hole in the file."""
    path = tmp_path / "a.jsonl"
    with path.open("wb") as file:
        file.write(b'{"n": 1}\n')
        file.seek(1 << 30)
        file.write(b'\n{"n": 2}\n')
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found, left_out = read(path)
    assert found == [1, 2]
    assert left_out.count == 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=["named pipe", "folder"])
def test_what_is_no_file_is_an_error_and_does_not_block(make, tmp_path):
    """Neither reading nor writing."""
    path = tmp_path / "a.jsonl"
    make(path)
    with pytest.raises(OSError, match=r"a\.jsonl"):
        read(path)
    if path.is_dir():
        with pytest.raises(OSError, match=r"a\.jsonl"):
            append(path, {"n": 1})
    else:
        append(path, {"n": 1})  # into the pipe's buffer, at most


def test_two_processes_that_append_at_once_lose_nothing(tmp_path):
    """A thousand lines each, long enough to be torn if they could be."""
    path = tmp_path / "a.jsonl"
    code = (
        "import sys; from pathlib import Path; from lightning_gradguard.files.json_lines import append\n"
        "for number in range(1000): append(Path(sys.argv[1]), {'n': number, 'text': 'x' * 5000})"
    )
    both = [subprocess.Popen([sys.executable, "-c", code, str(path)]) for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    found, left_out = read(path)
    assert sorted(found) == sorted([*range(1000)] * 2)
    assert left_out.count == 0


def test_line_that_can_not_be_written_as_a_whole_is_an_error_and_is_written_later(tmp_path):
    """A quota that is reached in the middle of a line."""
    path = tmp_path / "a.jsonl"
    writer = Writer(path)
    writer.write([{"n": 1}])
    with file_size_limit(15), pytest.raises(OSError, match="2 lines wait to be written"):
        writer.write([{"n": 2}, {"n": 3}])
    assert read(path)[0] == [1]
    writer.write()
    assert read(path)[0] == [1, 2, 3]
    assert writer.num_lost == 0


def test_full_disk_keeps_no_more_than_asked(tmp_path):
    """The oldest are given up, and counted."""
    path = tmp_path / "a.jsonl"
    path.symlink_to("/dev/full")
    writer = Writer(path, max_waiting=2)
    for number in range(4):
        with pytest.raises(OSError, match="No space left") as error:
            writer.write([{"n": number}])
    assert error.value.errno == errno.ENOSPC
    path.unlink()
    writer.write()
    assert read(path)[0] == [2, 3]
    assert writer.num_lost == 2


def test_folder_that_vanishes_is_made_again(tmp_path):
    """The lines before are gone with it; those after are there."""
    path = tmp_path / "run" / "a.jsonl"
    append(path, {"n": 1})
    path.unlink()
    path.parent.rmdir()
    append(path, {"n": 2})
    assert read(path)[0] == [2]


def test_entry_that_can_never_be_written_stands_in_nobodys_way(tmp_path, monkeypatch):
    """What is no JSON, and what is too long for a line."""
    monkeypatch.setattr(json_lines, "MAX_LINE_BYTES", 100)
    writer = Writer(tmp_path / "a.jsonl")
    for bad in (float("nan"), "x" * 100):
        with pytest.raises(ValueError, match=r"not JSON compliant|must not exceed"):
            writer.write([{"n": bad}])
    writer.write([{"n": 1}])
    assert read(tmp_path / "a.jsonl")[0] == [1]
    assert writer.num_lost == 2


def test_line_is_on_the_disk_where_that_is_asked(tmp_path, monkeypatch):
    """By fsync, after it was written."""
    sizes = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: sizes.append(os.fstat(descriptor).st_size))
    append(tmp_path / "a.jsonl", {"n": 1}, sync=True)
    append(tmp_path / "a.jsonl", {"n": 2})
    assert sizes == [len(b'{"n": 1}\n')]


def test_many_reasons_are_not_all_listed(tmp_path):
    """Five, and that there are others."""
    path = tmp_path / "a.jsonl"
    path.write_text("".join(f'{{"n": {number}}}\n' for number in range(7)), encoding="utf-8")

    def refuse(entry):
        raise ValueError(f"reason {entry['n']}")

    reader = Reader(Path(path), refuse)
    assert list(reader.read()) == []
    assert str(reader.left_out).endswith("reason 4 (1), and other reasons")
