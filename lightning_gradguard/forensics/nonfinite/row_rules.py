"""How each kind of operator passes the labels of its inputs on: which sample the elements of its results belong to."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_gradguard.forensics.nonfinite.row_labels import (
    MANY,
    NONE,
    UNKNOWN,
    RowLabels,
    combined,
    compressed,
    merged,
    reduced,
    unknown,
)
from lightning_gradguard.forensics.tensors import tensors_in

_MAX_ELEMENTS = 2**24
"""Labels are not worked out one by one for tensors of more elements."""

_Label = Tensor | None


@dataclass
class Call:
    """An operator that was run, and the labels of what went in.

    Attributes:
        func: one of `torch.ops`, with its overload.
        name: of it, without namespace, overload, and the underscore of those that work in place.
        args: by the names in its schema.
        outputs: the tensors that came out.
        labels: of all tensors so far.
        mixes: whether values of different samples have met in it.
        is_elementwise: whether elements at the same place meet, and no others.
    """

    func: Any
    name: str
    args: dict[str, Any]
    outputs: list[Tensor]
    labels: RowLabels
    mixes: bool = False
    is_elementwise: bool = False

    @property
    def inputs(self) -> list[Tensor]:
        """All tensors that went in."""
        return [*tensors_in([*self.args.values()])]

    def label(self, tensor: Tensor) -> _Label:
        """Of one of them."""
        return self.labels.get(tensor)

    def combine(self, labels: Iterable[_Label]) -> _Label:
        """Element by element."""
        found, has_met = combined(labels)
        self.mixes |= has_met
        return found

    def gather(self, label: _Label, dims: Iterable[int]) -> _Label:
        """Over some dimensions, by an operator that lets all elements along them meet."""
        result = reduced(label, dims)
        if label is not None and result is not None:
            self.mixes |= bool((result == MANY).any()) and not bool((label == MANY).any())
            # Which of those that have met is not known.
            result = torch.where(result == MANY, torch.where((label == MANY).all(), MANY, UNKNOWN), result).to(torch.int32)
        return result

    def full(self, tensor: Tensor) -> Tensor:
        """The label of a tensor in its own shape."""
        label = self.label(tensor)
        if label is None:
            return torch.zeros((), dtype=torch.int32).expand(tensor.shape)
        return label.expand(tensor.shape)


def labels_of(call: Call) -> list[_Label]:
    """The labels of an operator's results, one each."""
    rule = _RULES.get(call.name) or next((rule for part, rule in _BY_PART if part in call.name), None)
    if rule is None:
        rule = _kind_of(call)
    found = rule(call)
    if len(found) < len(call.outputs):
        found = [*found, *[_unknown(call)] * (len(call.outputs) - len(found))]
    return [_fitted(label, output) for label, output in zip(found, call.outputs, strict=False)]


def _fitted(label: _Label, output: Tensor) -> _Label:
    """Results such as a mean beside a normalised tensor have other shapes."""
    if label is None:
        return None
    fits = label.dim() == output.dim() and all(a in (1, b) for a, b in zip(label.shape, output.shape, strict=True))
    return label if fits else unknown(output)


def _unknown(call: Call) -> _Label:
    return torch.full((1,), UNKNOWN, dtype=torch.int32) if any(call.label(it) is not None for it in call.inputs) else None


def _kind_of(call: Call) -> Callable[[Call], list[_Label]]:
    if call.func.is_view:
        return _moved(("self",))
    if torch.Tag.reduction in call.func.tags:
        return _gathered
    if _is_pointwise(call.func):
        return _elementwise
    return lambda call: [_unknown(call)]


def _is_pointwise(func: Any) -> bool:
    packet = func.overloadpacket
    if torch.Tag.inplace in func.tags:
        packet = getattr(torch.ops.aten, packet.__name__.rstrip("_"), packet)
    return any(torch.Tag.pointwise in getattr(packet, name).tags for name in packet.overloads())


def _aligned(labels: Iterable[_Label], num_dims: int) -> list[_Label]:
    return [None if label is None else label.reshape([1] * (num_dims - label.dim()) + [*label.shape]) for label in labels]


def _elementwise(call: Call) -> list[_Label]:
    call.is_elementwise = True
    result = call.outputs[0]
    labels = [call.label(it) for it in call.inputs if it.dim() <= result.dim()]
    return [call.combine(_aligned(labels, result.dim()))] * len(call.outputs)


