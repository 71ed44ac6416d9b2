"""Everything that a forward and backward pass can change about a module, kept to be put back."""

from __future__ import annotations

import contextlib
import random
from collections import deque
from collections.abc import Callable, Iterator
from types import FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_PACKAGES = ("torch", "lightning", "pytorch_lightning", "lightning_fabric", "lightning_gradguard", "numpy")
_NEVER = (type, FunctionType, MethodType, ModuleType, str, bytes, int, float, complex, bool, type(None))
_MAX_ENTRIES = 10_000
"""Containers of more entries are data sets rather than state: the container is put back, its entries are not looked at."""


class State:
    """A module's weights, buffers, gradients, flags and plain attributes, those of its submodules, and what these hold.

    Containers, tensors, arrays, generators of random numbers and the user's own objects are put back in place, so that
    whoever else refers to them sees the old values too. Copies of tensors on an accelerator are kept in the host's memory.

    Args:
        module: the root.
    """

    def __init__(self, module: nn.Module) -> None:
        self._undo: list[Callable[[], None]] = []
        self._seen: set[int] = set()
        self._alive: list[Any] = []
        self.tensors: list[tuple[str, Tensor]] = []
        """Tensors that are neither parameter nor buffer, with the names that lead to them."""
        self.kept: list[Tensor] = [*module.buffers()]
        """Buffers, and these tensors: all that is not trained."""
        self._named = {id(tensor) for tensor in (*module.parameters(), *module.buffers())}
        with torch.no_grad():
            self._keep(module, "")

    def restore(self) -> None:
        """Put everything back."""
        with torch.no_grad():
            for undo in reversed(self._undo):
                undo()

    def holds(self, value: object) -> bool:
        """Whether it is the module, or was found in it."""
        return id(value) in self._seen

    def _keep(self, value: Any, name: str) -> None:  # noqa: C901 - one case a kind
        if isinstance(value, _NEVER) or id(value) in self._seen:
            return
        self._seen.add(id(value))
        self._alive.append(value)  # an id is only good for as long as its object
        if isinstance(value, Tensor):
            self._keep_tensor(value, name)
        elif isinstance(value, nn.Module):
            self._keep_dict(vars(value), name)
        elif isinstance(value, dict):
            self._keep_dict(value, name)
        elif isinstance(value, (list, deque)):
            self._keep_list(value, name)
        elif isinstance(value, set):
            self._keep_set(value)
        elif isinstance(value, (tuple, frozenset)):
            self._keep_each(enumerate(value), len(value), name)
        elif isinstance(value, np.ndarray):
            self._keep_array(value)
        elif (undo := _undo_of_generator(value)) is not None:
            self._undo.append(undo)
        elif hasattr(value, "__dict__") and not _is_of_a_package(type(value)):
            self._keep_dict(vars(value), name)

    def _keep_dict(self, values: dict[Any, Any], name: str) -> None:
        before = dict(values)

        def undo() -> None:
            if values.keys() != before.keys() or any(values[key] is not entry for key, entry in before.items()):
                for key in [key for key in values if key not in before]:
                    del values[key]
                values.update(before)

        self._undo.append(undo)
        self._keep_each(before.items(), len(before), name)

    def _keep_list(self, values: list[Any] | deque[Any], name: str) -> None:
        before = list(values)

        def undo() -> None:
            values.clear()
            values.extend(before)

        self._undo.append(undo)
        self._keep_each(enumerate(before), len(before), name)

    def _keep_set(self, values: set[Any]) -> None:
        before = set(values)

        def undo() -> None:
            values.clear()
            values.update(before)

        self._undo.append(undo)

    def _keep_array(self, values: np.ndarray) -> None:
        before = values.copy()

        def undo() -> None:
            if values.flags.writeable:
                values[...] = before

        self._undo.append(undo)

    def _keep_each(self, entries: Any, number: int, name: str) -> None:
        if number > _MAX_ENTRIES:
            return
        for key, entry in list(entries):
            inner = name if key in ("_parameters", "_buffers", "_modules") else f"{name}.{key}" if name else str(key)
            self._keep(entry, inner)

    def _keep_tensor(self, tensor: Tensor, name: str) -> None:
        if id(tensor) not in self._named:
            self.tensors.append((name, tensor))
            self.kept.append(tensor)
        grad = tensor.grad if tensor.is_leaf else None
        requires_grad = tensor.requires_grad
        before = _copy(tensor)

        def undo() -> None:
            if tensor.is_leaf:
                if tensor.requires_grad != requires_grad:
                    tensor.requires_grad_(requires_grad)
                if tensor.grad is not grad:
                    tensor.grad = grad
            live = _local(tensor)
            if before is not None and not _same(live, before):
                live.copy_(before)

        self._undo.append(undo)


