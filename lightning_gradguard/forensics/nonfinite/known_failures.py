"""The list of known failures: what operators make NaN and infinity of, and what helps.

A remedy is a promise: `test_remedies.py` applies each of them to a line that fails. What has none that holds
has none here. `docs/known_failures.md` is made from this list by `docs/known_failures_table.py`.
"""

from __future__ import annotations

from lightning_gradguard.forensics.nonfinite import conditions as when
from lightning_gradguard.forensics.nonfinite.failure import Fix, KnownFailure


def _ops(text: str) -> frozenset[str]:
    return frozenset(text.split())


_DIVISOR = "torch.where(y.abs() < {small}, {small}, y)"
_TIES = "1e-3 * torch.eye(*x.shape[-2:]).to(x) * torch.arange(1, x.shape[-1] + 1).to(x)"
_MATMUL = "addmm mm bmm baddbmm linear matmul addmv mv dot"
_NLL = _ops("nll_loss_forward nll_loss nll_loss2d_forward")

_ROOT = Fix("Keep the input above 0", "torch.sqrt(x)", "torch.sqrt(x.clamp_min({tiny}))")
_BASE = Fix("Keep the base above 0", "torch.pow(x, {exponent})", "torch.pow(x.clamp_min({small}), {exponent})")
_FLOAT16 = "with torch.autocast(x.device.type, torch.float16): out = x @ w"
_BFLOAT16 = Fix("Use bfloat16, whose range is that of float32", _FLOAT16, _FLOAT16.replace("float16", "bfloat16"))

