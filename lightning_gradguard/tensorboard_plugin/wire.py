"""What the writer in a training and the tab agree on: tags, and norms as 16-bit numbers.

TensorBoard keeps a random sample of each tag's events: by default ten of a tensor in the Python loader
(`DEFAULT_SIZE_GUIDANCE` of its `data_ingester`), a hundred in the fast one; a plugin can't ask for more, only whoever starts
TensorBoard can, by `--samples_per_plugin`. A tag with at most ten events loses none under either. So each series changes
its tag every ten events, and a run of any length is read back complete through the data provider, wherever it lies.
"""

from __future__ import annotations

import json
import time
import zlib
from typing import Any, NamedTuple

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
    "learning_rate",
    "weight_norm",
    "update_ratio",
)
"""Columns of the series "facts", float64: `decision` is `Alert.step`, `skipped` is 1 for a step passed over. Files of
earlier versions have fewer columns."""
NUM_FIRST_FACTS = 10
"""Columns that every file has."""

SERIES = ("layout", "facts", "norms", "alerts", "bins")
"""`layout` and `alerts` are JSON; `norms` are codes, [num_parameters]; `bins` are histograms, see `pack_bins`."""


class Bins(NamedTuple):
    """Histograms of all parameters at one step, on the bins of whoever counted.

    Attributes:
        per_decade: bins in a decade of magnitude.
        first: the first bin, counted from a magnitude of 1.
        shares: parts of each parameter's elements: zero, NaN, infinite, then one bin after another; NaN where there is no
            gradient, [num_parameters, 3 + num_bins].
        clipped: whether these are the gradients as the optimizer got them, after clipping.
        is_open: whether the first bin holds all smaller magnitudes, too, and the last all larger ones.
    """

    per_decade: int
    first: int
    shares: Floats
    clipped: bool = False
    is_open: tuple[bool, bool] = (False, False)


_NO_SHARE = 255
_SHARE_STEPS = 254
_FLAGS = ("clipped", "open below", "open above")


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


def pack_bins(bins: Bins) -> NDArray[np.uint8]:
    """Histograms of all parameters in a byte a bin, compressed; before them their shape, in a line of JSON.

    A byte is the root of a share, so that small shares are told from none: exact to 0.4 % of the whole, and never 0 for what
    is there.
    """
    shares = bins.shares
    is_missing = np.isnan(shares)
    roots = np.rint(np.sqrt(np.where(is_missing, 0.0, shares)) * _SHARE_STEPS)
    roots[(shares > 0) & (roots == 0)] = 1
    roots[is_missing] = _NO_SHARE
    flags = zip(_FLAGS, (bins.clipped, *bins.is_open), strict=True)
    header = json.dumps([bins.per_decade, bins.first, *shares.shape, *(name for name, flag in flags if flag)]).encode()
    return np.frombuffer(header + b"\n" + zlib.compress(roots.astype(np.uint8).tobytes(), 9), dtype=np.uint8)


def unpack_bins(packed: NDArray[Any]) -> Bins:
    """The histograms from their bytes.

    >>> bins = unpack_bins(pack_bins(Bins(2, -12, np.array([[0.25, 0.0, 0.0, 0.75], [np.nan] * 4]))))
    >>> bins.per_decade, bins.first, bins.shares.round(2).tolist()
    (2, -12, [[0.25, 0.0, 0.0, 0.75], [nan, nan, nan, nan]])

    Raises:
        ValueError: if they are none.
    """
    header, _, content = packed.astype(np.uint8).tobytes().partition(b"\n")
    per_decade, first, rows, columns, *more = json.loads(header)
    try:
        roots = np.frombuffer(zlib.decompress(content), dtype=np.uint8).reshape(rows, columns)
    except zlib.error as error:
        raise ValueError("These bytes are no histograms.") from error
    shares = np.where(roots == _NO_SHARE, np.nan, (roots / _SHARE_STEPS) ** 2)
    clipped, is_open_below, is_open_above = (name in more for name in _FLAGS)
    return Bins(int(per_decade), int(first), shares, clipped, (is_open_below, is_open_above))


def is_finite_code(codes: Codes) -> Bools:
    """Which codes stand for a norm that has a logarithm."""
    finite: Bools = (codes >= _SMALLEST) & (codes <= _LARGEST)
    return finite
