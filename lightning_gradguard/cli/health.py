"""Whether a checkpoint is healthy: what in it is not finite, or absurd, by name."""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

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


class UnreadableError(ValueError):
    """A file that can't be read without running code of it, or at all."""


def read(path: Path, *, trust: bool = False) -> Any:
    """Load a checkpoint onto the CPU.

    Args:
        path: the file.
        trust: whether code in the file may run.

    Raises:
        UnreadableError: with what to do about it.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=not trust)
    except pickle.UnpicklingError as error:
        reason = next((line.strip() for line in str(error).splitlines() if "Unpickler error" in line), _first_line(error))
        raise UnreadableError(
            f"{path} can't be read as tensors and plain types alone ({reason.split(' was not')[0]}). It may hold objects, "
            "such as hyperparameters of a class of yours; reading these runs code from the file. If you trust it: `--trust`."
        ) from error
    except (RuntimeError, OSError, EOFError) as error:
        raise UnreadableError(f"{path} is no checkpoint that torch can read: {_first_line(error)}.") from error


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__


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
        num_tensors += 1
        num_elements += value.numel()
        if (problem := _problem_of(name, value)) is not None:
            findings.append(Finding(name, str(list(value.shape)), problem))
    return Health(num_tensors, num_elements, tuple(findings))


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Tensor | float]]:
    if isinstance(value, Tensor):
        if (value.is_floating_point() or value.is_complex()) and value.numel():
            yield name, value
    elif isinstance(value, float):
        yield name, value
    elif isinstance(value, Mapping):
        for key, entry in value.items():
            yield from _leaves(entry, f"{name}[{key!r}]" if name else str(key))
    elif isinstance(value, (list, tuple)):
        for index, entry in enumerate(value):
            yield from _leaves(entry, f"{name}[{index}]")


def _problem_of(name: str, tensor: Tensor) -> str | None:
    values = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    values = values.to_dense().float() if values.dtype.itemsize < 4 or values.layout is not torch.strided else values
    if name.startswith("callbacks") and not tensor.dim() and not bool(tensor.isnan()):
        return None  # as a plain number: ModelCheckpoint keeps its best score so far as a tensor
    num_nan, num_inf = int(values.isnan().sum()), int(values.isinf().sum())
    if num_nan or num_inf:
        counts = [f"{number:,} {what}" for number, what in ((num_nan, "NaN"), (num_inf, "Inf")) if number]
        return f"{' and '.join(counts)} of {values.numel():,} elements"
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
