"""The command `gradguard`."""

from __future__ import annotations

import sys
from importlib.util import find_spec

_NEEDED = ("typer", "rich")


def main() -> None:
    """Run the command; without the extra, say which one is missing."""
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        sys.exit(
            f"The command `gradguard` needs {' and '.join(missing)}, which the extra `cli` brings: "
            'pip install "lightning-gradguard[cli]"'
        )
    from lightning_gradguard.cli.commands import app  # noqa: PLC0415 - needs the extra

    app()
