"""For each fix of the list of known failures: inputs on which the line fails, and what has to be said of them.

`x`, `y`, ... are what the line works on. `said` is a part of the message, written down before the first run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

INF = float("inf")
HALVES = (torch.float16, torch.bfloat16)
ALL = (torch.float32, torch.float64, *HALVES)


@dataclass(frozen=True)
class Example:
    """A line that fails.

    Attributes:
        failure: the known failure's name.
        fails: inputs on which it fails.
        healthy: inputs on which it does not.
        said: a part of the message.
        op: for a failure of several operators, this one.
        exponent, base: of a power.
        tolerance: relative, of healthy values and gradients; 0 where they stay as they are to the last bit.
        dtype: of the floating-point inputs.
        fixes: which of the failure's fixes are tried.
        setup: a line before it.
    """

    failure: str
    fails: dict[str, Any]
    healthy: dict[str, Any]
    said: str
    op: str = ""
    exponent: str = ""
    base: str = ""
    tolerance: float = 0.0
    dtype: torch.dtype = torch.float32
    fixes: tuple[int, ...] = (0,)
    setup: str = ""

    def __str__(self) -> str:
        kind = str(self.dtype).removeprefix("torch.")
        return "-".join(filter(None, (self.failure.replace(" ", "_"), self.op, self.exponent, kind)))


def _of_one(failure: str, ops: str, fails: list, healthy: list, said: str, *dtypes: torch.dtype) -> list[Example]:
    """Functions of `x` alone, in several types."""
    return [
        Example(failure, {"x": fails}, {"x": healthy}, said, op=op, dtype=dtype)
        for op in ops.split() or [""]
        for dtype in dtypes or (torch.float32,)
    ]


def _powers(failure: str, base: float, healthy: list, said: str, *exponents: str) -> list[Example]:
    return [
        Example(failure, {"x": [1.0, base]}, {"x": healthy}, said.format(exponent), exponent=exponent)
        for exponent in exponents
    ]


ROW, ONE_MASKED, NONE_MASKED, TIES, DISTINCT = (
    [[1.0, 2.0], [3.0, 4.0]],
    [[False, False], [True, True]],
    [[False, False], [False, False]],
    [[2.0, 0.0], [0.0, 2.0]],
    [[2.0, 0.5], [0.5, 1.0]],
)
CROSS = [[False, True], [True, False]]

DOMAINS = [
    *_of_one("logarithm of 0 or less", "log log2 log10", [[1.0, 0.0]], [[1.0, 0.5]], "got 0 at [0, 1]", *ALL),
    *_of_one("logarithm of 0 or less", "log", [[1.0, 2.0], [-3.0, 2.0]], [[1.0, 0.5]], "got -3 at [1, 0]"),
    *_of_one("log1p of -1 or less", "log1p", [[1.0, -1.0]], [[1.0, -0.5]], "got -1 at [0, 1]", *ALL),
    *_of_one("log1p of -1 or less", "log1p", [[-1.5, 1.0]], [[1.0, -0.5]], "got -1.5 at [0, 0]"),
    *_of_one("root of a negative number", "sqrt", [[1.0, -4.0]], [[1.0, 0.25]], "got -4 at [0, 1]", *ALL),
    *_of_one("root, differentiated at 0", "sqrt", [[1.0, 0.0]], [[1.0, 0.25]], "differentiated at 0 at [0, 1]", *ALL),
    *_of_one("inverse root of 0 or less", "rsqrt", [[1.0, 0.0]], [[1.0, 0.25]], "got 0 at [0, 1]", *ALL),
    *_of_one("inverse root of 0 or less", "rsqrt", [[1.0, -0.5]], [[1.0, 0.25]], "got -0.5 at [0, 1]"),
    *_of_one(
        "outside (-1, 1)",
        "acos asin atanh erfinv",
        [[0.5, 1.5]],
        [[0.5, -0.7]],
        "1.5 at [0, 1], which is not",
        *ALL,
    ),
    *_of_one("outside (-1, 1)", "atanh erfinv", [[0.5, -1.0]], [[0.5, -0.7]], "got -1 at [0, 1]", *ALL),
    *_of_one("outside (-1, 1)", "acos asin", [[0.5], [1.0]], [[0.5], [-0.7]], "Backward0` in `line`", *ALL),
    *_of_one("outside (-1, 1)", "acos asin", [[0.5], [-1.0]], [[0.5], [-0.7]], "got -1 at [1, 0]"),
    *_of_one("1 or below", "acosh", [[2.0, 0.5]], [[2.0, 1.5]], "got 0.5 at [0, 1]", *ALL),
    *_of_one("1 or below", "acosh", [[2.0, 1.0]], [[2.0, 1.5]], "got 1 at [0, 1]", *ALL),
    *_of_one("outside (0, 1)", "logit special_ndtri", [[0.5, 1.0]], [[0.5, 0.25]], "got 1 at [0, 1]"),
    *_of_one("outside (0, 1)", "logit", [[0.5, 0.0]], [[0.5, 0.25]], "got 0 at [0, 1]", *ALL),
    *_of_one("reciprocal of 0", "", [[1.0, 0.0]], [[1.0, -0.5]], "got 0 at [0, 1]", *ALL),
    *_of_one("gamma function at 0", "lgamma digamma", [[1.0, 0.0]], [[1.0, -0.5]], "got 0 at [0, 1]", *ALL),
    *_powers("0 to a negative power", 0.0, [1.0, -2.0], "raised 0 at [1] to the power {}", "-1", "-2", "-3"),
    *_powers("0 to a negative power", 0.0, [1.0, 2.0], "raised 0 at [1] to the power {}", "-0.5", "-1.5"),
    *_powers("broken power of a negative number", -8.0, [1.0, 2.0], "raised -8 at [1] to the power {}", "0.3", "-0.5"),
    Example(
        "0 to a negative power",
        {"x": [1.0, 0.0], "y": [2.0, -1.0]},
        {"x": [1.0, 3.0], "y": [2.0, -2.0]},
        "raised 0 at [1] to the power -1 at [1]",
        exponent="y",
    ),
    Example(
        "broken power of a negative number",
        {"x": [1.0, -2.0], "y": [2.0, 0.5]},
        {"x": [1.0, 3.0], "y": [2.0, -0.5]},
        "raised -2 at [1] to the power 0.5 at [1]",
        exponent="y",
    ),
    *_powers("power below 1, differentiated at 0", 0.0, [1.0, 2.0], "at 0 at [1]: the slope of the power {}", "0.5", "0.25"),
]

OVERFLOWS = [
    *_powers("power beyond the largest number", 1e30, [1.0, -1.04], "raised 1e+30 at [1] to the power {}", "2", "3", "40"),
    Example("exponent beyond the largest number", {"x": [1.0, 200.0]}, {"x": [1.0, -0.5]},
            "raised 2 to the power 200 at [1]", base="2"),
    *_of_one("exponential beyond the largest number", "exp expm1 exp2", [[1.0, 800.0]], [[1.0, -0.5]],
             "overflowed at 800 at [0, 1]", torch.float32, *HALVES),
    *_of_one("hyperbolic function beyond the largest number", "sinh cosh", [[1.0, -800.0]], [[1.0, -0.5]],
             "overflowed at -800 at [0, 1]", torch.float32, *HALVES),
    *(Example("norm beyond the largest number on the way", {"x": [[1.0, -1e30]], "ord": ord_, "dim": 1},
              {"x": [[3.0, 4.0]], "ord": ord_, "dim": 1}, "the largest value that went in: -1e+30 at [0, 1] of `self`",
              tolerance=1e-6) for ord_ in (2, 3)),
    Example("distance beyond the largest number on the way", {"x": ROW, "y": [[1.0, 2e25]], "p": 2.0},
            {"x": ROW, "y": [[7.0, 7.0]], "p": 2.0}, "the largest value that went in: 2e+25 at [0, 1] of `x2`",
            tolerance=1e-6),
    Example("squared error beyond the largest number", {"x": ROW, "y": [[1.0, 2.0], [1.0, 3e38]]}, {"x": ROW, "y": ROW},
            "the largest value that went in: 3e+38 at [1, 1] of `target`"),
    Example("squared error beyond the largest number", {"x": [[1.0, 2.0], [-1e25, 4.0]], "y": ROW},
            {"x": ROW, "y": ROW},
            "the largest value that went in: -1e+25 at [1, 0] of `self`"),
    Example("float16 overflow of a product", {"x": [[300.0, 300.0]], "w": [[300.0, 1.0], [1.0, 1.0]]}, {"x": ROW, "w": ROW},
            "went beyond 65504, the largest number of float16; the largest value that went in: 300 at [0, 0] of `self`",
            fixes=(0, 1), tolerance=2e-2),
    Example("float16 overflow in the backward pass", {"x": [[1.0, 1.0]], "w": [[250.0, 250.0], [1.0, 1.0]]},
            {"x": [[1e-3, 1e-3]], "w": [[1e-3, 1e-3], [1.0, 1.0]]}, "largest number of float16, in the backward pass",
            tolerance=2e-2, setup="w = (w * 150.0).half().float()"),
    Example("cast beyond the largest number of float16", {"x": [[1.0, 7e4]]}, {"x": ROW},
            "went beyond 65504, the largest number of float16; the largest value that went in: 70000 at [0, 1] of `self`",
            tolerance=1e-2),
]  # fmt: skip

QUOTIENTS = [
    Example("division by 0", {"x": ROW, "y": [[1.0], [0.0]]}, {"x": ROW, "y": [[1.0], [-2.0]]}, "divided 3 by 0 at [1, 0]"),
    Example("division by 0", {"x": [0.0, 1.0], "y": [0.0, 1.0]}, {"x": [0.0, 1.0], "y": [3.0, -1.0]},
            "divided 0 by 0 at [0]"),
    *(Example("division by 0", {"x": [1.0], "y": [0.0]}, {"x": [3.0], "y": [-1.0]}, "divided 1 by 0 at [0]", dtype=dtype)
      for dtype in HALVES),
    *(Example("division by 0", {"x": [[1.0, 2.0], [0.0, 0.0]], "w": ROW}, {"x": ROW, "w": ROW}, "divided 0 by 0 at [1, 0]",
              fixes=(fix,), tolerance=1e-6) for fix in (1, 2)),
    Example("division by 0, differentiated", {"x": ROW, "y": [[1.0], [0.0]], "m": [[True], [False]]},
            {"x": ROW, "y": [[1.0], [-2.0]], "m": [[True], [True]]}, "was differentiated at a divisor of 0 at [1, 0]"),
    *(Example("remainder of a division by 0", {"x": [5.0, 5.0], "y": [3.0, 0.0]}, {"x": [5.0, 5.0], "y": [3.0, -2.0]},
              "divided by 0 at [1]", op=op) for op in ("remainder", "fmod")),
    Example("hypotenuse of 0, differentiated", {"x": [1.0, 0.0], "y": [1.0, 0.0]}, {"x": [3.0, 0.0], "y": [4.0, 2.0]},
            "was differentiated at 0 and 0 at [1]"),
    Example("0 times infinity", {"x": [1.0, 2.0], "m": [1.0, 0.0]}, {"x": [1.0, 2.0], "m": [1.0, 0.5]},
            "multiplied inf at [1] by 0 at [1]", setup="x = x.masked_fill(m == 0, torch.inf)"),
]  # fmt: skip

STATISTICS = [
    *(Example("deviation of a single value", {"x": x, "dim": dim}, {"x": ROW, "dim": dim}, "had a single value", op=op)
      for op in ("std", "var") for x, dim in (([[1.0, 2.0]], 0), ([[1.0], [2.0]], 1))),
    Example("mean of nothing", {"x": []}, {"x": ROW}, "averaged over nothing", tolerance=1e-6),
    *(
        Example(
            "loss over nothing", {"x": [], "y": []}, {"x": [0.5, 0.25], "y": [1.0, 0.0]}, "averaged over nothing", op=op,
            tolerance=1e-6,
        )
        for op in ("mse_loss", "smooth_l1_loss", "huber_loss", "binary_cross_entropy")
    ),
    Example("normalisation without eps", {"x": [[1.0, 2.0], [3.0, 3.0]]}, {"x": ROW},
            "had a row of variance 0, and an eps of 0", tolerance=1e-3),
    Example("group normalisation without eps", {"x": [[1.0, 2.0], [3.0, 3.0]]}, {"x": ROW},
            "had a group of variance 0, and an eps of 0", tolerance=1e-3),
    Example("batch normalisation without eps", {"x": ROW, "w": [0.0, 0.0], "y": [1.0, 0.0]},
            {"x": ROW, "w": [0.0, 0.0], "y": [1.0, 2.0]}, "divided by a running variance of 0, with an eps of 0",
            tolerance=1e-4, setup="w, y = w.detach(), y.detach()"),
    Example("inverse root of 0 or less", {"x": [[1.0, 2.0], [0.0, 0.0]]}, {"x": ROW}, "got 0 at [1, 0]", fixes=(1,),
            tolerance=1e-5),
    Example("equal singular values, differentiated", {"x": TIES}, {"x": DISTINCT}, "has equal singular values",
            tolerance=1e-2),
    Example("equal eigenvalues, differentiated", {"x": TIES}, {"x": DISTINCT}, "has equal eigenvalues", tolerance=1e-2),
    *(Example(failure, {"x": [[1.0, 1.0], [1.0, 1.0]]}, {"x": DISTINCT}, said, tolerance=1e-2)
      for failure, said in (("determinant of 0", "got a matrix whose determinant is 0"),
                            ("inverse of a matrix without full rank", "found no inverse of its matrix"))),
]  # fmt: skip

LOSSES = [
    *(Example("xlogy of 0 or less", {"x": [1.0, x], "y": [2.0, y]}, {"x": ROW[0], "y": ROW[1]},
              f"took the logarithm of {y:g} at [1]") for x, y in ((1.0, 0.0), (0.0, 0.0), (2.0, -1.0))),
    Example("xlogy of 0 or less", {"x": [-1.0, -2.0], "y": [1.0, 0.0]}, {"x": [-1.0, -2.0], "y": [0.5, 0.5]},
            "took the logarithm of 0 at [1]", fixes=(1,)),
    *(Example("softmax of a masked row", {"x": ROW, "m": ONE_MASKED, "dim": 1}, {"x": ROW, "m": NONE_MASKED, "dim": 1},
              "summed over nothing but -Inf", op=op, fixes=(0, 1))
      for op in ("softmax", "log_softmax", "logsumexp")),
    Example("softmax of a masked row", {"x": [ROW, ROW], "m": ONE_MASKED}, {"x": [ROW, ROW], "m": CROSS},
            "summed over nothing but -Inf", op="softmax", fixes=(2,),
            setup="torch.manual_seed(0); attention = torch.nn.MultiheadAttention(2, 1, batch_first=True)"),
    Example("no target left", {"x": ROW, "t": [-100, -100]}, {"x": ROW, "t": [1, -100]}, "all of them are `ignore_index`",
            tolerance=1e-6),
    Example("target of probability 0", {"x": ROW, "m": CROSS, "t": [1, 0]}, {"x": ROW, "m": CROSS, "t": [0, 1]},
            "has a target whose log-probability is -Inf"),
    Example("target differentiated at a prediction of 0 or 1", {"x": [0.5, 1.0], "y": [1.0, 0.5]},
            {"x": [0.5, 0.7], "y": [1.0, 0.5]}, "at a prediction of 1 at [1]"),
    Example("logit of -Inf", {"x": ROW, "m": CROSS, "y": [[0.0, 1.0], [1.0, 0.0]]},
            {"x": ROW, "m": NONE_MASKED, "y": [[0.0, 1.0], [1.0, 0.0]]}, "got a logit of -Inf"),
    Example("CTC without an alignment", {"x": [[[1.0, 2.0]]] * 4, "t": [[1, 1, 1, 1]], "n": [4], "k": [4]},
            {"x": [[[1.0, 2.0]]] * 4, "t": [[1, 1, 1, 1]], "n": [4], "k": [2]}, "a target that is too long for its input"),
]  # fmt: skip

EXAMPLES = DOMAINS + OVERFLOWS + QUOTIENTS + STATISTICS + LOSSES
