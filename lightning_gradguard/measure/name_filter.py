"""Which parameters are watched, by patterns of their names."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from itertools import islice


@dataclass(frozen=True)
class NameFilter:
    """Patterns of names, as fnmatch knows them: `*` stands for anything, dots included.

    Attributes:
        include: a name must match one of these; None: every name does.
        exclude: and none of these.

    >>> only = NameFilter.of(include=["encoder.*"], exclude=["*.bias"])
    >>> [name for name in ("encoder.0.weight", "encoder.0.bias", "head.weight") if only.keeps(name)]
    ['encoder.0.weight']
    """

    include: tuple[str, ...] | None = None
    exclude: tuple[str, ...] = ()

    @classmethod
    def of(cls, include: Sequence[str] | None, exclude: Sequence[str]) -> NameFilter:
        """Check what the user wrote.

        Raises:
            ValueError: if it is not a list of patterns.
        """
        return cls(None if include is None else _patterns(include, "include"), _patterns(exclude, "exclude"))

    @property
    def keeps_all(self) -> bool:
        """Whether there is nothing to match."""
        return self.include is None and not self.exclude

    def keeps(self, name: str) -> bool:
        """Whether a parameter of this name is watched."""
        is_included = self.include is None or any(fnmatchcase(name, pattern) for pattern in self.include)
        return is_included and not any(fnmatchcase(name, pattern) for pattern in self.exclude)

    def check(self, names: Iterable[str]) -> None:
        """See that each pattern says something about these names, and that something is left.

        Raises:
            ValueError: if a pattern matches none of them, or nothing is kept.
        """
        if self.keeps_all:
            return
        known = tuple(names)
        some = ", ".join(f"`{name}`" for name in islice(known, 5)) + (", ..." if len(known) > 5 else "")
        refuse_idle_patterns("include", self.include or (), known)
        refuse_idle_patterns("exclude", self.exclude, known)
        if not any(map(self.keeps, known)):
            raise ValueError(
                f"`include` and `exclude` must leave a parameter to watch, got include={self.include!r} and "
                f"exclude={self.exclude!r}, which leave none of {some}. Take the guard away, or exclude less."
            )


def refuse_idle_patterns(parameter: str, patterns: Iterable[str], names: Sequence[str]) -> None:
    """Raise a `ValueError`, with the names that are nearest, for the first pattern that matches none of them."""
    for pattern in patterns:
        if any(fnmatchcase(name, pattern) for name in names):
            continue
        modules = {".".join(name.split(".")[:depth]) + ".*" for name in names for depth in range(1, name.count(".") + 1)}
        nearest = get_close_matches(pattern, [*names, *sorted(modules)], n=3, cutoff=0.5) or list(names[:5])
        more = ", ..." if len(names) > len(nearest) else ""
        raise ValueError(
            f"`{parameter}` must hold patterns that match parameters, got {pattern!r}, which matches none. "
            f"There are {', '.join(f'`{name}`' for name in nearest)}{more}. A `*` at the end matches all of a module, as in "
            "`'encoder.*'`."
        )


def _patterns(value: Sequence[str], parameter: str) -> tuple[str, ...]:
    is_list = isinstance(value, (list, tuple)) and all(isinstance(pattern, str) for pattern in value)
    if not is_list or (parameter == "include" and not value):
        remedy = "Put it in brackets" if isinstance(value, str) else "For all parameters leave it out"
        raise ValueError(
            f"`{parameter}` must be a list of patterns of names, got {value!r}. {remedy}, for example "
            f'`{parameter}=["encoder.*"]`.'
        )
    return tuple(value)
