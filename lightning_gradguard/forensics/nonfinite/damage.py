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
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_gradguard.forensics.nonfinite.drops import Drops
from lightning_gradguard.forensics.nonfinite.numbers import HALVES
from lightning_gradguard.forensics.nonfinite.operands import operands_of, saved_by
from lightning_gradguard.forensics.nonfinite.operators import Operator
from lightning_gradguard.forensics.nonfinite.provenance import Origin, Provenance
from lightning_gradguard.forensics.nonfinite.provenance_table import ProvenanceTable
from lightning_gradguard.forensics.nonfinite.rows import Rows
from lightning_gradguard.forensics.nonfinite.samples import Batch
from lightning_gradguard.forensics.nonfinite.source_location import (
    ModuleStack,
    SourceLocation,
    current_frames,
    current_line,
    current_location,
    is_function_of_a_user,
)
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
        rows: follows these rows, and notes whole stacks of calls; None: they are guessed by shapes, which is faster.
    """

    supports_higher_order_operators = True

    def __init__(self, root: nn.Module, batch: Batch, rows: Rows | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.batch = batch
        self.rows = rows
        self.modules = ModuleStack(root)
        self._weights = {tuple(it.shape) for it in root.parameters() if not (nn.parameter.is_lazy(it) or it.is_nested)}
        self._provenances = ProvenanceTable()
        self._locations: dict[int, SourceLocation] = {}
        self._operators: dict[Any, Operator] = {}
        self._before: deque[_Step] = deque(maxlen=_NUM_BEFORE)
        self._order = 0
        self.drops = Drops()
        """Where damage was left behind in the forward pass, in order."""
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
            if (flaw := flaw_of(tensor, is_whole=True)) is None or tensor in self._provenances:
                continue
            rows = self.batch.rows_of(tensor) if origin == "data" else None
            samples = self._samples_at(tensor) if origin == "data" else None
            # A buffer or batch leaf of minus infinities is a mask.
            is_sentinel = flaw.is_negative and origin in ("data", "state")
            provenance = Provenance(-1, flaw, origin, name, rows=rows, is_sentinel=is_sentinel, dtype=tensor.dtype)
            provenance.samples = samples
            self._provenances.put(tensor, provenance)

    def provenance_of(self, tensor: Tensor) -> Provenance | None:
        """How a tensor got its damage; None if it has none."""
        if (flaw := flaw_of(tensor)) is None:
            return None
        return self._provenances.get(tensor) or Provenance(self._order, flaw, "constant", is_sentinel=True)

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operator, and look at what comes out."""
        operator = self._operators.get(func)
        if operator is None:
            if not isinstance(func, torch._ops.OpOverload):
                return func(*args, **kwargs)
            operator = self._operators[func] = Operator(func)
        if operator.is_view and self.rows is None:  # more than half of all, and they make nothing
            return func(*args, **kwargs)
        overwritten = {id(tensor): tensor.clone() for tensor in operator.overwrites(args)}
        call = _Call(operator, args, kwargs, torch._C._current_autograd_node(), torch.is_grad_enabled(), overwritten)
        # What is written in place has to be looked at before; afterwards it is the result.
        earlier = {id(tensor): self._provenances.damage_of(tensor) for tensor in operator.writes(args)}
        result = func(*args, **kwargs)
        if self.rows is not None:
            is_backward = call.node is not None and not call.has_grad_mode
            self.rows.note(func, operator, args, kwargs, result, is_backward=is_backward, sequence=self._sequence_of(call))
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
        is_finite = False
        for tensor in [*tensors_in(result)] or call.operator.writes(call.args):
            if (span := range_of(tensor)) is None:
                continue
            if tensor.dtype in HALVES:
                self._half = tensor.dtype
            if span.flaw is None:
                is_finite = True
                self._before.append(_Step(name, self.modules.current, tensor.dtype, tensor.shape, span))
                self._provenances.clear(tensor)
            elif call.operator.is_empty:
                location = self._here()
                self._provenances.put(
                    tensor, Provenance(self._order, span.flaw, "garbage", name, location=location, is_sentinel=True)
                )
            else:
                if inherited is None:
                    inputs = [*tensors_in([*call.operator.reads(call.args, call.kwargs)])]
                    inherited = inputs, self._parents(inputs, earlier)
                self._provenances.put(tensor, self._provenance(call, tensor, span.flaw, *inherited))
        if is_finite and inherited is None and self._provenances and call.node is None:
            self._note_drop(call, earlier)

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
            is_custom=in_engine and is_function_of_a_user(call.node),
            parents=parents,
            dtype=tensor.dtype,
            sequence=self._sequence_of(call),
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
            provenance.location = self._location_of(call) if in_engine else self._here()
            provenance.is_hook = in_engine and not provenance.is_custom and current_line() is not None
            provenance.inputs = tuple(describe(call.overwritten.get(id(value), value)) for value in inputs)
            provenance.operands = operands_of(_named(call, provenance), tensor)
            provenance.before = tuple(str(step) for step in self._before)
            provenance.needs_grad = any(value.requires_grad for value in inputs)
            # Infinities that were put there on purpose are in healthy rows too.
            is_nan = tensor.isnan() if changes and parents else None
            provenance.rows = self._rows(tensor if is_nan is None else is_nan, in_engine)
            provenance.samples = self._samples_at(tensor, is_nan)
        elif all(parent.rows is None for parent in parents):
            provenance.rows = self._rows(tensor, in_engine)
        if provenance.samples is None and not any(parent.samples for parent in parents):
            provenance.samples = self._samples_at(tensor) or self._samples_beside(inputs)
        return provenance

    def _rows(self, tensor: Tensor, is_backward: bool) -> tuple[int, ...] | None:  # noqa: FBT001
        is_weight = is_backward and tuple(tensor.shape) in self._weights  # the gradient of one
        return None if is_weight else self.batch.rows_of(tensor)

    def _samples_at(self, tensor: Tensor, is_bad: Tensor | None = None) -> tuple[int, ...] | None:
        values = plain(tensor)
        if self.rows is None or values is None or values.shape != tensor.shape:
            return None
        return self.rows.samples_at(tensor, ~values.isfinite() if is_bad is None else is_bad)

    def _samples_beside(self, inputs: list[Tensor]) -> tuple[int, ...] | None:
        """The samples that damaged inputs meet, if these are made of none themselves."""
        damaged = next((it for it in inputs if self._provenances.damage_of(it) is not None), None)
        values = None if damaged is None else plain(damaged)
        if self.rows is None or damaged is None or values is None or values.shape != damaged.shape:
            return None
        return self.rows.samples_beside(damaged, ~values.isfinite(), inputs)

    def _here(self) -> SourceLocation:
        return current_location(self.modules.current, is_detailed=self.rows is not None)

    def _is_backward(self, call: _Call) -> bool:
        """Whether it is the engine that runs an operator, and not a recomputed forward pass."""
        if call.node is None or not call.has_grad_mode:
            return call.node is not None
        return not self.modules.is_inside and current_line() is None  # gradients of gradients

    def _parents(self, inputs: list[Tensor], earlier: dict[int, Provenance | None]) -> tuple[Provenance, ...]:
        found: dict[int, Provenance] = {}
        for tensor in inputs:
            provenance = (
                earlier[id(tensor)]
                if id(tensor) in earlier
                else self._provenances.damage_of(tensor) or self._unknown(tensor)
            )
            if provenance is not None:
                found[id(provenance)] = provenance
        return tuple(found.values())

    def _unknown(self, tensor: Tensor) -> Provenance | None:
        """Of a tensor that was never seen before, if it holds damage: a constant from somewhere."""
        if tensor in self._provenances or (flaw := flaw_of(tensor)) is None:
            return None
        location = self._here()
        provenance = Provenance(self._order, flaw, "constant", location=location, is_sentinel=True)
        self._provenances.put(tensor, provenance)
        return provenance

    def _note_drop(self, call: _Call, earlier: dict[int, Provenance | None]) -> None:
        inputs = ((tensor, earlier.get(id(tensor))) for tensor in tensors_in([*call.operator.reads(call.args, call.kwargs)]))
        self.drops.note(self._order, call.operator.name, inputs, self._provenances, self._here)

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
            self._locations[number] = self._location_of(call) if is_traced else self._here()

    def _sequence_of(self, call: _Call) -> int | None:
        if call.node is not None and not call.has_grad_mode:
            return int(call.node._sequence_nr())
        return autograd._get_sequence_nr() - 1 if call.has_grad_mode else None  # type: ignore[attr-defined]

    def _location_of(self, call: _Call) -> SourceLocation:
        """Where the forward operator of a running node is; with the line of what user code the engine runs itself."""
        made = self._locations.get(call.node._sequence_nr(), SourceLocation())
        line = current_line()
        if line is None:
            return made
        module, hook_on = self.modules.hooked(call.node) or (made.module, "")
        return SourceLocation(module, line, () if self.rows is None else current_frames(), hook_on=hook_on)


def _node_name(running: Any) -> str:
    name: str = running.name()
    return name.rpartition("::")[2]


def _named(call: _Call, provenance: Provenance) -> Iterator[tuple[str, Any]]:
    """The operands with their names; in a backward pass those of the forward operator."""
    if provenance.is_backward and not (provenance.is_hook or provenance.is_custom):
        return saved_by(call.node, provenance.op, call.named())
    return call.named()
