"""Follows the rows of a batch through a step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_gradguard.forensics.nonfinite.layout import Layout
from lightning_gradguard.forensics.nonfinite.operators import Operator
from lightning_gradguard.forensics.nonfinite.row_call import Call
from lightning_gradguard.forensics.nonfinite.row_labels import RowLabels, samples_at, unknown
from lightning_gradguard.forensics.nonfinite.row_rules import labels_of
from lightning_gradguard.forensics.tensors import tensors_in


class Rows:
    """Knows for each tensor of a step which samples its elements belong to, told operator by operator.

    Args:
        layout: of the batch.
    """

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._labels = RowLabels()
        self._forward: dict[int, list[tuple[torch.Size, Tensor | None]]] = {}
        self.mixes = False
        """Whether values of different samples have met, other than in a mean or the like."""
        self._is_elementwise = False
        for name, tensor in layout.leaves:
            if (label := layout.labels.get(name)) is not None:
                self._labels.put(tensor, label)

    @property
    def is_certain(self) -> bool:
        """Whether rows are samples: where a batch might be laid out in several ways, no two rows of it may have met."""
        return self._layout.is_unique or (self._layout.is_conventional and not self.mixes)

    def note(
        self,
        func: Any,
        operator: Operator,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        result: Any,
        *,
        is_backward: bool,
        sequence: int | None,
    ) -> None:
        """An operator was run.

        Args:
            func: which.
            operator: what is known of it.
            args: what it was called with.
            kwargs: by name.
            result: what came out.
            is_backward: whether the engine ran it.
            sequence: number that forward and backward operators share.
        """
        inputs = [*tensors_in([*args, *kwargs.values()])]
        has_label = any(self._labels.get(it) is not None for it in inputs)
        if not is_backward and sequence is not None and sequence not in self._forward:
            self._forward[sequence] = [(it.shape, self._labels.get(it)) for it in inputs] if has_label else []
        written = operator.writes(args)
        outputs = written or [*tensors_in(result)]
        labels: list[Tensor | None] = [None] * len(outputs)
        self._is_elementwise = False
        if has_label:
            # What is only seen in another way is told by where it lies.
            if operator.name == "as_strided" or torch.Tag.inplace_view in func.tags:
                return
            labels, mixes = self._told(func, operator, args, kwargs, outputs)
            self.mixes |= mixes and not is_backward  # where gradients of weights are summed, all samples meet
        if is_backward and sequence is not None:
            labels = [self._as_forward(sequence, out, label) for out, label in zip(outputs, labels, strict=True)]
        for out, label in zip(outputs, labels, strict=True):
            if written:
                self._labels.overwrite(out, label)
            elif label is not None or not operator.is_view:
                self._labels.put(out, label)

    def _told(
        self, func: Any, operator: Operator, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: list[Tensor]
    ) -> tuple[list[Tensor | None], bool]:
        bound = {
            argument.name: args[index] if index < len(args) else kwargs.get(argument.name, argument.default_value)
            for index, argument in enumerate(func._schema.arguments)
        }
        call = Call(func, operator.name.rstrip("_"), bound, outputs, self._labels)
        try:
            labels = labels_of(call)
        except Exception:  # noqa: BLE001 - an operator used in a way that no rule foresees: then its rows are not known
            labels = [unknown(out) for out in outputs]
        self._is_elementwise = call.is_elementwise
        return labels, call.mixes

    def _as_forward(self, sequence: int, tensor: Tensor, label: Tensor | None) -> Tensor | None:
        """A gradient's label, by what it is the gradient of, where it does not follow from what it was made of."""
        if label is not None and bool((label > 0).any()):
            return label
        alike = [label for shape, label in self._forward.get(sequence, ()) if shape == tensor.shape]
        first = alike[0] if alike else None
        if first is None or any(other is None or not torch.equal(other, first) for other in alike):
            return label
        return first

    def samples_at(self, tensor: Tensor, is_bad: Tensor) -> tuple[int, ...] | None:
        """The samples of the marked elements of a tensor, ascending; None if it is not known of all. One sync."""
        return samples_at(self._labels.get(tensor), is_bad)

    def samples_beside(self, tensor: Tensor, is_bad: Tensor, others: list[Tensor]) -> tuple[int, ...] | None:
        """The samples whose values the marked elements of a tensor meet in the last operator; None if they meet none."""
        if not self._is_elementwise:
            return None
        label = next(
            (self._labels.get(it) for it in others if it.shape == tensor.shape and self._labels.get(it) is not None), None
        )
        return None if label is None else samples_at(label, is_bad) or None
