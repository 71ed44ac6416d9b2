"""How each kind of operator passes the labels of its inputs on: which sample the elements of its results belong to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_gradguard.forensics.nonfinite.row_call import Call, Label, aligned, dims_of, unknown_of
from lightning_gradguard.forensics.nonfinite.row_labels import (
    combined,
    reduced,
    unknown,
)
from lightning_gradguard.forensics.nonfinite.row_moves import (
    added,
    copied,
    is_in_place,
    moved,
    none,
    picked,
    reshaped,
    scattered,
)


def labels_of(call: Call) -> list[Label]:
    """The labels of an operator's results, one each."""
    rule = _RULES.get(call.name) or next((rule for part, rule in _BY_PART if part in call.name), None)
    if rule is None:
        rule = _kind_of(call)
    found = rule(call)
    if len(found) < len(call.outputs):
        found = [*found, *[unknown_of(call)] * (len(call.outputs) - len(found))]
    return [_fitted(label, output) for label, output in zip(found, call.outputs, strict=False)]


def _fitted(label: Label, output: Tensor) -> Label:
    """Results such as a mean beside a normalised tensor have other shapes."""
    if label is None:
        return None
    fits = label.dim() == output.dim() and all(a in (1, b) for a, b in zip(label.shape, output.shape, strict=True))
    return label if fits else unknown(output)


def _kind_of(call: Call) -> Callable[[Call], list[Label]]:
    if call.func.is_view:
        return moved(("self",))
    if _is_pointwise(call.func):
        return _elementwise
    return lambda call: [unknown_of(call)]


def _is_pointwise(func: Any) -> bool:
    packet = func.overloadpacket
    if is_in_place(func):
        packet = getattr(torch.ops.aten, packet.__name__.rstrip("_"), packet)
    return any(torch.Tag.pointwise in getattr(packet, name).tags for name in packet.overloads())


def _elementwise(call: Call) -> list[Label]:
    call.is_elementwise = True
    result = call.outputs[0]
    labels = [call.label(it) for it in call.inputs if it.dim() <= result.dim()]
    return [call.combine(aligned(labels, result.dim()))] * len(call.outputs)


def _loss(call: Call) -> list[Label]:
    """Of predictions and targets of one shape: element by element, or all of them to one number."""
    call.is_elementwise = True
    inputs = [call.args[name] for name in call.args if isinstance(call.args[name], Tensor)]
    num_dims = max(it.dim() for it in inputs)
    label = combined(aligned([call.label(it) for it in inputs], num_dims))[0]
    if call.outputs[0].dim() == num_dims:
        return [label]
    gathered = reduced(label, range(num_dims))
    return [None if gathered is None else gathered.reshape(())]


def _gathered(call: Call) -> list[Label]:
    """A sum, a norm, a maximum: over one dimension, several, or all."""
    tensor = call.inputs[0]
    label = call.label(tensor)
    if label is None or not tensor.dim():
        return [label] * len(call.outputs)
    dims = dims_of(call, tensor.dim())
    label = reduced(label, dims)
    if label is not None and call.outputs[0].dim() < tensor.dim():
        label = label.reshape([length for dim, length in enumerate(label.shape) if dim not in dims])
    return [label] * len(call.outputs)


def _along(call: Call) -> list[Label]:
    """A softmax, a cumulated sum: all elements along a dimension meet, and the shape stays."""
    result = call.outputs[0]
    if not result.dim():
        return _elementwise(call)
    label = call.combine(aligned([call.label(it) for it in call.inputs if it.dim() == result.dim()], result.dim()))
    return [call.gather(label, dims_of(call, result.dim()))] * len(call.outputs)


def _product(call: Call) -> list[Label]:
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
    return [call.combine(aligned([first, second, bias], max(num_dims, call.outputs[0].dim())))]


def _first(call: Call) -> list[Label]:
    """Convolutions, attention, pooling: the first dimension stays, in all others elements meet."""
    labels = []
    for tensor in call.inputs:
        label = call.label(tensor)
        if label is not None and tensor.dim():
            label = call.gather(label, range(1, tensor.dim()))
            labels.append(None if label is None else label.reshape(-1))
    label = call.combine(label for label in labels if label is not None)
    return [None if label is None or not it.dim() else label.reshape([-1] + [1] * (it.dim() - 1)) for it in call.outputs]


def _layer_norm(call: Call) -> list[Label]:
    num = len(call.args["normalized_shape"])
    result = call.outputs[0]
    label = call.combine(call.label(it) for it in call.inputs if it.dim() == result.dim() and it.shape == result.shape)
    return [call.gather(label, range(result.dim() - num, result.dim()))] * len(call.outputs)


def _batch_norm(call: Call) -> list[Label]:
    """All samples meet in the statistics; each row of the result is one sample's all the same."""
    result = call.outputs[0]
    return [call.combine(call.label(it) for it in call.inputs if it.shape == result.shape)]


