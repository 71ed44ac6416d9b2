"""Whether a checkpoint is healthy: what in it is not finite, or absurd, by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_gradguard.files.torch_files import UnreadableError, load_plain, parts_of
from lightning_gradguard.wording import counted

_ABSURD = 1e6
_OUTLIER = 1e4
_MIN_OUTLIER = 100.0


@dataclass(frozen=True)
class Finding:
    """One tensor or number that is not in order.

    Attributes:
        name: where in the file, as `state_dict['layer.weight']`.
        shape: of the tensor; "" for a number.
        problem: what is wrong with it, with figures.
    """

    name: str
    shape: str
    problem: str


@dataclass(frozen=True)
class Health:
    """What a checkpoint looks like.

    Attributes:
        num_tensors: floating-point tensors that were looked at.
        num_elements: their elements.
        findings: what is not in order, in the file's order.
    """

    num_tensors: int
    num_elements: int
    findings: tuple[Finding, ...]


def read(path: Path, *, trust: bool = False) -> Any:
    """Load a checkpoint onto the CPU.

    Args:
        path: the file.
        trust: whether code in the file may run.

    Raises:
        UnreadableError: with what to do about it.
    """
    try:
        return load_plain(path)
    except UnreadableError as error:
        if error.foreign is None:
            raise
        if not trust:
            raise UnreadableError(
                f"{error} To read such objects is to run code from the file. If you trust it: `--trust`.", error.foreign
            ) from None
    try:
        return torch.load(path, map_location="cpu", weights_only=False)
    except Exception as error:  # the file's own code may raise anything
        raise UnreadableError(f"{path} can't be read: {type(error).__name__}: {str(error).partition(chr(10))[0]}") from error


def examine(content: Any) -> Health:
    """Look at every floating-point tensor, and every number, in a checkpoint.

    >>> examine({"state_dict": {"w": torch.tensor([1.0, float("nan")])}}).findings[0].name
    "state_dict['w']"
    """
    num_tensors = num_elements = 0
    findings = []
    for name, value in _leaves(content):
        if isinstance(value, float):
            # An infinite number is what "best score so far" begins with.
            if value != value:  # noqa: PLR0124 - NaN
                findings.append(Finding(name, "", "is NaN"))
            continue
        values = _values_of(value)
        if values is None:
            continue
        num_tensors += 1
        num_elements += values.numel()
        if (problem := _problem_of(name, value, values)) is not None:
            findings.append(Finding(name, str(list(value.shape)), problem))
    return Health(num_tensors, num_elements, tuple(findings))


def _leaves(content: Any) -> Iterator[tuple[str, Tensor | float]]:
    """Tensors and numbers by name, in the file's order; what a trusted file holds twice is looked at once."""
    seen: set[int] = set()
    waiting = [("", content)]
    while waiting:
        name, value = waiting.pop()
        if isinstance(value, (Tensor, float)):
            yield name, value
        elif isinstance(value, (Mapping, list, tuple)) and id(value) not in seen:
            seen.add(id(value))
            if isinstance(value, Mapping):
                entries = [(f"{name}[{key!r}]" if name else str(key), entry) for key, entry in value.items()]
            else:
                entries = [(f"{name}[{index}]", entry) for index, entry in enumerate(value)]
            waiting.extend(reversed(entries))


def _values_of(tensor: Tensor) -> Tensor | None:
    """The numbers of a tensor, none of them more often than it is stored; None where there are none to be looked at."""
    parts = parts_of(tensor.detach())
    if not parts or tensor.is_meta or not (tensor.is_floating_point() or tensor.is_complex()) or not parts[0].numel():
        return None
    values = torch.view_as_real(parts[0].resolve_conj()) if parts[0].is_complex() else parts[0]
    storage = values.untyped_storage()
    if values.numel() * values.element_size() > storage.nbytes():  # expanded
        values = torch.empty(0, dtype=values.dtype).set_(storage)
    return values.float() if values.element_size() < 4 else values


def _problem_of(name: str, tensor: Tensor, values: Tensor) -> str | None:
    if name.startswith("callbacks") and not tensor.dim() and not bool(tensor.isnan()):
        return None  # as a plain number: ModelCheckpoint keeps its best score so far as a tensor
    num_nan, num_inf = int(values.isnan().sum()), int(values.isinf().sum())
    if num_nan or num_inf:
        counts = [f"{number:,} {what}" for number, what in ((num_nan, "NaN"), (num_inf, "Inf")) if number]
        return f"{' and '.join(counts)} of {counted(values.numel(), 'element')}"
    if "exp_avg_sq" in name and float(values.min()) < 0.0:
        return f"a second moment is negative: {float(values.min()):.3g}"
    sizes = values.abs().flatten()
    largest = float(sizes.max())
    if largest > _ABSURD:
        return f"largest magnitude {largest:.3g}"
    usual = float(sizes.median())
    is_moment = "exp_avg" in name or "momentum_buffer" in name
    if not is_moment and sizes.numel() >= 16 and largest > _MIN_OUTLIER and usual > 0.0 and largest > _OUTLIER * usual:
        return f"largest magnitude {largest:.3g}, {largest / usual:.2g} times the median"
    return None
