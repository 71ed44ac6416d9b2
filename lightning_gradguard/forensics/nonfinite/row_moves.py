"""Labels of operators that put elements in other places."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_gradguard.forensics.nonfinite.row_call import MAX_ELEMENTS, Call, Label, aligned, dims_of, unknown_of
from lightning_gradguard.forensics.nonfinite.row_labels import (
    NONE,
    compressed,
    merged,
    reduced,
    unknown,
)
from lightning_gradguard.forensics.tensors import tensors_in


def moved(names: Sequence[str]) -> Callable[[Call], list[Label]]:
    """Elements that go to other places: the same happens to their labels."""

    def rule(call: Call) -> list[Label]:
        if all(call.label(it) is None for name in names for it in tensors_in(call.args[name])):
            return [None] * len(call.outputs)
        uniform = _uniform_of(call, names)
        if uniform is not None:
            return [torch.full([1] * it.dim(), uniform, dtype=torch.int32) for it in call.outputs]
        if sum(it.numel() for it in call.outputs) > MAX_ELEMENTS and not call.func.is_view:
            return [unknown(it) for it in call.outputs]
        made = {name: _labels_in(call, value) if name in names else _on_host(value) for name, value in call.args.items()}
        positional = [made.pop(argument.name) for argument in call.func._schema.arguments if not argument.kwarg_only]
        result = _functional(call)(*positional, **{key: value for key, value in made.items() if key != "out"})
        return [compressed(it) for it in tensors_in(result)]

    return rule


def reshaped(call: Call) -> list[Label]:
    """A view of another shape, without writing down labels that do not vary."""
    label = call.label(call.args["self"])
    if label is None:
        return [None]
    before, after = [*call.args["self"].shape], [*call.outputs[0].shape]
    begin = max((dim + 1 for dim, length in enumerate(label.shape) if length > 1), default=0)
    for cut in range(begin, len(before) + 1):
        size = math.prod(before[cut:])
        kept = next((index for index in range(len(after) + 1) if math.prod(after[index:]) == size), None)
        if kept is not None and math.prod(before[:cut]) <= MAX_ELEMENTS:
            small = compressed(label.reshape(label.shape[:cut]).expand(before[:cut]).reshape(after[:kept]))
            return [small.reshape([*small.shape] + [1] * (len(after) - kept))]
    return [unknown(call.outputs[0])]


def is_in_place(func: Any) -> bool:
    """Whether an operator is the variant in place of another, by its name: older versions of torch have no tag for it."""
    name: str = func.overloadpacket.__name__
    return name.endswith("_") and not name.endswith("__")


def _functional(call: Call) -> Any:
    """The operator that gives back what its variant in place would write."""
    if is_in_place(call.func):
        return getattr(getattr(torch.ops.aten, call.name), call.func._overloadname)
    return call.func


def _uniform_of(call: Call, names: Sequence[str]) -> int | None:
    """The value of all labels where there is only one; what is filled in between then belongs to none, which is no harm."""
    labels = [call.label(it) for name in names for it in tensors_in(call.args[name])]
    values = {int(label) if label is not None and label.numel() == 1 else None for label in labels}
    return values.pop() if len(values) == 1 else None


def _labels_in(call: Call, value: Any) -> Any:
    if isinstance(value, Tensor):
        return call.full(value)
    return [_labels_in(call, entry) for entry in value] if isinstance(value, (list, tuple)) else value


def _on_host(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.cpu()
    return [_on_host(entry) for entry in value] if isinstance(value, (list, tuple)) else value


def picked(call: Call) -> list[Label]:
    """Sorted, or the largest: the second result says from where."""
    label = call.label(call.args["self"])
    dim = dims_of(call, call.outputs[0].dim())[-1] if call.args.get("dim") is not None else call.outputs[0].dim() - 1
    if label is not None and label.shape[dim] > 1:
        index = call.outputs[1].cpu()
        shape = [
            length if index == dim else own for index, (length, own) in enumerate(zip(label.shape, index.shape, strict=True))
        ]
        label = compressed(label.expand(shape).gather(dim, index))
    return [label, label]


def added(call: Call) -> list[Label]:
    """Elements that are summed into the places that an index says."""
    whole = call.args["self"]
    if whole.numel() > MAX_ELEMENTS:
        return [unknown_of(call)]
    places = torch.arange(whole.numel()).reshape(whole.shape)
    if call.name.startswith(("index_put", "_index_put")):
        indices = tuple(slice(None) if index is None else index.cpu() for index in call.args["indices"])
        places, source = places[indices], call.args["values"]
    elif call.name.startswith("index"):
        places, source = places.index_select(call.args["dim"], call.args["index"].cpu()), call.args["source"]
    else:
        source = call.args["src"]
        index = call.args["index"].cpu()
        places = places.gather(call.args["dim"], index)
        source = source[tuple(slice(length) for length in index.shape)] if source.shape != index.shape else source
        if call.label(source) is None and call.label(call.args["src"]) is not None:
            return [unknown_of(call)]
    values = call.full(source).expand(places.shape).flatten().to(torch.int32)
    high = call.full(whole).flatten().clone()
    low = torch.where(high == NONE, torch.iinfo(torch.int32).max, high)
    flat = places.flatten()
    high = high.scatter_reduce(0, flat, values, "amax")
    low = low.scatter_reduce(0, flat, torch.where(values == NONE, torch.iinfo(torch.int32).max, values), "amin")
    return [compressed(merged(low, high).reshape(whole.shape))]


def scattered(call: Call) -> list[Label]:
    """Values of another tensor, or a number, which an index puts in its places."""
    if "src" in call.args:
        return moved(("self", "src"))(call)
    index = reduced(call.label(call.args["index"]), dims_of(call, call.outputs[0].dim()))
    return [call.combine([call.label(call.args["self"]), index])]


def none(call: Call) -> list[Label]:
    """A new tensor of numbers that depend on no input."""
    return [None] * len(call.outputs)


def copied(call: Call) -> list[Label]:
    """One tensor's values in the place of another's."""
    source = call.args["src"]
    return aligned([call.label(source)], call.outputs[0].dim())