def _last_two(call: Call) -> list[Label]:
    """Linear algebra: batches of matrices."""
    labels = []
    for tensor in call.inputs:
        label = call.label(tensor)
        if label is not None and tensor.dim() >= 2:
            label = call.gather(label, [tensor.dim() - 1, tensor.dim() - 2])
            labels.append(None if label is None else label.reshape(label.shape[:-2]))
    label = call.combine(label for label in labels if label is not None)
    if label is None:
        return [unknown_of(call)]
    return [label.reshape([*label.shape] + [1] * (it.dim() - label.dim())) for it in call.outputs]


def _nll(call: Call) -> list[Label]:
    logits, target = call.args["self"], call.args["target"]
    label, targets = call.label(logits), call.label(target)
    if logits.dim() < 2:
        return [unknown_of(call)]
    if call.name.endswith("backward"):
        return [call.combine([label, None if targets is None else targets.unsqueeze(1)])]
    label = reduced(label, [1])
    label = call.combine([None if label is None else label.squeeze(1), targets])
    if not call.outputs[0].dim():
        label = reduced(label, range(logits.dim() - 1))
        return [None if label is None else label.reshape(())] * 2
    return [label, unknown_of(call)]


def _ctc(call: Call) -> list[Label]:
    scores, targets = call.args["log_probs"], call.args["targets"]
    label = reduced(call.label(scores), [0, 2])
    if call.name.endswith("backward"):
        return [label]
    of_targets = reduced(call.label(targets), [1]) if targets.dim() > 1 else None
    both = [None if label is None else label.reshape(-1), None if of_targets is None else of_targets.reshape(-1)]
    return [call.combine(both)]


def _embedding(call: Call) -> list[Label]:
    label = call.label(call.args["indices"])
    return [None if label is None else label.unsqueeze(-1)]


def _recurrent(call: Call) -> list[Label]:
    """A whole layer over time, [time, samples, features]."""
    tensor = call.inputs[0]
    label = call.gather(call.label(tensor), [0, 2])
    return [label] * len(call.outputs)


def _named(rule: Callable[[Call], list[Label]], names: str) -> dict[str, Callable[[Call], list[Label]]]:
    return dict.fromkeys(names.split(), rule)


_RULES: dict[str, Callable[[Call], list[Label]]] = {
    **_named(none, "zeros_like ones_like full_like empty_like rand_like randn_like randint_like bernoulli new_zeros "
                    "new_ones new_full new_empty zero fill uniform normal random exponential"),
    **_named(copied, "copy"),
    **_named(_elementwise, "_to_copy clone contiguous native_dropout native_dropout_backward threshold_backward "
                           "masked_fill where lift_fresh lift_fresh_copy alias _thnn_fused_lstm_cell"),
    **_named(_loss, "mse_loss huber_loss smooth_l1_loss binary_cross_entropy binary_cross_entropy_with_logits "
                    "soft_margin_loss mse_loss_backward huber_loss_backward smooth_l1_loss_backward "
                    "binary_cross_entropy_backward soft_margin_loss_backward"),
    **_named(_along, "_softmax _log_softmax _safe_softmax _softmax_backward_data _log_softmax_backward_data cumsum cumprod "
                     "_logcumsumexp logcumsumexp cummax cummin"),
    # Not by `torch.Tag.reduction`, which older versions of torch don't have.
    **_named(_gathered, "sum nansum mean prod any all max min amax amin aminmax argmax argmin count_nonzero norm "
                        "linalg_vector_norm logsumexp std var std_mean var_mean"),
    **_named(_product, "mm bmm addmm baddbmm mv dot addmv _cdist_forward"),
    **_named(_layer_norm, "native_layer_norm native_layer_norm_backward _fused_rms_norm"),
    **_named(_batch_norm, "native_batch_norm _native_batch_norm_legit native_batch_norm_backward cudnn_batch_norm "
                          "_native_batch_norm_legit_no_training _batch_norm_with_update batch_norm_backward"),
    **_named(_nll, "nll_loss_forward nll_loss2d_forward nll_loss_backward nll_loss2d_backward"),
    **_named(_ctc, "_ctc_loss _ctc_loss_backward"),
    **_named(_embedding, "embedding"),
    **_named(_recurrent, "mkldnn_rnn_layer mkldnn_rnn_layer_backward"),
    **_named(picked, "sort topk"),
    **_named(added, "index_add scatter_add scatter_reduce index_put _index_put_impl _unsafe_index_put"),
    **_named(moved(("tensors",)), "cat stack _foreach_clone"),
    **_named(moved(("self",)), "index index_select gather take masked_select flip roll repeat constant_pad_nd tril triu "
                                "rot90 _unsafe_index unsafe_split "
                                "unsafe_split_with_sizes unsafe_chunk"),
    **_named(reshaped, "view _unsafe_view _reshape_alias _reshape_copy"),
    **_named(moved(("grad_output",)), "slice_backward select_backward diagonal_backward"),
    **_named(moved(("self", "src")), "slice_scatter select_scatter"),
    **_named(scattered, "scatter"),
    **_named(moved(("self", "source")), "index_copy masked_scatter"),
    **_named(moved(("input",)), "_pack_padded_sequence"),
}  # fmt: skip
"""By name; what is not here is told by its schema, if at all."""

_BY_PART: tuple[tuple[str, Callable[[Call], list[Label]]], ...] = (
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
