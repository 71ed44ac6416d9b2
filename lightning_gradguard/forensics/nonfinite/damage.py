"""Follows NaN and infinity through a step, from where they are born to the loss and the gradients."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor, autograd, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_gradguard.forensics.nonfinite.numbers import HALVES
from lightning_gradguard.forensics.nonfinite.operands import operands_of, saved_by
from lightning_gradguard.forensics.nonfinite.operators import Operator
from lightning_gradguard.forensics.nonfinite.provenance import Origin, Provenance
from lightning_gradguard.forensics.nonfinite.samples import Batch
from lightning_gradguard.forensics.nonfinite.source_location import ModuleStack, SourceLocation, current_line
from lightning_gradguard.forensics.tensors import Flaw, Range, describe, flaw_of, plain, range_of, tensors_in

_NUM_BEFORE, _NUM_FRAMES_TO_AUTOGRAD = 6, 8


class _Step(NamedTuple):
    """An operator that went well: for the frames before the culprit."""

    op: str
    module: str
    dtype: torch.dtype
    shape: torch.Size
    span: Range

    def __str__(self) -> str:
        kind = str(self.dtype).removeprefix("torch.")
        return f"{self.op} in {self.module or 'training_step'}: {kind} {list(self.shape)} {self.span}"


class _Call(NamedTuple):
    """An operator that is run.

    Attributes:
        operator: which.
        args, kwargs: what it is called with.
        node: the autograd node that the engine is running; None in a forward pass.
        has_grad_mode: whether it is recorded by autograd.
        overwritten: copies of what it writes over, by the tensor's identity.
    """

    operator: Operator
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    node: Any
    has_grad_mode: bool
    overwritten: dict[int, Tensor]

    def named(self) -> Iterator[tuple[str, Any]]:
        """The arguments with their names, as they were before."""
        for name, value in self.operator.named(self.args, self.kwargs):
            yield name, self.overwritten.get(id(value), value)


class Damage(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Watches every operator of a step, forward and backward.

    Every floating-point result is looked at. One that is damaged although nothing damaged went in is a birth; others
    inherit. Nothing is kept but descriptions, and weak references to storages.

    Args:
        root: the module whose submodules give places their names.
        batch: whose rows are samples.
    """

    supports_higher_order_operators = True

    def __init__(self, root: nn.Module, batch: Batch) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.batch = batch
        self.modules = ModuleStack(root)
        self._weights = {tuple(parameter.shape) for parameter in root.parameters()}
        self._provenances: dict[int, tuple[StorageWeakRef, Provenance]] = {}
        self._locations: dict[int, SourceLocation] = {}
        self._operators: dict[Any, Operator] = {}
        self._before: deque[_Step] = deque(maxlen=_NUM_BEFORE)
        self._order = 0
        self._half: torch.dtype | None = None
        self.losses: list[Provenance] = []
        """The damaged tensors that `backward()` was called on, in order."""

    @contextmanager
    def watch(self) -> Iterator[Damage]:
        """Follow all that is run inside."""
        with self.modules.watch(), self:
            yield self

    def label(self, named: Iterable[tuple[str, Tensor]], origin: Origin) -> None:
        """Say what tensors are that come from outside; those that are in order need no label."""
        for name, tensor in named:
            if (flaw := flaw_of(tensor)) is None or _key(tensor) in self._provenances:
                continue
            rows = self.batch.rows_of(tensor) if origin == "data" else None
            # A buffer or batch leaf of minus infinities is a mask.
            is_sentinel = flaw.is_negative and origin in ("data", "state")
            self._put(tensor, Provenance(-1, flaw, origin, name, rows=rows, is_sentinel=is_sentinel, dtype=tensor.dtype))

    def provenance_of(self, tensor: Tensor) -> Provenance | None:
        """How a tensor got its damage; None if it has none."""
        if (flaw := flaw_of(tensor)) is None:
            return None
        entry = self._provenances.get(_key(tensor))
        return entry[1] if entry is not None else Provenance(self._order, flaw, "constant", is_sentinel=True)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operator, and look at what comes out."""
        kwargs = kwargs or {}
        operator = self._operators.get(func)
        if operator is None:
            if not isinstance(func, torch._ops.OpOverload):
                return func(*args, **kwargs)
            operator = self._operators[func] = Operator(func)
        overwritten = {id(tensor): tensor.clone() for tensor in operator.overwrites(args)}
        call = _Call(operator, args, kwargs, torch._C._current_autograd_node(), torch.is_grad_enabled(), overwritten)
        # What is written in place has to be looked at before; afterwards it is the result.
        earlier = {id(tensor): self._known(tensor) for tensor in operator.writes(args)}
        result = func(*args, **kwargs)
        # What follows from a loss that is damaged needs no look.
        if not operator.is_view and not (self.losses and call.node is not None):
            self._look(call, result, earlier)
        return result

    def _look(self, call: _Call, result: Any, earlier: dict[int, Provenance | None]) -> None:
        self._order += 1
        name = call.operator.name
        self._note_place(call)
        if name == "ones_like":
            self._note_loss(call.args[0])
        inherited: tuple[list[Tensor], tuple[Provenance, ...]] | None = None
        for tensor in [*tensors_in(result)] or call.operator.writes(call.args):
            if (span := range_of(tensor)) is None:
                continue
            if tensor.dtype in HALVES:
                self._half = tensor.dtype
            if span.flaw is None:
                self._before.append(_Step(name, self.modules.current, tensor.dtype, tensor.shape, span))
                self._clear(tensor)
            elif call.operator.is_empty:
                location = SourceLocation(self.modules.current, current_line())
                self._put(tensor, Provenance(self._order, span.flaw, "garbage", name, location=location, is_sentinel=True))
            else:
                if inherited is None:
                    inputs = [*tensors_in([*call.operator.reads(call.args, call.kwargs)])]
                    inherited = inputs, self._parents(inputs, earlier)
                self._put(tensor, self._provenance(call, tensor, span.flaw, *inherited))

    def _provenance(
        self, call: _Call, tensor: Tensor, flaw: Flaw, inputs: list[Tensor], parents: tuple[Provenance, ...]
    ) -> Provenance:
        in_engine = self._is_backward(call)
        provenance = Provenance(
            self._order,
            flaw,
            origin="constant" if call.operator.is_constant else "",
            op=call.operator.name,
            node=_node_name(call.node) if in_engine else "",
            is_custom=in_engine and isinstance(call.node, torch.autograd.function.BackwardCFunction),
            parents=parents,
            dtype=tensor.dtype,
            half=self._half,
        )
        is_put = call.operator.puts_infinity(call.args, call.kwargs)
        provenance.is_sentinel = all(parent.is_sentinel for parent in parents) if parents else is_put
        changes = not any(parent.flaw.has_nan for parent in parents) and flaw.has_nan
        enters = provenance.is_backward and not any(parent.is_backward for parent in parents)
        shrinks = bool(inputs) and tensor.numel() < max(value.numel() for value in inputs)
        # Where infinities from a mask are no longer some among many.
        escapes = provenance.is_sentinel and shrinks and not any(parent.shrinks for parent in parents)
        provenance.shrinks = shrinks or any(parent.shrinks for parent in parents)
        if all(parent.origin == "constant" for parent in parents) or changes or enters or escapes:
            provenance.location = (
                self._location_of(call) if in_engine else SourceLocation(self.modules.current, current_line())
            )
            provenance.is_hook = in_engine and not provenance.is_custom and current_line() is not None
            provenance.inputs = tuple(describe(call.overwritten.get(id(value), value)) for value in inputs)
            provenance.operands = operands_of(_named(call, provenance), tensor)
            provenance.before = tuple(str(step) for step in self._before)
            provenance.needs_grad = any(value.requires_grad for value in inputs)
            # Infinities that were put there on purpose are in healthy rows too.
            provenance.rows = self._rows(tensor.isnan() if changes and parents else tensor, in_engine)
        elif all(parent.rows is None for parent in parents):
            provenance.rows = self._rows(tensor, in_engine)
        return provenance

    def _rows(self, tensor: Tensor, is_backward: bool) -> tuple[int, ...] | None:  # noqa: FBT001
        is_weight = is_backward and tuple(tensor.shape) in self._weights  # the gradient of one
        return None if is_weight else self.batch.rows_of(tensor)

    def _is_backward(self, call: _Call) -> bool:
        """Whether it is the engine that runs an operator, and not a recomputed forward pass."""
        if call.node is None or not call.has_grad_mode:
            return call.node is not None
        return not self.modules.is_inside and current_line() is None  # gradients of gradients

    def _parents(self, inputs: list[Tensor], earlier: dict[int, Provenance | None]) -> tuple[Provenance, ...]:
        found: dict[int, Provenance] = {}
        for tensor in inputs:
            provenance = earlier[id(tensor)] if id(tensor) in earlier else self._known(tensor) or self._unknown(tensor)
            if provenance is not None:
                found[id(provenance)] = provenance
        return tuple(found.values())

    def _unknown(self, tensor: Tensor) -> Provenance | None:
        """Of a tensor that was never seen before, if it holds damage: a constant from somewhere."""
        if _key(tensor) in self._provenances or (flaw := flaw_of(tensor)) is None:
            return None
        location = SourceLocation(self.modules.current, current_line())
        provenance = Provenance(self._order, flaw, "constant", location=location, is_sentinel=True)
        self._put(tensor, provenance)
        return provenance

    def _known(self, tensor: Tensor) -> Provenance | None:
        """Of a tensor whose storage is known to hold damage, if this part of it does."""
        entry = self._provenances.get(_key(tensor)) if self._provenances else None
        return entry[1] if entry is not None and flaw_of(tensor) is not None else None

    def _put(self, tensor: Tensor, provenance: Provenance) -> None:
        storage = _storage(tensor)
        if storage is not None:
            # The weak reference keeps the storage's address from being used again.
            self._provenances[storage._cdata] = (StorageWeakRef(storage), provenance)  # type: ignore[no-untyped-call]

    def _clear(self, tensor: Tensor) -> None:
        if self._provenances and (key := _key(tensor)) in self._provenances:
            storage = _storage(tensor)
            if storage is not None and tensor.numel() * tensor.element_size() >= storage.nbytes():
                del self._provenances[key]

    def _note_loss(self, tensor: Tensor) -> None:
        """Autograd begins at a loss by making a one of its shape."""
        frame: FrameType | None = sys._getframe(2)
        for _ in range(_NUM_FRAMES_TO_AUTOGRAD):
            if frame is not None and frame.f_code.co_name == "_make_grads":
                if (provenance := self.provenance_of(tensor)) is not None:
                    self.losses.append(provenance)
                return
            frame = frame and frame.f_back

    def _note_place(self, call: _Call) -> None:
        """Remember where the autograd node was made that an operator of the forward pass belongs to."""
        if call.node is not None and not call.has_grad_mode:
            return
        number = autograd._get_sequence_nr() - 1  # type: ignore[attr-defined]  # how torch's own tracing counts
        # The node is made right before its operator runs; what runs later under the same number has no node of its own.
        if number not in self._locations:
            is_traced = call.node is not None and not self.modules.is_inside
            self._locations[number] = (
                self._location_of(call) if is_traced else SourceLocation(self.modules.current, current_line())
            )

    def _location_of(self, call: _Call) -> SourceLocation:
        """Where the forward operator of a running node is; with the line of what user code the engine runs itself."""
        made = self._locations.get(call.node._sequence_nr(), SourceLocation())
        return SourceLocation(made.module, current_line() or made.line)


def _key(tensor: Tensor) -> int:
    storage = _storage(tensor)
    return -1 if storage is None else storage._cdata


def _storage(tensor: Tensor) -> torch.UntypedStorage | None:
    values = plain(tensor)
    return None if values is None else values.untyped_storage()


def _node_name(running: Any) -> str:
    name: str = running.name()
    return name.rpartition("::")[2]


def _named(call: _Call, provenance: Provenance) -> Iterator[tuple[str, Any]]:
    """The operands with their names; in a backward pass those of the forward operator."""
    if provenance.is_backward and not (provenance.is_hook or provenance.is_custom):
        return saved_by(call.node, provenance.op, call.named())
    return call.named()