def _loss(call: Call) -> list[_Label]:
    """Of predictions and targets of one shape: element by element, or all of them to one number."""
    call.is_elementwise = True
    inputs = [call.args[name] for name in call.args if isinstance(call.args[name], Tensor)]
    num_dims = max(it.dim() for it in inputs)
    label = combined(_aligned([call.label(it) for it in inputs], num_dims))[0]
    if call.outputs[0].dim() == num_dims:
        return [label]
    gathered = reduced(label, range(num_dims))
    return [None if gathered is None else gathered.reshape(())]


def _moved(names: Sequence[str]) -> Callable[[Call], list[_Label]]:
    """Elements that go to other places: the same happens to their labels."""

    def rule(call: Call) -> list[_Label]:
        if all(call.label(it) is None for name in names for it in tensors_in(call.args[name])):
            return [None] * len(call.outputs)
        uniform = _uniform_of(call, names)
        if uniform is not None:
            return [torch.full([1] * it.dim(), uniform, dtype=torch.int32) for it in call.outputs]
        if sum(it.numel() for it in call.outputs) > _MAX_ELEMENTS and not call.func.is_view:
            return [unknown(it) for it in call.outputs]
        made = {name: _labels_in(call, value) if name in names else _on_host(value) for name, value in call.args.items()}
        if "padding_value" in made:
            made["padding_value"] = float(NONE)
        positional = [made.pop(argument.name) for argument in call.func._schema.arguments if not argument.kwarg_only]
        result = _functional(call)(*positional, **{key: value for key, value in made.items() if key != "out"})
        return [compressed(it) for it in tensors_in(result)]

    return rule


def _reshaped(call: Call) -> list[_Label]:
    """A view of another shape, without writing down labels that do not vary."""
    label = call.label(call.args["self"])
    if label is None:
        return [None]
    before, after = [*call.args["self"].shape], [*call.outputs[0].shape]
    begin = max((dim + 1 for dim, length in enumerate(label.shape) if length > 1), default=0)
    for cut in range(begin, len(before) + 1):
        size = math.prod(before[cut:])
        kept = next((index for index in range(len(after) + 1) if math.prod(after[index:]) == size), None)
        if kept is not None and math.prod(before[:cut]) <= _MAX_ELEMENTS:
            small = compressed(label.reshape(label.shape[:cut]).expand(before[:cut]).reshape(after[:kept]))
            return [small.reshape([*small.shape] + [1] * (len(after) - kept))]
    return [unknown(call.outputs[0])]


def _functional(call: Call) -> Any:
    """The operator that gives back what its variant in place would write."""
    if torch.Tag.inplace in call.func.tags:
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


def _dims(call: Call, num_dims: int, name: str = "dim") -> list[int]:
    dims = call.args.get(name)
    if dims is None or (isinstance(dims, (list, tuple)) and not dims):
        return [*range(num_dims)]
    return [dim % max(num_dims, 1) for dim in (dims if isinstance(dims, (list, tuple)) else [dims])]


def _gathered(call: Call) -> list[_Label]:
    """A sum, a norm, a maximum: over one dimension, several, or all."""
    tensor = call.inputs[0]
    label = call.label(tensor)
    if label is None or not tensor.dim():
        return [label] * len(call.outputs)
    dims = _dims(call, tensor.dim())
    label = reduced(label, dims)
    if label is not None and call.outputs[0].dim() < tensor.dim():
        label = label.reshape([length for dim, length in enumerate(label.shape) if dim not in dims])
    return [label] * len(call.outputs)


def _along(call: Call) -> list[_Label]:
    """A softmax, a cumulated sum: all elements along a dimension meet, and the shape stays."""
    result = call.outputs[0]
    if not result.dim():
        return _elementwise(call)
    label = call.combine(_aligned([call.label(it) for it in call.inputs if it.dim() == result.dim()], result.dim()))
    return [call.gather(label, _dims(call, result.dim()))] * len(call.outputs)


def _product(call: Call) -> list[_Label]:
    """A product of matrices, of batches of them, of vectors; or distances between their rows."""
    left, right = [call.inputs[index] for index in ((0, 1) if "add" not in call.name else (1, 2))]
    first = reduced(call.label(left), [left.dim() - 1])
    contracted = right.dim() - 1 if call.name.startswith("_cdist") else max(right.dim() - 2, 0)
    second = reduced(call.label(right), [contracted])
    if second is not None and call.name.startswith("_cdist"):
        second = second.transpose(-1, -2)
    num_dims = max(left.dim(), right.dim())
    if right.dim() < left.dim():  # times a vector
        first = None if first is None else first.squeeze(-1)
        num_dims -= 1
        second = None if second is None else second.reshape(1)
    bias = call.label(call.inputs[0]) if "add" in call.name else None
    return [call.combine(_aligned([first, second, bias], max(num_dims, call.outputs[0].dim())))]


