"""For pytest: `-p lightning_gradguard.testing.pytest_plugin --gradguard "clip=1.0"` puts a guard into every Trainer."""

from __future__ import annotations

import ast
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from lightning_gradguard.testing.suites import everywhere

if TYPE_CHECKING:
    import pytest

    from lightning_gradguard.callback import GradGuard


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option."""
    parser.addoption(
        "--gradguard",
        metavar="KEYWORDS",
        help="put a GradGuard with these keywords into every Trainer: \"clip=1.0, explosion='stop'\"; '' for the defaults",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Put guards into Trainers from now on, until the run ends."""
    keywords = config.getoption("--gradguard")
    if keywords is None:
        return
    try:
        settings = read_keywords(keywords)
    except ValueError as error:
        from pytest import UsageError  # noqa: PLC0415, PT013 - pytest is there where this is called

        raise UsageError(str(error)) from None

    def make() -> GradGuard:
        from lightning_gradguard.callback import GradGuard  # noqa: PLC0415 - Lightning is imported when a Trainer is made

        return GradGuard(**settings)

    context = ExitStack()
    context.enter_context(everywhere(make))
    config.add_cleanup(context.close)


def read_keywords(text: str) -> dict[str, Any]:
    """Keywords of a call, with values that are literals.

    Raises:
        ValueError: if it is anything else.

    >>> read_keywords("clip=1.0, explosion='stop'")
    {'clip': 1.0, 'explosion': 'stop'}
    """
    try:
        call = ast.parse(f"GradGuard({text})", mode="eval").body
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and not call.args:
            return {keyword.arg or "**": ast.literal_eval(keyword.value) for keyword in call.keywords}
    except (SyntaxError, ValueError):
        pass
    raise ValueError(f"`--gradguard` must hold keywords of GradGuard with plain values, as in 'clip=1.0', got {text!r}.")
