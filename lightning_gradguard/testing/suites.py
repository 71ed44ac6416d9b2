"""A guard in every Trainer of a test suite, to see that nothing changes with it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import Distribution, DistributionFinder
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning_gradguard.callback import GradGuard

_GROUPS = ("lightning.pytorch.callbacks_factory", "pytorch_lightning.callbacks_factory")
"""Entry points that the Trainers of the two packages ask for further callbacks, each time that one is made."""

_NAME = "lightning-gradguard-everywhere"


@contextmanager
def everywhere(make: Callable[[], GradGuard] | None = None) -> Iterator[None]:
    """Put a guard into every Trainer that is made in this context, in either of Lightning's packages.

    A Trainer that has a guard of its own keeps that one, and no other. Where contexts are nested, the inner one's guards are
    taken. Trainers in processes that start a script of their own don't know of the context.

    Args:
        make: makes each Trainer's guard; None: `GradGuard()`.

    For all tests of a suite, in its `conftest.py`::

        @pytest.fixture(autouse=True, scope="session")
        def _guarded():
            with everywhere(lambda: GradGuard(clip=1e9)):
                yield

    Or without a change to the suite, with keywords of `GradGuard`::

        pytest -p lightning_gradguard.testing.pytest_plugin --gradguard "clip=1e9, explosion='stop'"

    >>> from lightning.pytorch import Trainer
    >>> with everywhere():
    ...     trainer = Trainer(logger=False, accelerator="cpu")
    >>> [type(callback).__name__ for callback in trainer.callbacks if type(callback).__name__ == "GradGuard"]
    ['GradGuard']
    """
    _Finder.makers.append(_default if make is None else make)
    finder = _Finder()
    sys.meta_path.append(finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        _Finder.makers.pop()


def _default() -> GradGuard:
    from lightning_gradguard.callback import GradGuard  # noqa: PLC0415 - needs Lightning, as the rest of `testing` does not

    return GradGuard()


def make_guard() -> GradGuard:
    """What the entry point names."""
    guard = _Finder.makers[-1]()
    guard.gives_way = True
    return guard


class _Finder(DistributionFinder):
    """Shows a distribution with the entry points: what an installed package would have, for as long as the context lasts."""

    makers: list[Callable[[], GradGuard]] = []  # noqa: RUF012 - of all contexts, the innermost last

    def find_spec(self, *_: object) -> None:
        """It holds no modules."""

    def find_distributions(self, context: DistributionFinder.Context | None = None) -> Iterator[Distribution]:
        """The distribution, where it is asked for."""
        if context is None or context.name in (None, _NAME):
            yield _Distribution()


class _Distribution(Distribution):
    def read_text(self, filename: str) -> str | None:
        if filename == "entry_points.txt":
            return "\n".join(f"[{group}]\ngradguard = {__name__}:{make_guard.__name__}" for group in _GROUPS)
        return f"Name: {_NAME}\nVersion: 0" if filename == "METADATA" else None

    def locate_file(self, path: object) -> Path:  # pragma: no cover - the base class asks for it; there are no files
        return Path(str(path))