KNOWN_FAILURES: tuple[KnownFailure, ...] = (
    KnownFailure(
        "float16 overflow of a product", _ops(_MATMUL), (when.half, when.forward, when.fresh),
        "went beyond {max}, the largest number of {dtype}{largest}",
        (_BFLOAT16,
         Fix("Or compute this part in float32", _FLOAT16,
             "with torch.autocast(x.device.type, enabled=False): out = x.float() @ w.float()")),
    ),
    KnownFailure(
        "float16 overflow in the backward pass", _ops(f"{_MATMUL} convolution"), (when.half, when.backward, when.fresh),
        "went beyond {max}, the largest number of {dtype}, in the backward pass", (_BFLOAT16,),
    ),
    KnownFailure(
        "logarithm of 0 or less", _ops("log log2 log10"), (when.at_most("self", 0),), "got {self}",
        (Fix("Keep the input above 0", "torch.{op}(x)", "torch.{op}(x.clamp_min({small}))"),),
    ),
    KnownFailure(
        "log1p of -1 or less", _ops("log1p log1_p"), (when.at_most("self", -1),), "got {self}",
        (Fix("Keep the input above -1", "torch.log1p(x)", "torch.log1p(x.clamp_min(-1 + {eps}))"),),
    ),
    KnownFailure(
        "xlogy of 0 or less", _ops("xlogy special_xlogy"), (when.at_most("other", 0),),
        "took the logarithm of {other}",
        (Fix("Keep the logarithm's argument above 0", "torch.xlogy(x, y)", "torch.xlogy(x, y.clamp_min({small}))"),
         Fix("Keep the target above 0", "F.kl_div(x, y)", "F.kl_div(x, y.clamp_min({small}))",
             within="kl_div")),
    ),
    KnownFailure(
        "root of a negative number", _ops("sqrt"), (when.forward, when.below("self", 0)), "got {self}", (_ROOT,),
    ),
    KnownFailure(
        "root, differentiated at 0", _ops("sqrt"), (when.backward, when.zero("result")),
        "was differentiated at {result}, where its slope is infinite", (_ROOT,),
    ),
    KnownFailure(
        "inverse root of 0 or less", _ops("rsqrt"), (when.forward, when.at_most("self", 0)), "got {self}",
        (Fix("Keep the input above 0", "torch.rsqrt(x)", "torch.rsqrt(x.clamp_min({small}))"),
         Fix("Give it an eps", "F.rms_norm(x, x.shape[-1:], eps=0.0)", "F.rms_norm(x, x.shape[-1:], eps=1e-6)",
             within="rms_norm")),
    ),
    KnownFailure(
        "outside (-1, 1)", _ops("acos asin atanh erfinv special_erfinv"), (when.outside("self", -1, 1),),
        "got {self}, which is not inside (-1, 1)",
        (Fix("Keep the input inside", "torch.{op}(x)", "torch.{op}(x.clamp(-1 + {eps}, 1 - {eps}))"),),
    ),
    KnownFailure(
        "1 or below", _ops("acosh"), (when.at_most("self", 1),), "got {self}, which is not above 1",
        (Fix("Keep the input above 1", "torch.acosh(x)", "torch.acosh(x.clamp_min(1 + {eps}))"),),
    ),
    KnownFailure(
        "outside (0, 1)", _ops("logit special_logit special_ndtri"), (when.outside("self", 0, 1),),
        "got {self}, which is not inside (0, 1)",
        (Fix("Keep the input inside", "torch.{op}(x)", "torch.{op}(x.clamp({eps}, 1 - {eps}))"),),
    ),
    KnownFailure(
        "0 to a negative power", _ops("pow"),
        (when.near_zero("self"), when.below("exponent", 0), when.power_fits),
        "raised {self} to the power {exponent}",
        (Fix("Keep the base away from 0", "torch.pow(x, {exponent})",
             "torch.pow(torch.where(x.abs() < {small}, {small}, x), {exponent})"),),
    ),
    KnownFailure(
        "broken power of a negative number", _ops("pow"),
        (when.forward, when.below("self", 0), when.broken("exponent"), when.power_fits),
        "raised {self} to the power {exponent}", (_BASE,),
    ),
    KnownFailure(
        "power below 1, differentiated at 0", _ops("pow"),
        (when.backward, when.zero("self"), when.between("exponent", 0, 1)),
        "was differentiated at {self}: the slope of the power {exponent} is infinite there", (_BASE,),
    ),
    KnownFailure(
        "power beyond the largest number", _ops("pow"),
        (when.forward, when.fresh, when.is_inf, when.is_tensor("self"), when.power_overflows),
        "raised {self} to the power {exponent}",
        (Fix("Bound the base", "torch.pow(x, {exponent})", "torch.pow(x.clamp(-{bound}, {bound}), {exponent})"),),
    ),
    KnownFailure(
        "exponent beyond the largest number", _ops("pow"),
        (when.forward, when.fresh, when.is_inf, when.exponent_overflows), "raised {self} to the power {exponent}",
        (Fix("Bound the exponent", "torch.pow({base}, x)", "torch.pow({base}, x.clamp_max({top}))"),),
    ),
    KnownFailure(
        "power, differentiated by its exponent", _ops("pow"),
        (when.backward, when.below("self", 0), when.is_tensor("exponent")),
        "was differentiated by its exponent at a base of {self}",
    ),
    KnownFailure(
        "power", _ops("pow"), (when.forward, when.known("self"), when.known("exponent")),
        "raised {self} to the power {exponent}",
    ),
    KnownFailure(
        "division by 0", _ops("div true_divide"),
        (when.forward, when.known("self"), when.near_zero("other"), when.is_tensor("other"), when.quotient_fits),
        "divided {self:value} by {other}",
        (Fix("Keep the divisor away from 0", "x / y", f"x / {_DIVISOR}"),
         Fix("Leave its eps in place", "F.normalize(x, eps=0.0)", "F.normalize(x)", within="normalize"),
         Fix("Leave its eps in place", "F.cosine_similarity(x, w, eps=0.0)", "F.cosine_similarity(x, w)",
             within="cosine_similarity")),
    ),
    KnownFailure(
        "division", _ops("div true_divide"), (when.forward, when.known("self"), when.known("other")),
        "divided {self:value} by {other}",
    ),
    KnownFailure(
        "division by 0, differentiated", _ops("div true_divide"),
        (when.backward, when.near_zero("other"), when.is_tensor("other")),
        "was differentiated at a divisor of {other}",
        (Fix("Keep the divisor away from 0", "torch.where(m, x / y, 0.0)", f"torch.where(m, x / {_DIVISOR}, 0.0)"),),
    ),
    KnownFailure(
        "reciprocal of 0", _ops("reciprocal"), (when.forward, when.near_zero("self")), "got {self}",
        (Fix("Keep the input away from 0", "torch.reciprocal(x)",
             "torch.reciprocal(torch.where(x.abs() < {small}, {small}, x))"),),
    ),
    KnownFailure(
        "remainder of a division by 0", _ops("remainder fmod"), (when.near_zero("other"), when.is_tensor("other")),
        "divided by {other}",
        (Fix("Keep the divisor away from 0", "torch.{op}(x, y)", f"torch.{{op}}(x, {_DIVISOR})"),),
    ),
    KnownFailure(
        "gamma function at 0", _ops("lgamma digamma special_gammaln special_digamma special_psi"),
        (when.near_zero("self"),), "got {self}; it has a pole at 0",
        (Fix("Keep the input away from 0", "torch.{op}(x)", "torch.{op}(torch.where(x.abs() < {eps}, {eps}, x))"),),
    ),
    KnownFailure(
        "gamma function at a negative integer", _ops("lgamma digamma special_gammaln special_digamma special_psi"),
        (when.below("self", 0), when.whole_number("self")), "got {self}; it has a pole there",
    ),
    KnownFailure(
        "hypotenuse of 0, differentiated", _ops("hypot"),
        (when.backward, when.near_zero("self"), when.near_zero("other")),
        "was differentiated at {self:value} and {other}",
        (Fix("Keep one of the two away from 0", "torch.hypot(x, y)",
             "torch.hypot(x, torch.where(x.abs() + y.abs() < {small}, {small}, y))"),),
    ),
    KnownFailure(
        "norm beyond the largest number on the way", _ops("linalg_vector_norm"),
        (when.forward, when.fresh, when.is_inf, when.at_least("ord", 1), when.norm_fits),
        "went beyond {max}, the largest number of {dtype}{largest}",
        (Fix("Sum the powers in float64", "torch.linalg.vector_norm(x, ord, dim)",
             "torch.linalg.vector_norm(x.double(), ord, dim).to(x.dtype)"),),
    ),
    KnownFailure(
        "distance beyond the largest number on the way", _ops("cdist_forward"),
        (when.forward, when.fresh, when.is_inf, when.at_least("p", 1), when.norm_fits),
        "went beyond {max}, the largest number of {dtype}{largest}",
        (Fix("Sum the powers in float64", "torch.cdist(x, y, p)", "torch.cdist(x.double(), y.double(), p).to(x.dtype)"),),
    ),
    KnownFailure(
        "deviation of a single value", _ops("std var"),
        (when.forward, when.fresh, when.is_nan, when.single),
        "had a single value, of which there is no deviation",
        (Fix("Correct the count only where there are several", "torch.{op}(x, dim)",
             "torch.{op}(x, dim, correction=min(1, x.shape[dim] - 1)).clamp_min({small})"),),
    ),
    KnownFailure(
        "mean of nothing", _ops("mean"), (when.forward, when.empty("self")),
        "averaged over nothing",
        (Fix("Divide by a count of at least 1", "x.mean()", "x.sum() / max(x.numel(), 1)"),),
    ),
    KnownFailure(
        "loss over nothing", _ops("mse_loss smooth_l1_loss huber_loss binary_cross_entropy"),
        (when.forward, when.empty("self")), "averaged over nothing",
        (Fix("Divide by a count of at least 1", "F.{op}(x, y)", "F.{op}(x, y, reduction='sum') / max(x.numel(), 1)"),),
    ),
    KnownFailure(
        "softmax of a masked row", _ops("softmax safe_softmax log_softmax logsumexp logcumsumexp"),
        (when.forward, when.masked_row("self")),
        "summed over nothing but -Inf",
        (Fix("Mask with a large finite number", "torch.{op}(x.masked_fill(m, -torch.inf), dim)",
             "torch.{op}(x.masked_fill(m, {mask}), dim)"),
         Fix("Or open the mask where it covers all",
             "torch.{op}(x.masked_fill(m, -torch.inf), dim)",
             "torch.{op}(x.masked_fill(m & ~m.all(dim, keepdim=True), -torch.inf), dim)"),
         Fix("Open the mask where it covers all, as for `key_padding_mask`", "attention(x, x, x, key_padding_mask=m)[0]",
             "attention(x, x, x, key_padding_mask=m & ~m.all(-1, keepdim=True))[0]", "multi_head_attention_forward")),
    ),
    KnownFailure(
        "no target left", _NLL, (when.forward, when.fresh, when.no_target),
        "had no target left: all of them are `ignore_index`",
        (Fix("Divide by a count of at least 1", "F.cross_entropy(x, t)",
             "F.cross_entropy(x, t, reduction='sum') / (t != -100).sum().clamp_min(1)"),),
    ),
    KnownFailure(
        "target of probability 0", _NLL, (when.forward, when.is_inf, when.has_minus_inf("self")),
        "has a target whose log-probability is -Inf",
        (Fix("Mask with a large finite number", "F.cross_entropy(x.masked_fill(m, -torch.inf), t)",
             "F.cross_entropy(x.masked_fill(m, {mask}), t)"),),
    ),
    KnownFailure(
        "target differentiated at a prediction of 0 or 1", _ops("binary_cross_entropy"),
        (when.backward, when.outside("self", 0, 1)), "was differentiated by its target at a prediction of {self}",
        (Fix("Keep the prediction inside", "F.binary_cross_entropy(x, y)",
             "F.binary_cross_entropy(x.clamp({eps}, 1 - {eps}), y)"),),
    ),
    KnownFailure(
        "logit of -Inf", _ops("binary_cross_entropy_with_logits"), (when.forward, when.has_minus_inf("self")),
        "got a logit of -Inf",
        (Fix("Mask with a large finite number", "F.binary_cross_entropy_with_logits(x.masked_fill(m, -torch.inf), y)",
             "F.binary_cross_entropy_with_logits(x.masked_fill(m, {mask}), y)"),),
    ),
    KnownFailure(
        "CTC without an alignment", _ops("ctc_loss cudnn_ctc_loss"), (when.forward, when.fresh, when.is_inf),
        "got a target that is too long for its input",
        (Fix("Let such losses count as 0", "F.ctc_loss(x.log_softmax(-1), t, n, k)",
             "F.ctc_loss(x.log_softmax(-1), t, n, k, zero_infinity=True)"),),
    ),
    KnownFailure(
        "exponential beyond the largest number", _ops("exp expm1 exp2"), (when.forward, when.is_inf, when.beyond_limit),
        "overflowed at {self}", (Fix("Bound the exponent", "torch.{op}(x)", "torch.{op}(x.clamp_max({limit}))"),),
    ),
    KnownFailure(
        "hyperbolic function beyond the largest number", _ops("sinh cosh"), (when.forward, when.is_inf, when.beyond_limit),
        "overflowed at {self}", (Fix("Bound the input", "torch.{op}(x)", "torch.{op}(x.clamp(-{limit}, {limit}))"),),
    ),
    KnownFailure(
        "normalisation without eps", _ops("native_layer_norm"), (when.forward, when.fresh, when.no_variance),
        "had a row of variance 0, and an eps of 0",
        (Fix("Give it an eps", "F.layer_norm(x, x.shape[-1:], eps=0.0)", "F.layer_norm(x, x.shape[-1:], eps=1e-5)"),),
    ),
    KnownFailure(
        "group normalisation without eps", _ops("native_group_norm"), (when.forward, when.fresh, when.no_variance),
        "had a group of variance 0, and an eps of 0",
        (Fix("Give it an eps", "F.group_norm(x, 1, eps=0.0)", "F.group_norm(x, 1, eps=1e-5)"),),
    ),
    KnownFailure(
        "batch normalisation without eps", _ops("native_batch_norm"),
        (when.forward, when.fresh, when.zero_eps, when.holds_zero("running_var")),
        "divided by a running variance of 0, with an eps of 0",
        (Fix("Give it an eps", "F.batch_norm(x, w, y, eps=0.0)", "F.batch_norm(x, w, y, eps=1e-5)"),),
    ),
    KnownFailure(
        "squared error beyond the largest number", _ops("mse_loss"), (when.forward, when.fresh, when.is_inf, when.wide),
        "went beyond {max}, the largest number of {dtype}{largest}",
        (Fix("Bound both", "F.mse_loss(x, y)", "F.mse_loss(x.clamp(-{square}, {square}), y.clamp(-{square}, {square}))"),),
    ),
    KnownFailure(
        "equal singular values, differentiated", _ops("linalg_svd"), (when.backward, when.ties("S")),
        "has equal singular values, and the vectors have no derivative there",
        (Fix("Part them", "torch.linalg.svd(x).U", f"torch.linalg.svd(x + {_TIES}).U"),),
    ),
    KnownFailure(
        "equal eigenvalues, differentiated", _ops("linalg_eigh"), (when.backward, when.ties("eigenvalues")),
        "has equal eigenvalues, and the vectors have no derivative there",
        (Fix("Part them", "torch.linalg.eigh(x)[1]", f"torch.linalg.eigh(x + {_TIES})[1]"),),
    ),
    KnownFailure(
        "determinant of 0", _ops("linalg_slogdet"), (when.forward, when.fresh, when.is_inf),
        "got a matrix whose determinant is 0",
        (Fix("Add to its diagonal", "torch.linalg.slogdet(x)[1]",
             "torch.linalg.slogdet(x + 1e-3 * torch.eye(x.shape[-1]).to(x))[1]"),),
    ),
    KnownFailure(
        "inverse of a matrix without full rank", _ops("linalg_inv_ex"), (when.forward, when.fresh),
        "found no inverse of its matrix",
        (Fix("Add to its diagonal", "torch.linalg.inv_ex(x)[0]",
             "torch.linalg.inv_ex(x + 1e-3 * torch.eye(x.shape[-1]).to(x))[0]"),),
    ),
    KnownFailure(
        "0 times infinity", _ops("mul"),
        (when.forward, when.is_nan, when.zero_times_infinity), "multiplied {self} by {other}",
        (Fix("Mask before, by selection", "x * m", "torch.where(m != 0, x, 0.0) * m"),),
    ),
    KnownFailure(
        "difference of infinities", _ops("sub add"),
        (when.forward, when.is_nan, when.infinite("self"), when.infinite("other")), "took the difference of two infinities",
    ),
    KnownFailure(
        "product beyond the largest number", _ops("mul"),
        (when.forward, when.fresh, when.is_inf, when.known("self"), when.known("other")), "multiplied {self} by {other}",
    ),
    KnownFailure(
        "difference beyond the largest number", _ops("sub"),
        (when.forward, when.fresh, when.is_inf, when.known("self"), when.known("other")), "subtracted {other} from {self}",
    ),
    KnownFailure(
        "cast beyond the largest number of float16", _ops("to_copy"), (when.half, when.forward, when.fresh, when.is_inf),
        "went beyond {max}, the largest number of {dtype}{largest}",
        (Fix("Use bfloat16, whose range is that of float32", "x.half()", "x.bfloat16()"),),
    ),
    KnownFailure(
        "beyond the largest number",
        _ops(f"{_MATMUL} convolution mkldnn_convolution add sub mul div sum mean square mse_loss prod cumprod cumsum norm "
             "linalg_vector_norm cdist_forward hypot var native_layer_norm native_group_norm to_copy lerp addcmul "
             "binary_cross_entropy_with_logits linalg_cross scaled_dot_product_flash_attention_for_cpu"),
        (when.forward, when.fresh, when.overflows), "went beyond {max}, the largest number of {dtype}{largest}",
    ),
)  # fmt: skip
"""Looked through in order; the first that fits is taken."""
