"""Which snapshots are kept, and which of them are good."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass
class Entry(Generic[T]):
    """One snapshot.

    Attributes:
        step: how many steps had been taken.
        content: what was kept, or where.
        is_good: whether enough healthy steps followed.
        num_healthy: how many did so far.
        num_returns: how often training went back to it.
    """

    step: int
    content: T
    is_good: bool = False
    num_healthy: int = 0
    num_returns: int = 0


class Ring(Generic[T]):
    """A few snapshots, oldest first. The only good one is never given away.

    Args:
        keep: how many, >= 2.
        confirm_steps: healthy steps after which one is good, >= 0.

    >>> ring = Ring(keep=2, confirm_steps=1)
    >>> ring.add(0, "first", is_good=True)
    >>> ring.add(10, "second")
    >>> ring.has_room, ring.good.content
    (False, 'first')
    >>> [entry.content for entry in ring.confirm()]
    ['second']
    >>> ring.has_room, ring.good.content
    (True, 'second')
    """

    def __init__(self, keep: int, confirm_steps: int) -> None:
        self._keep = keep
        self._confirm_steps = confirm_steps
        self.entries: list[Entry[T]] = []
        """All of them."""

    @property
    def good(self) -> Entry[T] | None:
        """The newest good one."""
        return next((entry for entry in reversed(self.entries) if entry.is_good), None)

    @property
    def has_room(self) -> bool:
        """Whether one more can be taken without giving the only good one away."""
        return len(self.entries) < self._keep or self.entries[0] is not self.good

    def make_room(self) -> T | None:
        """Give the oldest away if the ring is full: what it held."""
        return self.entries.pop(0).content if len(self.entries) >= self._keep else None

    def add(self, step: int, content: T, *, is_good: bool = False) -> None:
        """Keep a snapshot; there must be room."""
        self.entries.append(Entry(step, content, is_good=is_good or self._confirm_steps == 0))

    def confirm(self) -> list[Entry[T]]:
        """After a healthy step: those that have become good by it."""
        pending = [entry for entry in self.entries if not entry.is_good]
        for entry in pending:
            entry.num_healthy += 1
            entry.is_good = entry.num_healthy >= self._confirm_steps
        return [entry for entry in pending if entry.is_good]

    def drop_pending(self) -> list[T]:
        """After a step that was not healthy: what was not good yet is in doubt, and given away."""
        pending = [entry.content for entry in self.entries if not entry.is_good]
        self.entries = [entry for entry in self.entries if entry.is_good]
        return pending

    def drop(self, entry: Entry[T]) -> None:
        """Give one away that can't be used."""
        self.entries = [other for other in self.entries if other is not entry]

    def drop_last(self) -> list[T]:
        """Give the newest good one away where there is an older: it was gone back to, and it did not help."""
        return [self.entries.pop().content] if len(self.entries) >= 2 else []
