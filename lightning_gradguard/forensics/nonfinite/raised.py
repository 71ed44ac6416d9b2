"""Follows damage up to an exception, and takes it away to see whether the exception goes with it."""

from __future__ import annotations

import warnings
from bdb import BdbQuit
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_gradguard.errors import GradientError, GuardWarning, type_and_text, words_of
from lightning_gradguard.forensics.nonfinite.damage import Damage
from lightning_gradguard.forensics.nonfinite.operators import Operator
from lightning_gradguard.forensics.nonfinite.provenance import Provenance
from lightning_gradguard.forensics.tensors import tensors_in

_OWN = str(Path(__file__).parents[2]) + "/"
_TORCH = str(Path(torch.__file__).parent) + "/"
_DISPATCH = "__torch_dispatch__"


class DamageUntilRaise(Damage):  # type: ignore[no-untyped-call]
    """Damage of a step that may end in an exception."""

    _raised: Exception | None = None
    _went_in: tuple[Provenance, ...] = ()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operator; where it raises, note what damage went in."""
        try:
            # The one such method of the two classes: torch wraps each in another call.
            return self.run(func, args, kwargs or {})
        except Exception as error:
            if self._raised is not error:
                self._raised = error
                self._went_in = self._damaged(tensors_in([*args, *(kwargs or {}).values()]))
            raise

    def is_raised_by_operator(self, error: Exception) -> bool:
        """Whether an exception came out of one of torch's operators."""
        return self._raised is error

    def root_of(self, error: Exception) -> Provenance | None:
        """The damage that is nearest to an exception; None if there is none.

        What went into the operator that raised; else what the innermost call on the way there still holds; else the last
        damage of all.
        """
        if self._raised is error and self._went_in:
            return self._went_in[-1]
        for call in calls_of(error):
            if found := self._damaged(_tensors_among(list(call.tb_frame.f_locals.values()))):
                return found[-1]
        return self._provenances.latest

    def _damaged(self, tensors: Iterator[Tensor]) -> tuple[Provenance, ...]:
        found = (self.provenance_of(tensor) for tensor in tensors)
        real = [provenance for provenance in found if provenance is not None and not provenance.is_sentinel]
        return tuple(sorted(real, key=lambda provenance: provenance.order))


