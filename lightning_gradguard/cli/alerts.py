"""The alerts of all runs below a folder: a table, lines of JSON, or as they come."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from lightning_gradguard.alert import KINDS, Alert
from lightning_gradguard.cli.terminal import cell, console, fail, nearest, print_json, remark, run_folder, say
from lightning_gradguard.files.json_lines import Reader
from lightning_gradguard.wording import counted

_WIDE = 110
_POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Found:
    """An alert, and the run that it is of."""

    run: str
    alert: Alert


class Runs:
    """The files `alerts.jsonl` below a folder, read from where they were left.

    Args:
        place: the folder, or one such file. The folder `gradguard` itself stands for the run that it is in.
    """

    def __init__(self, place: Path) -> None:
        self._place = run_folder(place)
        self._readers: dict[Path, Reader[Alert]] = {}
        self._num_remarked: dict[Path, int] = {}
        self.unreadable: set[Path] = set()
        """Files that could not be read."""

    def read(self, *, is_growing: bool = False) -> Iterator[Found]:
        """What is new since the last call; what can't be used is remarked."""
        for path in self._paths():
            reader = self._readers.setdefault(path, Reader(path, Alert.from_dict))
            try:
                for alert in reader.read(is_growing=is_growing):
                    yield Found(self._run_of(path), alert)
            except OSError as error:
                if path not in self.unreadable:
                    remark(f"{path} can't be read: {error.strerror or error}.")
                self.unreadable.add(path)
            if reader.left_out.count != self._num_remarked.get(path, 0):
                self._num_remarked[path] = reader.left_out.count
                remark(f"{path}: {reader.left_out}.")

    @property
    def has_files(self) -> bool:
        """Whether there is one by now."""
        return bool(self._readers)

    def _paths(self) -> list[Path]:
        return [self._place] if self._place.is_file() else sorted(self._place.rglob("gradguard/alerts.jsonl"))

    def _run_of(self, path: Path) -> str:
        folder = path.parent.parent
        return str(folder.relative_to(self._place)) if folder.is_relative_to(self._place) else str(folder)


def list_alerts(place: Path, kinds: Collection[str], last: int, *, as_json: bool) -> None:
    """Print those of the given kinds; without any, all."""
    runs = Runs(place)
    seen: set[str] = set()
    number = 0
    shown: deque[Found] = deque(maxlen=last or None)
    for found in runs.read():
        seen.add(found.alert.kind)
        if kinds and found.alert.kind not in kinds:
            continue
        number += 1
        if as_json:
            print_json(_as_dict(found))
        else:
            shown.append(found)
    _refuse_unknown(kinds, seen)
    if runs.unreadable and not seen:
        fail("No file could be read.")
    if as_json:
        return
    if not number:
        why = "" if runs.has_files else ": there is no gradguard/alerts.jsonl. A run in which nothing was found has none"
        say(f"No alerts below {place}{why}.")
        return
    console().print(_table(shown))
    left = f" The first {number - len(shown):,} are not shown; `--last 0` shows all." if number > len(shown) else ""
    say(f"{counted(number, 'alert')}.{left}")


def follow_alerts(place: Path, kinds: Collection[str], *, as_json: bool) -> None:
    """Print them line by line as they are written, until interrupted."""
    _refuse_unknown(kinds, set())
    runs = Runs(place)
    try:
        while True:
            for found in runs.read(is_growing=True):
                if not kinds or found.alert.kind in kinds:
                    _print_line(found, as_json=as_json)
            time.sleep(_POLL_SECONDS)
    except KeyboardInterrupt:
        return


def _refuse_unknown(kinds: Collection[str], seen: Collection[str]) -> None:
    for kind in kinds:
        if kind not in seen and kind not in KINDS:
            fail(f"There is no alert of kind {kind!r}. {nearest(kind, {*KINDS, *seen})}")


def _print_line(found: Found, *, as_json: bool) -> None:
    if as_json:
        print_json(_as_dict(found))
        return
    alert = found.alert
    run = "" if found.run == "." else f"{found.run}: "
    say(f"{run}step {alert.step}: {alert.kind}, {alert.action}: {_what(alert)}")


def _as_dict(found: Found) -> dict[str, Any]:
    return {"run": found.run, **found.alert.to_dict()}


def _table(shown: Collection[Found]) -> Table:
    """Columns that all alerts have in common, or that there is no room for, are left out."""
    is_wide = console().width >= _WIDE
    with_runs = len({found.run for found in shown}) > 1 or is_wide
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in (
        *("run",) * with_runs,
        "step",
        *("epoch", "batch") * is_wide,
        "kind",
        "action",
        *("value", "limit") * is_wide,
    ):
        table.add_column(name, overflow="fold", max_width=24)
    table.add_column("what", overflow="fold", ratio=1, min_width=24)
    for found in shown:
        alert = found.alert
        row: list[object] = [found.run] if with_runs else []
        row.append(alert.step)
        row += [_or_blank(alert.epoch), _or_blank(alert.batch_idx)] if is_wide else []
        row += [alert.kind, alert.action]
        row += [f"{alert.value:.4g}", f"{alert.limit:.4g}"] if is_wide else []
        table.add_row(*map(cell, (*row, _what(alert))))
    return table


def _or_blank(value: int | None) -> str:
    return "" if value is None else str(value)


def _what(alert: Alert) -> str:
    culprit = alert.culprit
    if culprit is None:
        return alert.message.partition(": ")[2] or alert.message
    return f"{culprit.cause or culprit.phase}: {culprit.message}"
