"""What operators are known to trip over, and what to do about it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from lightning_gradguard.forensics.nonfinite.provenance import Provenance
from lightning_gradguard.forensics.tensors import Range


@dataclass(frozen=True)
class KnownFailure:
    """One way to make NaN or infinity.

    Attributes:
        ops: aten operators and autograd nodes, without leading and trailing underscores and without "Backward0", in lower
            case.
        happened: what it did, in the past tense, as in "`log` in `head` got 0"; may hold `{value}`, the input at fault.
        remedy: what to try.
        fits: whether it is this known_failure, beside the operator's name.
    """

    ops: frozenset[str]
    happened: str
    remedy: str
    fits: Callable[[Provenance], bool] = lambda provenance: True  # noqa: ARG005


def _ops(text: str) -> frozenset[str]:
    return frozenset(text.split())


def _backward(provenance: Provenance) -> bool:
    return provenance.is_backward


def _forward(provenance: Provenance) -> bool:
    return not provenance.is_backward


def _turned(provenance: Provenance) -> bool:
    return bool(provenance.parents) and not provenance.is_backward


def _is_half(provenance: Provenance) -> bool:
    return provenance.dtype is torch.float16


def _masked_branch(provenance: Provenance) -> bool:
    return provenance.is_backward and any(not parent.is_backward for parent in provenance.parents)


def _at_zero(index: int) -> Callable[[Provenance], bool]:
    def fits(provenance: Provenance) -> bool:
        span = provenance.at_fault[index] if index < len(provenance.at_fault) else None
        return span is not None and span.low == span.high == 0.0

    return fits


def _below(limit: float) -> Callable[[Provenance], bool]:
    def fits(provenance: Provenance) -> bool:
        return any(span is not None and span.high < limit for span in provenance.at_fault[:1])

    return fits


_MATMUL = "addmm mm bmm baddbmm linear matmul convolution addmv dot mv einsum"

TRAPS: tuple[KnownFailure, ...] = (
    KnownFailure(
        _ops("exp expm1 log1p log sqrt div pow mul reciprocal acos asin norm linalg_vector_norm rsqrt softmax log_softmax"),
        "multiplied a gradient of zero with NaN or Inf of the forward pass, in a branch that was masked there",
        "Masking the result is too late: its gradient is 0 * Inf = NaN. Make the input safe first, as in "
        "`safe = torch.where(ok, x, 1.0)`, compute on `safe`, then mask.",
        _masked_branch,
    ),
    KnownFailure(
        _ops(_MATMUL),
        "went beyond 65,504, the largest number of float16, in the backward pass",
        "Lower the loss scale (a GradScaler does it by itself), or use bfloat16.",
        lambda provenance: _is_half(provenance) and _backward(provenance),
    ),
    KnownFailure(
        _ops(f"{_MATMUL} to_copy add mul sum pow exp div native_layer_norm bernoulli"),
        "went beyond 65,504, the largest number of float16",
        "Use bfloat16, or compute this part in float32: `with torch.autocast(device, enabled=False)`. Smaller weights or a "
        "normalisation before it help as well.",
        lambda provenance: _is_half(provenance) and _forward(provenance),
    ),
    KnownFailure(
        _ops("log log2 log10 log1p xlogy special_xlogy"),
        "got {value}",
        "Keep its input away from zero, as in `torch.log(x.clamp_min(1e-8))`; for probabilities take `log_softmax` or "
        "`F.logsigmoid` of the logits instead of the log of a softmax or sigmoid.",
    ),
    KnownFailure(
        _ops("sqrt rsqrt"),
        "got {value}, where its derivative is infinite",
        "Add a small number inside the root: `torch.sqrt(x + 1e-12)`.",
        _backward,
    ),
    KnownFailure(
        _ops("sqrt rsqrt"),
        "got {value}",
        "Clamp its input to be positive: `torch.sqrt(x.clamp_min(1e-12))`.",
    ),
    KnownFailure(
        _ops("norm linalg_vector_norm cdist euclidean_dist std var cosine_similarity"),
        "was differentiated at zero, where the slope of a norm has no limit",
        "Add a small number inside the root, as in `(x.square().sum(1) + 1e-12).sqrt()`; a deviation needs more than one "
        "sample that differ.",
        _backward,
    ),
    KnownFailure(
        _ops("std var std_mean var_mean"),
        "had a single sample, of which there is no deviation",
        "Pass `correction=0`, or leave groups of one sample out.",
    ),
    KnownFailure(
        _ops("acos asin acosh atanh erfinv logit"),
        "got {value}, the edge of its domain, where its derivative is infinite",
        "Clamp its input to the inside: `x.clamp(-1 + 1e-6, 1 - 1e-6)`; for angles take `torch.atan2`.",
        _backward,
    ),
    KnownFailure(
        _ops("acos asin acosh atanh erfinv logit"),
        "got {value}, which is outside its domain",
        "Clamp its input: `x.clamp(-1 + 1e-6, 1 - 1e-6)`.",
    ),
    KnownFailure(
        _ops("softmax safe_softmax log_softmax scaled_dot_product_flash_attention_for_cpu scaled_dot_product_attention "
             "scaled_dot_product_efficient_attention scaled_dot_product_flash_attention logsumexp"),
        "got a row in which everything is masked",
        "Leave one position of each row open, or zero the result of such rows: mask with a large finite number, as "
        "`torch.finfo(x.dtype).min`, rather than with -inf.",
        _turned,
    ),
    KnownFailure(
        _ops("div reciprocal true_divide"),
        "divided 0 by 0",
        "An empty count or a deviation of zero: `x / n.clamp_min(1)` for counts, `x / (s + eps)` for the rest. If the "
        "result is masked, make the divisor safe before dividing.",
        lambda provenance: _at_zero(0)(provenance) and _at_zero(1)(provenance),
    ),
    KnownFailure(
        _ops("div reciprocal true_divide"),
        "divided by 0",
        "Add a small number to the divisor, or clamp it: `x / y.clamp_min(1e-8)`.",
        lambda provenance: _at_zero(1)(provenance) or len(provenance.at_fault) == 1,
    ),
    KnownFailure(
        _ops("exp expm1 sinh cosh exp2"),
        "overflowed at {value}",
        "Keep its input below 88 in float32 (11 in float16): subtract the maximum first, or take `logsumexp`, `softplus` or "
        "`log_softmax`, which do so.",
        _forward,
    ),
    KnownFailure(
        _ops("nll_loss_forward nll_loss nll_loss2d_forward cross_entropy nll_loss_nd"),
        "had no target left: all of them are `ignore_index`",
        "Skip batches without targets, or sum the losses and divide by `count.clamp_min(1)`.",
        lambda provenance: not provenance.parents,
    ),
    KnownFailure(
        _ops("nll_loss_forward nll_loss nll_loss2d_forward cross_entropy nll_loss_nd"),
        "has a target whose logit is masked with -inf",
        "Don't mask the class of a target, or mask with a large finite number.",
    ),
    KnownFailure(
        _ops("ctc_loss cudnn_ctc_loss"),
        "got a target that does not fit into its input",
        "Pass `zero_infinity=True`, or drop samples whose target (with a blank between repeated labels) is longer than "
        "their input.",
    ),
    KnownFailure(
        _ops("binary_cross_entropy"),
        "got a prediction of exactly 0 or 1",
        "Take `F.binary_cross_entropy_with_logits` on the logits.",
    ),
    KnownFailure(
        _ops("pow"),
        "was differentiated at {value}",
        "A power below 1 has an infinite slope at zero: add a small number to its input.",
        _backward,
    ),
    KnownFailure(
        _ops("mul"),
        "multiplied 0 by Inf",
        "Where a factor may be infinite, a mask of zeros can't remove it: use `torch.where`, or keep it finite.",
        lambda provenance: _turned(provenance) and provenance.flaw.has_nan,
    ),
    KnownFailure(
        _ops("sub add"),
        "subtracted Inf from Inf",
        "Keep both finite: clamp them, or mask with a large finite number instead of infinity.",
        lambda provenance: _turned(provenance) and provenance.flaw.has_nan,
    ),
    KnownFailure(
        _ops("mean"),
        "averaged over nothing",
        "The selection is empty: skip it, or divide a sum by `count.clamp_min(1)`.",
        lambda provenance: any("[0" in text or ", 0" in text for text in provenance.inputs),
    ),
    KnownFailure(
        _ops(f"{_MATMUL} pow mul sum mse_loss mse square prod cumprod cumsum add div huber_loss smooth_l1_loss"),
        "went beyond the largest number of its type, from inputs of {span}",
        "Look at where such large values come from: the batch's scale, the initialisation, a recurrence without "
        "normalisation. Normalise the inputs, or lower the learning rate.",
        lambda provenance: not provenance.parents and provenance.flaw.has_inf,
    ),
)  # fmt: skip
"""Looked through in order; the first that fits is taken."""

OTHER = KnownFailure(
    frozenset(),
    "made it out of finite inputs",
    "Look at the inputs named here: they are finite, and the result is not.",
)


def known_failure_of(provenance: Provenance) -> KnownFailure:
    """The known failure that an operator fell into."""
    key = key_of(provenance)
    return next(
        (known_failure for known_failure in TRAPS if key in known_failure.ops and known_failure.fits(provenance)), OTHER
    )


def key_of(provenance: Provenance) -> str:
    """The operator's name without what differs between its variants."""
    if not provenance.is_backward or provenance.is_hook:
        return provenance.op.strip("_").lower()
    name = provenance.node.partition("Backward")[0]
    return "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in name).strip("_")


def fault_of(provenance: Provenance) -> Range | None:
    """Range of the input at fault; in a backward pass that is not the gradient, which comes first."""
    spans = [span for span in provenance.at_fault if span is not None]
    return (spans[-1] if provenance.is_backward else spans[0]) if spans else None
