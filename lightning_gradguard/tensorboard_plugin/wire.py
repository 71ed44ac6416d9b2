"""What the writer in a training and the tab agree on: tags, and norms as 16-bit numbers.

TensorBoard keeps a random sample of each tag's events: by default ten of a tensor in the Python loader
(`DEFAULT_SIZE_GUIDANCE` of its `data_ingester`), a hundred in the fast one; a plugin can't ask for more, only whoever starts
TensorBoard can, by `--samples_per_plugin`. A tag with at most ten events loses none under either. So each series changes
its tag every ten events, and a run of any length is read back complete through the data provider, wherever it lies.
"""

from __future__ import annotations

import time
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lightning_gradguard.layout import Bools, Floats

Codes = NDArray[np.int16]

PLUGIN_NAME = "gradguard"
EVENTS_PER_TAG = 10
_ROOT = "gradguard_tab"

NO_GRADIENT, ZERO, INFINITE, NAN = -32768, -32767, 32766, 32767
"""Codes of what has no logarithm, placed so that the largest code of several is the worst."""
CODES_PER_DECADE = 1000
_SMALLEST, _LARGEST = ZERO + 1, INFINITE - 1

FACTS = (
    "decision",
    "global_norm",
    "clipped_norm",
    "clip_coef",
    "explosion_limit",
    "loss",
    "skipped",
    "num_skipped",
    "num_clipped",
    "num_alerts",
)
"""Columns of the series "facts", float64: `decision` is `Alert.step`, `skipped` is 1 for a step passed over."""

SERIES = ("layout", "facts", "norms", "alerts", "shares")
"""`layout` and `alerts` are JSON; `norms` are codes, [num_parameters]; `shares` are the parts of a gradient's elements that
are zero, NaN and infinite, float32 [num_parameters, 3], NaN where there is no gradient."""


class Tag(NamedTuple):
    """Where a piece of a run stands.

    Attributes:
        session: the writer, ordered by time: a resumed run has several.
        optimizer: index of the optimizer.
        layout: counts the sets of parameters that were watched one after another.
        series: one of `SERIES`.
        chunk: counts the tags of a series.
    """

    session: str
    optimizer: int
    layout: int
    series: str
    chunk: int

    def __str__(self) -> str:
        return f"{_ROOT}/{self.session}/{self.optimizer}/{self.layout}/{self.series}/{self.chunk}"

    @classmethod
    def parse(cls, text: str) -> Tag | None:
        """Read a tag; None if it is not one of these.

        >>> str(Tag.parse("gradguard_tab/0f/0/0/norms/12"))
        'gradguard_tab/0f/0/0/norms/12'
        """
        root, *parts = text.split("/")
        if root != _ROOT or len(parts) != len(cls._fields) or parts[3] not in SERIES:
            return None
        session, optimizer, layout, series, chunk = parts
        if not (optimizer.isdecimal() and layout.isdecimal() and chunk.isdecimal()):
            return None
        return cls(session, int(optimizer), int(layout), series, int(chunk))


def new_session() -> str:
    """A name that sorts behind those of all earlier sessions.

    >>> new_session() < new_session()
    True
    """
    return f"{time.time_ns():016x}"


def encode(norms: Floats, has_grad: Bools) -> Codes:
    """Norms as thousandths of a decade, in two bytes each: exact to 0.12 %, between 1e-32.7 and 1e32.7.

    >>> encode(np.array([10.0, 0.0, np.inf, np.nan, 1.0]), np.array([True, True, True, True, False])).tolist()
    [1000, -32767, 32766, 32767, -32768]
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        codes = np.rint(np.log10(norms) * CODES_PER_DECADE).clip(_SMALLEST, _LARGEST)
    codes[norms == 0] = ZERO
    codes[np.isinf(norms)] = INFINITE
    codes[np.isnan(norms)] = NAN
    codes[~has_grad] = NO_GRADIENT
    packed: Codes = codes.astype(np.int16)
    return packed


def decode(codes: Codes) -> Floats:
    """Norms from their codes; NaN also where there is no gradient.

    >>> decode(np.array([1000, -32767, 32766], dtype=np.int16)).tolist()
    [10.0, 0.0, inf]
    """
    norms: Floats = 10.0 ** (codes.astype(np.float64) / CODES_PER_DECADE)
    norms[codes == ZERO] = 0.0
    norms[codes == INFINITE] = np.inf
    norms[(codes == NAN) | (codes == NO_GRADIENT)] = np.nan
    return norms


def is_finite_code(codes: Codes) -> Bools:
    """Which codes stand for a norm that has a logarithm."""
    finite: Bools = (codes >= _SMALLEST) & (codes <= _LARGEST)
    return finite