def _first(call: Call) -> list[_Label]:
    """Convolutions, attention, pooling: the first dimension stays, in all others elements meet."""
    labels = []
    for tensor in call.inputs:
        label = call.label(tensor)
        if label is not None and tensor.dim():
            label = call.gather(label, range(1, tensor.dim()))
            labels.append(None if label is None else label.reshape(-1))
    label = call.combine(label for label in labels if label is not None)
    return [None if label is None or not it.dim() else label.reshape([-1] + [1] * (it.dim() - 1)) for it in call.outputs]


def _layer_norm(call: Call) -> list[_Label]:
    num = len(call.args["normalized_shape"])
    result = call.outputs[0]
    label = call.combine(call.label(it) for it in call.inputs if it.dim() == result.dim() and it.shape == result.shape)
    return [call.gather(label, range(result.dim() - num, result.dim()))] * len(call.outputs)


def _batch_norm(call: Call) -> list[_Label]:
    """All samples meet in the statistics; each row of the result is one sample's all the same."""
    result = call.outputs[0]
    return [call.combine(call.label(it) for it in call.inputs if it.shape == result.shape)]


def _last_two(call: Call) -> list[_Label]:
    """Linear algebra: batches of matrices."""
    labels = []
    for tensor in call.inputs:
        label = call.label(tensor)
        if label is not None and tensor.dim() >= 2:
            label = call.gather(label, [tensor.dim() - 1, tensor.dim() - 2])
            labels.append(None if label is None else label.reshape(label.shape[:-2]))
    label = call.combine(label for label in labels if label is not None)
    if label is None:
        return [_unknown(call)]
    return [label.reshape([*label.shape] + [1] * (it.dim() - label.dim())) for it in call.outputs]


def _nll(call: Call) -> list[_Label]:
    logits, target = call.args["self"], call.args["target"]
    label, targets = call.label(logits), call.label(target)
    if logits.dim() < 2:
        return [_unknown(call)]
    if call.name.endswith("backward"):
        return [call.combine([label, None if targets is None else targets.unsqueeze(1)])]
    label = reduced(label, [1])
    label = call.combine([None if label is None else label.squeeze(1), targets])
    if not call.outputs[0].dim():
        label = reduced(label, range(logits.dim() - 1))
        return [None if label is None else label.reshape(())] * 2
    return [label, _unknown(call)]


def _ctc(call: Call) -> list[_Label]:
    scores, targets = call.args["log_probs"], call.args["targets"]
    label = reduced(call.label(scores), [0, 2])
    if call.name.endswith("backward"):
        return [label]
    of_targets = reduced(call.label(targets), [1]) if targets.dim() > 1 else None
    both = [None if label is None else label.reshape(-1), None if of_targets is None else of_targets.reshape(-1)]
    return [call.combine(both)]


def _embedding(call: Call) -> list[_Label]:
    label = call.label(call.args["indices"])
    return [None if label is None else label.unsqueeze(-1)]


def _recurrent(call: Call) -> list[_Label]:
    """A whole layer over time, [time, samples, features]."""
    tensor = call.inputs[0]
    label = call.gather(call.label(tensor), [0, 2])
    return [label] * len(call.outputs)


def _picked(call: Call) -> list[_Label]:
    """Sorted, or the largest: the second result says from where."""
    label = call.label(call.args["self"])
    dim = _dims(call, call.outputs[0].dim())[-1] if call.args.get("dim") is not None else call.outputs[0].dim() - 1
    if label is not None and label.shape[dim] > 1:
        index = call.outputs[1].cpu()
        shape = [
            length if index == dim else own for index, (length, own) in enumerate(zip(label.shape, index.shape, strict=True))
        ]
        label = compressed(label.expand(shape).gather(dim, index))
    return [label, label]


def _added(call: Call) -> list[_Label]:
    """Elements that are summed into the places that an index says."""
    whole = call.args["self"]
    if whole.numel() > _MAX_ELEMENTS:
        return [_unknown(call)]
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
            return [_unknown(call)]
    values = call.full(source).expand(places.shape).flatten().to(torch.int32)
    high = call.full(whole).flatten().clone()
    low = torch.where(high == NONE, torch.iinfo(torch.int32).max, high)
    flat = places.flatten()
    high = high.scatter_reduce(0, flat, values, "amax")
    low = low.scatter_reduce(0, flat, torch.where(values == NONE, torch.iinfo(torch.int32).max, values), "amin")
    return [compressed(merged(low, high).reshape(whole.shape))]


