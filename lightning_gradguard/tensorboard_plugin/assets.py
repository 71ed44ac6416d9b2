"""The JavaScript of the plots, inside the installed `plotly`, which is not imported for it."""

from __future__ import annotations

import gzip
import importlib.util
from functools import cache
from pathlib import Path


def plotly_path() -> Path | None:
    """Where it lies; None where the extra is not installed."""
    spec = importlib.util.find_spec("plotly")
    folders = (spec.submodule_search_locations if spec is not None else None) or []
    paths = (Path(folder) / "package_data" / "plotly.min.js" for folder in folders)
    return next((path for path in paths if path.is_file()), None)


@cache
def compressed(path: Path) -> bytes:
    """A file, gzipped."""
    return gzip.compress(path.read_bytes(), compresslevel=6, mtime=0)
