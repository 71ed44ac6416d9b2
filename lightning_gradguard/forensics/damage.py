"""Follows NaN and infinity through a step, from where they are born to the loss and the gradients."""

from __future__ import annotations

import math
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_gradguard.forensics.places import ModuleStack, Place, current_line
from lightning_gradguard.forensics.samples import Batch
from lightning_gradguard.forensics.tensors import Flaw, Range, describe, flaw_of, plain, range_of, tensors_in

Origin = Literal["", "data", "weights", "state", "constant", "garbage"]
"""Where damage came in that no operator made: a batch, a parameter or buffer, a tensor that a module keeps for itself, a
constant, memory that nobody has written to."""

_NUM_BEFORE, _NUM_FRAMES_TO_AUTOGRAD = 6, 8
_OVERWRITING = {
    "bernoulli_", "copy_", "exponential_", "fill_", "geometric_", "log_normal_", "normal_", "random_", "uniform_", "zero_",
}  # fmt: skip
_CONSTANT = {"full", "full_like", "lift_fresh", "lift_fresh_copy", "new_full", "scalar_tensor", "new_tensor", "tensor"}


@dataclass(eq=False)
class Taint:
    """A tensor with NaN or infinity in it, and how it got them.

    Attributes:
        order: number of the operator, ascending in time.
        flaw: what is wrong with the tensor.
        origin: where damage came in that no operator made; "" for an operator's result.
        op: aten operator; for another origin, what its name is there.
        node: autograd node that ran it in the backward pass, "" in the forward pass.
        is_custom: whether that is a user's own `Function`.
        is_hook: whether it is user code that autograd ran beside a node, as a hook on a tensor.
        place: module and line.
        parents: damaged tensors that went in.
        rows: bad samples, if the tensor has a row for each; None: it has not, or they were not looked for.
        is_sentinel: whether it is, or comes from nothing but, infinities that somebody has put there on purpose.
        inputs: what went in, in words; looked at where damage is born or changes its kind.
        spans: range of each floating-point input; with it `at_fault`, those of the elements that made the damage.
        before: the operators before it, in words.
        needs_grad: whether an input depends on parameters.
        shrinks: whether the tensor has fewer elements than what went in.
    """

    order: int
    flaw: Flaw
    origin: Origin = ""
    op: str = ""
    node: str = ""
    is_custom: bool = False
    is_hook: bool = False
    place: Place = Place()
    parents: tuple[Taint, ...] = ()
    rows: tuple[int, ...] | None = None
    is_sentinel: bool = False
    inputs: tuple[str, ...] = ()
    at_fault: tuple[Range | None, ...] = ()
    dtype: torch.dtype | None = None
    before: tuple[str, ...] = ()
    needs_grad: bool = True
    shrinks: bool = False

    @property
    def is_backward(self) -> bool:
        """Whether it was made in the backward pass."""
        return bool(self.node)


@dataclass(frozen=True)
class _Step:
    """An operator that went well: for the frames before the culprit."""

    op: str
    module: str
    tensor: str
    span: Range

    def __str__(self) -> str:
        return f"{self.op} in {self.module or 'training_step'}: {self.tensor} {self.span}"


class _Traits:
    """What is known of an operator from its schema."""

    def __init__(self, func: Any) -> None:
        schema = func._schema
        self.name: str = func.overloadpacket.__name__
        names = [argument.name for argument in schema.arguments]
        self.is_view = bool(func.is_view) and self.name not in _CONSTANT
        self.is_mutable: bool = schema.is_mutable
        self.is_empty = "empty" in self.name or self.name in ("set_", "resize_")
        self.written = [
            index for index, argument in enumerate(schema.arguments) if argument.alias_info and argument.alias_info.is_write
        ]
        self.ignores_written = self.name in _OVERWRITING or "out" in names
        self._statistics = [index for index, name in enumerate(names) if name in ("running_mean", "running_var")]
        self._training = next((index for index, name in enumerate(names) if name in ("training", "train")), None)

    def reads(self, args: Sequence[Any], kwargs: dict[str, Any]) -> Iterator[Any]:
        """The arguments that the result depends on."""
        # In training the running statistics are written, not read; the step's own damage is in them already.
        ignored = self._statistics if self._training is not None and _at(args, self._training) else []
        for index, value in enumerate(args):
            if index not in ignored and not (self.ignores_written and index in self.written):
                yield value
        yield from (value for name, value in kwargs.items() if name != "out")


def _at(args: Sequence[Any], index: int) -> Any:
    return args[index] if index < len(args) else None