class WithoutCollectives(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Has a collective raise an error: what one rank runs alone must not wait for others."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operator."""
        if getattr(func, "namespace", "").lstrip("_").startswith("c10d"):
            raise RuntimeError(f"`{func}` needs the other ranks")
        return func(*args, **(kwargs or {}))


class WithoutDamage(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Has every operator see finite numbers only, and give such.

    Args:
        fill: what is put in the place of NaN and infinity.
        keeps_masks: whether minus infinity is left where it is.
    """

    supports_higher_order_operators = True

    def __init__(self, fill: float, *, keeps_masks: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._fill = fill
        self._keeps_masks = keeps_masks
        self._operators: dict[Any, Operator] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operator."""
        kwargs = kwargs or {}
        if not isinstance(func, torch._ops.OpOverload):
            return func(*args, **kwargs)
        operator = self._operators.get(func) or self._operators.setdefault(func, Operator(func))
        if operator.is_view or operator.is_empty:
            return func(*args, **kwargs)
        written = {id(tensor) for tensor in operator.writes(args)}
        result = func(*self._mended(args, written), **{name: self._mended(value, written) for name, value in kwargs.items()})
        given = {id(tensor) for tensor in tensors_in([*args, *kwargs.values()])}
        for tensor in tensors_in(result):
            if (is_bad := self._bad(tensor)) is not None and (id(tensor) in written or id(tensor) not in given):
                tensor.masked_fill_(is_bad, self._fill)
        return result

    def _mended(self, value: Any, written: set[int]) -> Any:
        if isinstance(value, (list, tuple)):
            return type(value)(self._mended(entry, written) for entry in value)
        if not isinstance(value, Tensor) or id(value) in written or (is_bad := self._bad(value)) is None:
            return value
        return value.masked_fill(is_bad, self._fill)

    def _bad(self, tensor: Tensor) -> Tensor | None:
        """Where it is to be filled; None where it is in order, or can't be looked at."""
        is_plain = tensor.layout is torch.strided and not hasattr(tensor, "_local_tensor") and tensor.device.type != "meta"
        if not is_plain or not (tensor.is_floating_point() or tensor.is_complex()) or tensor.dtype.itemsize == 1:
            return None
        is_bad = ~tensor.isfinite()
        if self._keeps_masks and not tensor.is_complex():
            is_bad &= tensor != -torch.inf
        return is_bad if bool(is_bad.any()) else None


_WAYS_TO_MEND = ((0.0, True), (1.0, True), (0.0, False), (1.0, False))
"""What is put in the place of NaN and infinity, and whether minus infinity, which masks are made of, is left alone."""
_NO_MEMORY = ("out of memory", "can't allocate memory")
_GPU_IS_LOST = ("device-side assert", "illegal memory access")


def is_gone_without_damage(run: Callable[[AbstractContextManager[object]], Exception | None]) -> bool:
    """Whether a step that has raised runs to its end with finite numbers.

    Args:
        run: runs it again in a context; gives what it raises.
    """
    return any(run(WithoutDamage(fill, keeps_masks=keeps)) is None for fill, keeps in _WAYS_TO_MEND)


def warn_of_failed_replay(error: Exception, failure: Exception) -> None:
    """Say that the step that has raised `error` could not be run again."""
    warnings.warn(
        f"The step that raised {type(error).__name__} could not be replayed ({type_and_text(failure)}), "
        "so whether NaN or Inf is the reason is not known.",
        GuardWarning,
        stacklevel=3,
    )


def is_lack_of_memory(error: Exception) -> bool:
    """Whether memory has run out, so that nothing should be run again."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in words_of(error) for words in _NO_MEMORY)


def is_no_failure(error: Exception) -> bool:
    """Whether it is no failure of a computation: an end that was asked for, or a lack of memory."""
    return isinstance(error, (GradientError, StopIteration, BdbQuit)) or is_lack_of_memory(error)


def is_lost_gpu(error: Exception) -> bool:
    """Whether the process can't use its GPU any more, so that nothing can be run again."""
    return any(words in words_of(error) for words in _GPU_IS_LOST)


def is_in_torch(error: BaseException) -> bool:
    """Whether the innermost frame of an exception is torch's own."""
    frames = _frames(error)
    return bool(frames) and frames[-1].tb_frame.f_code.co_filename.startswith(_TORCH)


def is_same(error: BaseException, again: BaseException) -> bool:
    """Whether a replay has raised what the step has: the same type, at the same line or with the same words."""
    if type(error) is not type(again):
        return False
    return _place(error) == _place(again) or words_of(error) == words_of(again)


def _frames(error: BaseException) -> list[TracebackType]:
    """From the outermost to the innermost, without what only a replay has below its operators."""
    frames: list[TracebackType] = []
    trace = error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        if code.co_name == _DISPATCH and code.co_filename.startswith(_OWN):
            break
        frames.append(trace)
        trace = trace.tb_next
    return frames


def _place(error: BaseException) -> tuple[str, int] | None:
    frames = _frames(error)
    return (frames[-1].tb_frame.f_code.co_filename, frames[-1].tb_lineno) if frames else None


def calls_of(error: BaseException) -> Iterator[TracebackType]:
    """The calls that led to an exception, innermost first, without those of this package."""
    return (trace for trace in reversed(_frames(error)) if not trace.tb_frame.f_code.co_filename.startswith(_OWN))


def _tensors_among(values: list[Any]) -> Iterator[Tensor]:
    for value in values:
        yield from tensors_in(list(value.values()) if isinstance(value, dict) else value)