def _scattered(call: Call) -> list[_Label]:
    """Values of another tensor, or a number, which an index puts in its places."""
    if "src" in call.args:
        return _moved(("self", "src"))(call)
    index = reduced(call.label(call.args["index"]), _dims(call, call.outputs[0].dim()))
    return [call.combine([call.label(call.args["self"]), index])]


def _none(call: Call) -> list[_Label]:
    return [None] * len(call.outputs)


def _copied(call: Call) -> list[_Label]:
    source = call.args["src"]
    return _aligned([call.label(source)], call.outputs[0].dim())


def _named(rule: Callable[[Call], list[_Label]], names: str) -> dict[str, Callable[[Call], list[_Label]]]:
    return dict.fromkeys(names.split(), rule)


_RULES: dict[str, Callable[[Call], list[_Label]]] = {
    **_named(_none, "zeros_like ones_like full_like empty_like rand_like randn_like randint_like bernoulli new_zeros "
                    "new_ones new_full new_empty zero fill uniform normal random exponential"),
    **_named(_copied, "copy"),
    **_named(_elementwise, "_to_copy clone contiguous native_dropout native_dropout_backward threshold_backward "
                           "masked_fill where lift_fresh lift_fresh_copy alias _thnn_fused_lstm_cell"),
    **_named(_loss, "mse_loss huber_loss smooth_l1_loss binary_cross_entropy binary_cross_entropy_with_logits "
                    "soft_margin_loss mse_loss_backward huber_loss_backward smooth_l1_loss_backward "
                    "binary_cross_entropy_backward soft_margin_loss_backward"),
    **_named(_along, "_softmax _log_softmax _safe_softmax _softmax_backward_data _log_softmax_backward_data cumsum cumprod "
                     "_logcumsumexp logcumsumexp cummax cummin"),
    **_named(_gathered, "var_mean std_mean norm linalg_vector_norm logsumexp nansum"),
    **_named(_product, "mm bmm addmm baddbmm mv dot addmv _cdist_forward"),
    **_named(_layer_norm, "native_layer_norm native_layer_norm_backward _fused_rms_norm"),
    **_named(_batch_norm, "native_batch_norm _native_batch_norm_legit native_batch_norm_backward cudnn_batch_norm "
                          "_native_batch_norm_legit_no_training _batch_norm_with_update batch_norm_backward"),
    **_named(_nll, "nll_loss_forward nll_loss2d_forward nll_loss_backward nll_loss2d_backward"),
    **_named(_ctc, "_ctc_loss _ctc_loss_backward"),
    **_named(_embedding, "embedding"),
    **_named(_recurrent, "mkldnn_rnn_layer mkldnn_rnn_layer_backward"),
    **_named(_picked, "sort topk"),
    **_named(_added, "index_add scatter_add scatter_reduce index_put _index_put_impl _unsafe_index_put"),
    **_named(_moved(("tensors",)), "cat stack _foreach_clone"),
    **_named(_moved(("self",)), "index index_select gather take masked_select flip roll repeat constant_pad_nd tril triu "
                                "rot90 _unsafe_index unsafe_split "
                                "unsafe_split_with_sizes unsafe_chunk"),
    **_named(_reshaped, "view _unsafe_view _reshape_alias _reshape_copy"),
    **_named(_moved(("grad_output",)), "slice_backward select_backward diagonal_backward"),
    **_named(_moved(("self", "src")), "slice_scatter select_scatter"),
    **_named(_scattered, "scatter"),
    **_named(_moved(("self", "source")), "index_copy masked_scatter"),
    **_named(_moved(("input",)), "_pack_padded_sequence"),
    **_named(_moved(("data",)), "_pad_packed_sequence"),
}  # fmt: skip
"""By name; what is not here is told by its schema, if at all."""

_BY_PART: tuple[tuple[str, Callable[[Call], list[_Label]]], ...] = (
    ("scaled_dot_product", _first),
    ("convolution", _first),
    ("conv", _first),
    ("pool", _first),
    ("upsample", _first),
    ("grid_sampler", _first),
    ("group_norm", _first),
    ("reflection_pad", _first),
    ("replication_pad", _first),
    ("im2col", _first),
    ("col2im", _first),
    ("linalg_", _last_two),
    ("cholesky", _last_two),
    ("triangular_solve", _last_two),
)
"""By what is in the name, looked through in order."""