class Damage(TorchDispatchMode):
    """Watches every operator of a step, forward and backward.

    Every floating-point result is looked at. One that is damaged although nothing damaged went in is a birth; others inherit.
    Nothing is kept but descriptions, and weak references to storages.

    Args:
        root: the module whose submodules give places their names.
        batch: whose rows are samples.
    """

    supports_higher_order_operators = True

    def __init__(self, root: nn.Module, batch: Batch) -> None:
        super().__init__()
        self.batch = batch
        self.modules = ModuleStack(root)
        self._weights = {tuple(parameter.shape) for parameter in root.parameters()}
        self._taints: dict[int, tuple[StorageWeakRef, Taint]] = {}
        self._places: dict[int, Place] = {}
        self._traits: dict[Any, _Traits] = {}
        self._before: deque[_Step] = deque(maxlen=_NUM_BEFORE)
        self._order = 0
        self._has_grad_mode = True
        self.losses: list[Taint] = []
        """The damaged tensors that `backward()` was called on, in order."""

    @contextmanager
    def watch(self) -> Iterator[Damage]:
        """Follow all that is run inside."""
        with self.modules.watch(), self:
            yield self

    def label(self, named: Iterable[tuple[str, Tensor]], origin: Origin) -> None:
        """Say what tensors are that come from outside; those that are in order need no label."""
        for name, tensor in named:
            if (flaw := flaw_of(tensor)) is None or _key(tensor) in self._taints:
                continue
            rows = self.batch.rows_of(tensor) if origin == "data" else None
            # A buffer or batch leaf of minus infinities is a mask.
            is_sentinel = flaw.is_negative and origin in ("data", "state")
            self._put(tensor, Taint(-1, flaw, origin, name, rows=rows, is_sentinel=is_sentinel, dtype=tensor.dtype))

    def taint_of(self, tensor: Tensor) -> Taint | None:
        """How a tensor got its damage; None if it has none."""
        if (flaw := flaw_of(tensor)) is None:
            return None
        entry = self._taints.get(_key(tensor))
        return entry[1] if entry is not None else Taint(self._order, flaw, "constant", is_sentinel=True)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operator, and look at what comes out."""
        kwargs = kwargs or {}
        traits = self._traits.get(func)
        if traits is None:
            if not isinstance(func, torch._ops.OpOverload):
                return func(*args, **kwargs)
            traits = self._traits[func] = _Traits(func)
        self._has_grad_mode = torch.is_grad_enabled()  # as it is for the operator, not for what looks at it
        with torch.no_grad():
            written = [tensor for index in traits.written for tensor in tensors_in(_at(args, index))]
            earlier = {id(tensor): self._known(tensor) for tensor in written}
        result = func(*args, **kwargs)
        if traits.is_view or (types and any(issubclass(kind, torch._subclasses.FakeTensor) for kind in types)):
            return result
        with torch.no_grad():
            self._look(traits, args, kwargs, result, earlier)
        return result

    def _look(
        self, traits: _Traits, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any, earlier: dict[int, Taint | None]
    ) -> None:
        self._order += 1
        running = torch._C._current_autograd_node()
        self._note_place(running)
        if traits.name == "ones_like":
            self._note_loss(args[0])
        results = [*tensors_in(result)]
        if traits.is_mutable and not results:
            results = [tensor for index in traits.written for tensor in tensors_in(_at(args, index))]
        made: list[Taint] | None = None
        for tensor in results:
            span = range_of(tensor)
            if span is None:
                continue
            if span.flaw is None:
                self._before.append(
                    _Step(traits.name, self.modules.current, f"{_kind(tensor)} {list(tensor.shape)}", span)
                )
                self._clear(tensor)
                continue
            if traits.is_empty:
                self._put(tensor, Taint(self._order, span.flaw, "garbage", traits.name, place=self._here(), is_sentinel=True))
                continue
            if made is None:
                inputs = [*tensors_in([*traits.reads(args, kwargs)])]
                parents = self._parents(inputs, earlier)
            made = made or []
            taint = self._taint(traits, tensor, span.flaw, inputs, parents, args, kwargs, running)
            made.append(taint)
            self._put(tensor, taint)

    def _taint(
        self,
        traits: _Traits,
        tensor: Tensor,
        flaw: Flaw,
        inputs: list[Tensor],
        parents: tuple[Taint, ...],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        running: Any,
    ) -> Taint:
        in_engine = self._is_backward(running)
        taint = Taint(
            self._order,
            flaw,
            op=traits.name,
            node=_node_name(running) if in_engine else "",
            is_custom=in_engine and isinstance(running, torch.autograd.function.BackwardCFunction),
            parents=parents,
            dtype=tensor.dtype,
        )
        has_scalar = any(_is_nonfinite_scalar(value) for value in (*args, *kwargs.values()))
        if traits.name in _CONSTANT:
            taint.origin = "constant"
        is_put = has_scalar or traits.name in _CONSTANT
        taint.is_sentinel = all(parent.is_sentinel for parent in parents) if parents else is_put
        changes = not any(parent.flaw.has_nan for parent in parents) and flaw.has_nan
        enters = taint.is_backward and not any(parent.is_backward for parent in parents)
        if taint.is_sentinel or not parents or changes or enters:
            taint.place = self._here(running if in_engine else None)
            taint.is_hook = in_engine and not taint.is_custom and current_line() is not None
            taint.inputs = tuple(describe(value) for value in inputs)
            taint.at_fault = tuple(_at_fault(value, tensor) for value in inputs)
            taint.before = tuple(str(step) for step in self._before)
            taint.needs_grad = any(value.requires_grad for value in inputs)
            taint.shrinks = bool(inputs) and tensor.numel() < max(value.numel() for value in inputs)
            # Infinities that were put there on purpose are in healthy rows too.
            taint.rows = self._rows(tensor.isnan() if changes and parents else tensor, in_engine)
        elif all(parent.rows is None for parent in parents):
            taint.rows = self._rows(tensor, in_engine)
        return taint

    def _rows(self, tensor: Tensor, is_backward: bool) -> tuple[int, ...] | None:  # noqa: FBT001
        is_weight = is_backward and tuple(tensor.shape) in self._weights  # the gradient of one
        return None if is_weight else self.batch.rows_of(tensor)

    def _is_backward(self, running: Any) -> bool:
        """Whether it is the engine that runs an operator, and not a recomputed forward pass."""
        if running is None or not self._has_grad_mode:
            return running is not None
        return not self.modules.is_inside and current_line() is None  # gradients of gradients

    def _parents(self, inputs: list[Tensor], earlier: dict[int, Taint | None]) -> tuple[Taint, ...]:
        found: dict[int, Taint] = {}
        for tensor in inputs:
            # What is written in place was looked at before; by now it is the result.
            taint = earlier[id(tensor)] if id(tensor) in earlier else self._known(tensor)
            if taint is None and id(tensor) not in earlier and _key(tensor) not in self._taints and (flaw := flaw_of(tensor)) is not None:
                taint = Taint(self._order, flaw, "constant", place=self._here(), is_sentinel=True)
                self._put(tensor, taint)
            if taint is not None:
                found[id(taint)] = taint
        return tuple(found.values())

    def _known(self, tensor: Tensor) -> Taint | None:
        """Of a tensor whose storage is known to hold damage, if this part of it does."""
        entry = self._taints.get(_key(tensor)) if self._taints else None
        return entry[1] if entry is not None and flaw_of(tensor) is not None else None

    def _put(self, tensor: Tensor, taint: Taint) -> None:
        storage = _storage(tensor)
        if storage is not None:
            # The weak reference keeps the storage's address from being used again.
            self._taints[storage._cdata] = (StorageWeakRef(storage), taint)

    def _clear(self, tensor: Tensor) -> None:
        if self._taints and (key := _key(tensor)) in self._taints:
            storage = _storage(tensor)
            if storage is not None and tensor.numel() * tensor.element_size() >= storage.nbytes():
                del self._taints[key]

    def _note_loss(self, tensor: Tensor) -> None:
        """Autograd begins at a loss by making a one of its shape."""
        frame: FrameType | None = sys._getframe(2)
        for _ in range(_NUM_FRAMES_TO_AUTOGRAD):
            if frame is not None and frame.f_code.co_name == "_make_grads":
                if (taint := self.taint_of(tensor)) is not None:
                    self.losses.append(taint)
                return
            frame = frame and frame.f_back

    def _note_place(self, running: Any) -> None:
        """Remember where the autograd node was made that an operator of the forward pass belongs to."""
        if running is not None and not self._has_grad_mode:
            return
        number = torch.autograd._get_sequence_nr() - 1
        # The node is made right before its operator runs; what runs later under the same number has no node of its own.
        if number not in self._places:
            self._places[number] = self._here(running)

    def _here(self, running: Any = None) -> Place:
        """Module and line of what is running; in a backward pass those of the forward operator, unless it is user code."""
        if running is None:
            return Place(self.modules.current, current_line())
        if self.modules.is_inside:  # recomputation
            return Place(self.modules.current, current_line())
        line = current_line()
        made = self._places.get(running._sequence_nr(), Place())
        return Place(made.module, line or made.line)


def _key(tensor: Tensor) -> int:
    storage = _storage(tensor)
    return -1 if storage is None else storage._cdata


def _storage(tensor: Tensor) -> torch.UntypedStorage | None:
    values = plain(tensor)
    return None if values is None else values.untyped_storage()


def _kind(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _node_name(running: Any) -> str:
    name: str = running.name()
    return name.rpartition("::")[2]


def _is_nonfinite_scalar(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return any(_is_nonfinite_scalar(entry) for entry in value)
    return isinstance(value, float) and not math.isfinite(value)


def _at_fault(value: Tensor, result: Tensor) -> Range | None:
    """Range of an input at those elements where the result is damaged; None where they don't correspond."""
    values, damaged = plain(value), plain(result)
    if values is None or damaged is None or value.is_complex() or result.is_complex():
        return None
    try:
        values = values.expand_as(damaged)
    except RuntimeError:
        return None
    return range_of(values[~damaged.isfinite()])
