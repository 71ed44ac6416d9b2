"""What holds NaN or infinity around an exception, looked at where it is: nothing is run again."""

from __future__ import annotations

import linecache
import re
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor

from lightning_gradguard.errors import words_of
from lightning_gradguard.forensics.nonfinite.layout import SampleDim, layout_of
from lightning_gradguard.forensics.nonfinite.raised import calls_of
from lightning_gradguard.forensics.nonfinite.row_labels import samples_at
from lightning_gradguard.forensics.nonfinite.wording import rows_in_words
from lightning_gradguard.forensics.tensors import flaw_of, plain, tensors_in

_SPEAKS_OF_IT = re.compile(
    r"(?<![a-z])(is_?)?(nans?|inf|infs|finite|infinite|infinity|non-?finite)(?![a-z])"
    # What torch says of values where NaN is one of those that it does not bear.
    r"|to satisfy the constraint|should be between 0 and 1|not positive-definite|is singular|failed to converge",
    re.IGNORECASE,
)
_MAX_NAMED = 3


def seen_around(error: BaseException, batch: Any, named: Iterable[tuple[str, Tensor]], sample_dim: SampleDim = None) -> str:
    """What holds NaN or infinity, in words; "" for nothing, or an exception that neither speaks of them nor tests for them.

    The batch and the weights are looked at, and if they are in order the variables of the calls that led to the exception.
    Rank-local; a sync for each tensor.

    Args:
        error: the exception.
        batch: what was trained on; None if that is not known.
        named: what is there of the weights, with their names.
        sample_dim: what the user says about where samples lie.
    """
    if not speaks_of_it(error):
        return ""
    found = [*_of_batch(batch, sample_dim), *_of_weights(named)] or [*_of_calls(error)]
    more = f" and {len(found) - _MAX_NAMED} more" if len(found) > _MAX_NAMED else ""
    return ", ".join(found[:_MAX_NAMED]) + more


def speaks_of_it(error: BaseException) -> bool:
    """Whether an exception, or the line that has raised it, speaks of NaN or infinity, or tests for values without."""
    return _SPEAKS_OF_IT.search(f"{words_of(error)}\n{_line_of(error)}") is not None


def _line_of(error: BaseException) -> str:
    """The line that has raised it, which for an `assert` says more than the exception."""
    call = next(calls_of(error), None)
    return "" if call is None else linecache.getline(call.tb_frame.f_code.co_filename, call.tb_lineno)


def _of_batch(batch: Any, sample_dim: SampleDim) -> Iterator[str]:
    layout = layout_of(batch, sample_dim)
    for name, leaf in layout.leaves:
        if what := _what(leaf):
            values = plain(leaf)
            label = layout.labels.get(name)
            is_whole = label is not None and values is not None and values.shape == leaf.shape
            rows = samples_at(label, ~values.isfinite()) if is_whole and values is not None else None
            yield f"`{name}` holds {what}{rows_in_words(rows)}"


def _of_weights(named: Iterable[tuple[str, Tensor]]) -> Iterator[str]:
    for name, tensor in named:
        if what := _what(tensor):
            yield f"`{name}` holds {what}"


def _of_calls(error: BaseException) -> Iterator[str]:
    """Variables of the innermost call that has any."""
    for call in calls_of(error):
        found = [(name, what) for name, value in call.tb_frame.f_locals.items() if (what := _what_in(value))]
        if found:
            yield from (f"`{name}` in `{call.tb_frame.f_code.co_name}` holds {what}" for name, what in found)
            return


def _what_in(value: Any) -> str:
    return next(filter(None, map(_what, tensors_in(value))), "")


def _what(tensor: Tensor) -> str:
    """NaN or Inf; "" for neither. Minus infinity alone is a mask."""
    local = getattr(tensor, "_local_tensor", tensor)
    if local.device.type != "meta" and local.numel() and not local.untyped_storage().size():
        return ""  # a part of the weights that has been given back
    flaw = flaw_of(tensor)
    if flaw is None or flaw.is_negative:
        return ""
    return "NaN" if flaw.has_nan else "Inf"
