"""A damaged tensor, and how it got its damage."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch

from lightning_gradguard.forensics.nonfinite.operands import Operand
from lightning_gradguard.forensics.nonfinite.source_location import SourceLocation
from lightning_gradguard.forensics.tensors import Flaw

Origin = Literal["", "data", "weights", "state", "constant", "garbage"]
"""Where damage came in that no operator made: a batch, a parameter or buffer, a tensor that a module keeps for itself, a
constant, memory that nobody has written to."""


@dataclass(eq=False)
class Provenance:
    """A tensor with NaN or infinity in it, and how it got them.

    Attributes:
        order: number of the operator, ascending in time.
        flaw: what is wrong with the tensor.
        origin: where damage came in that no operator made; "" for an operator's result.
        op: aten operator; for another origin, what its name is there.
        node: autograd node that ran it in the backward pass, "" in the forward pass.
        is_custom: whether that is a user's own `Function`.
        is_hook: whether it is user code that autograd ran beside a node, as a hook on a tensor.
        location: module and line.
        parents: damaged tensors that went in.
        rows: bad samples as its shape has them, if it has a row for each; None: it has not, or they were not looked for.
        samples: the samples that its damaged elements belong to, as followed from the batch; None: not known.
        is_sentinel: whether it is, or comes from nothing but, infinities that somebody has put there on purpose.
        inputs: what went in, in words; looked at where damage is born or changes its kind.
        operands: what is known of the values that went in, looked at together with `inputs`.
        dtype: of the tensor.
        half: the type of half precision that the step has used before; None if it has used none.
        before: the operators before it, in words.
        needs_grad: whether an input depends on parameters.
        shrinks: whether it, or one that it comes from, has fewer elements than what went in.
        sequence: number that a forward operator shares with its autograd node; None where autograd does not record.
    """

    order: int
    flaw: Flaw
    origin: Origin = ""
    op: str = ""
    node: str = ""
    is_custom: bool = False
    is_hook: bool = False
    location: SourceLocation = field(default_factory=SourceLocation)
    parents: tuple[Provenance, ...] = ()
    rows: tuple[int, ...] | None = None
    samples: tuple[int, ...] | None = None
    is_sentinel: bool = False
    inputs: tuple[str, ...] = ()
    operands: tuple[Operand, ...] = ()
    dtype: torch.dtype | None = None
    half: torch.dtype | None = None
    before: tuple[str, ...] = ()
    needs_grad: bool = True
    shrinks: bool = False
    sequence: int | None = None

    @property
    def is_backward(self) -> bool:
        """Whether it was made in the backward pass."""
        return bool(self.node)
