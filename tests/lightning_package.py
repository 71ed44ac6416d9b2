"""Lightning, for tests that run with either of its packages.

`from lightning_package import Callback, CSVLogger, Trainer` takes them from the package that GRADGUARD_TEST_PACKAGE names:
"lightning.pytorch", the default, or "pytorch_lightning".
"""

from __future__ import annotations

import importlib
import logging
import os
from typing import Any

# At its import `lightning.pytorch.cli` uses parts of jsonargparse that are on their way out.
os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")

NAME = os.environ.get("GRADGUARD_TEST_PACKAGE", "lightning.pytorch")

_PLACES = (
    "",
    ".callbacks",
    ".cli",
    ".loggers",
    ".plugins.environments",
    ".plugins.precision",
    ".strategies",
    ".utilities",
    ".utilities.exceptions",
)

_LOGS = ("lightning.fabric", "lightning.pytorch", "lightning_fabric", "pytorch_lightning")


def __getattr__(name: str) -> Any:
    if not name.startswith("_"):
        for place in _PLACES:
            module = importlib.import_module(NAME + place)
            if hasattr(module, name):
                return getattr(module, name)
    raise AttributeError(f"{NAME} has no {name!r}")


def logs() -> list[logging.Logger]:
    """Where messages of a run may go; with both packages loaded the two share one of them."""
    return [logging.getLogger(name) for log in _LOGS for name in (log, f"{log}.utilities.rank_zero")]


def has(name: str) -> bool:
    """Whether this version of Lightning has a callback."""
    return hasattr(importlib.import_module(f"{NAME}.callbacks"), name)