def _local(tensor: Tensor) -> Tensor:
    # `.data` has a version counter of its own, so that a graph that somebody keeps does not take the tensor for changed.
    live: Tensor = getattr(tensor.data, "_local_tensor", tensor.data)
    if (
        live.layout is torch.strided and not live.is_nested and 0 in live.stride()
    ):  # each element once, however often an expanded tensor repeats it
        return live[tuple(slice(None if stride else 1) for stride in live.stride())]
    return live


def _copy(tensor: Tensor) -> Tensor | None:
    live = _local(tensor)
    if live.device.type == "meta" or live.layout is not torch.strided or live.is_nested or live.dtype in _PACKED:
        return None
    try:
        copy = live.to("cpu", copy=True)
        _bits(copy)
    except (NotImplementedError, TypeError):  # of a subclass that has few operators
        return None
    return copy


def _same(live: Tensor, before: Tensor) -> bool:
    """Bit for bit: NaN is equal to itself, and 0.0 not to -0.0."""
    # What was resized can't be copied back.
    return live.shape != before.shape or torch.equal(_bits(live.to("cpu")), _bits(before))


def _bits(tensor: Tensor) -> Tensor:
    if tensor.is_quantized:
        return tensor.int_repr()  # a view of another dtype crashes the process
    values = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor.resolve_neg()
    return values.view(_INTEGERS[values.dtype.itemsize])


_PACKED = (torch.quint4x2, torch.quint2x4)
"""Several elements a byte: torch can't copy them."""

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _undo_of_generator(value: Any) -> Callable[[], None] | None:
    if isinstance(value, torch.Generator):
        state = value.get_state()
        return lambda: _ignore(value.set_state(state))
    if isinstance(value, random.Random):
        python = value.getstate()
        return lambda: value.setstate(python)
    if isinstance(value, np.random.Generator):
        bits = value.bit_generator.state
        return lambda: setattr(value.bit_generator, "state", bits)
    if isinstance(value, np.random.RandomState):
        legacy = value.get_state()
        return lambda: value.set_state(legacy)
    return None


def _ignore(_: object) -> None:
    """For a lambda that returns nothing."""


def _is_of_a_package(cls: type) -> bool:
    # Also a user's class that derives from one of theirs, such as a data set or a callback.
    return any(ancestor.__module__.partition(".")[0] in _PACKAGES for ancestor in cls.__mro__)


class RandomState:
    """The global generators of random numbers as they are now: torch on the CPU and on accelerators, python, numpy."""

    def __init__(self) -> None:
        self._torch = torch.get_rng_state()
        has_cuda = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        self._cuda = torch.cuda.get_rng_state_all() if has_cuda else []
        self._python = random.getstate()
        self._numpy = np.random.get_state(legacy=False)  # noqa: NPY002 - the global generator is what user code may use

    def restore(self) -> None:
        """Put them back."""
        torch.set_rng_state(self._torch)
        if self._cuda:  # pragma: no cover - needs a GPU
            torch.cuda.set_rng_state_all(self._cuda)
        random.setstate(self._python)
        np.random.set_state(self._numpy)  # noqa: NPY002


@contextlib.contextmanager
def unchanged(module: nn.Module) -> Iterator[State]:
    """Begin without gradients; put everything about a module, and the global random state, back when the context ends."""
    rng = RandomState()
    state = State(module)
    _running.append(state)
    try:
        for parameter in module.parameters():
            parameter.grad = None
        yield state
    finally:
        _running.remove(state)
        state.restore()
        rng.restore()


_running: list[State] = []
"""Of all contexts that have been entered. A list for all threads: on a GPU, hooks in a backward pass run in another one."""


def is_run_again(module: nn.Module) -> bool:
    """Whether what runs now of a module is no step of its training, but to be put back."""
    return any(state.holds(module) for state in _running)
