"""Writes docs/known_failures.md from the list in `lightning_gradguard/forensics/nonfinite/known_failures.py`.

python docs/known_failures_table.py
"""

from __future__ import annotations

from pathlib import Path

import torch

from lightning_gradguard.forensics.nonfinite.failure import KnownFailure
from lightning_gradguard.forensics.nonfinite.known_failures import KNOWN_FAILURES
from lightning_gradguard.forensics.nonfinite.numbers import numbers_of, written

PAGE = Path(__file__).with_name("known_failures.md")
HEAD = """# Known failures

Written by `docs/known_failures_table.py` from the list in the package; do not edit.

What operators make NaN and infinity of, what an alert says then (with the values that were there, and the index of the first
damaged element), and what helps. `test_remedies.py` applies each change, as the alert prints it, to a line
that fails: afterwards result and gradients are finite, and values that were in order stay as they are, or within the small
number that the change adds (with bfloat16, within its precision). A failure without such a change has no remedy, here or in
an alert. What else fails on the same line is told with its own.

`x`, `y` and `w` are what the line works on, `f` is the function, `m` is a mask, `t` holds targets, `p` is the exponent,
and `bound` is the largest base, or exponent, whose power is well inside the type: the alert says the number.
"""
NUMBERS = """
## The numbers
What helps in float32 may vanish in float16 (`1 - 1e-6` is 1 there), so the numbers fit the type of the result; where a step
uses half precision anywhere, those that take the place of an edge fit that.
"""
MEANINGS = {
    "eps": "distance to the edge of a domain",
    "small": "in place of 0 as a divisor or under a logarithm",
    "tiny": "in place of 0 under a root",
    "mask": "in place of minus infinity in a mask",
    "limit": "largest exponent of e",
    "limit2": "largest exponent of 2",
    "square": "largest number to square",
}
SAFE = """
## Not in the list
These were looked at with torch 2.13 on a CPU, at the places where one would expect NaN, and gave none, forward or backward
(`test_remedies.py` runs them; `z` is all zeros, and `one` all ones): {safe}.

These raise an error instead: {raises}. `prod`, `cumprod`, sums and products beyond the largest number of float32 have no
remedy that always works: the alert names the largest value that went in, and where it stands.
"""
SAFE_CODE = (
    "torch.atan2(z, z)",
    "z.norm()",
    "torch.cdist(z, z)",
    "F.cosine_similarity(z, z)",
    "F.normalize(z)",
    "one.std(0)",
    "F.batch_norm(one, None, None, training=True)",
    "F.layer_norm(one, (2,))",
    "F.group_norm(one, 1)",
    "F.instance_norm(one[None])",
    "z.prod()",
    "z.cumprod(0)",
    "F.binary_cross_entropy(z, one.detach())",
    "F.binary_cross_entropy_with_logits(1e30 * one, z)",
    "F.scaled_dot_product_attention(one, one, one, attn_mask=z > 0)",
    "F.scaled_dot_product_attention(one, one, one, attn_mask=z.detach() - torch.inf)",
    "torch.linalg.lstsq(one, one)[0]",
    "torch.linalg.svdvals(one)",
    "F.grid_sample(one[None, None], 1e30 * one[None, None])",
)
"""`z` is all zeros and `one` all ones, 2 x 2."""
RAISING_CODE = (
    "F.embedding(torch.tensor([2]), one)",
    "F.binary_cross_entropy(1.1 * one, z)",
    "F.batch_norm(one, None, None, training=True, eps=0.0)",
    "torch.linalg.inv(one)",
    "torch.linalg.solve(one, one)",
    "torch.linalg.cholesky(z)",
)


def main() -> None:
    """Write the page."""
    PAGE.write_text(page(), encoding="utf-8")


def page() -> str:
    """All of it."""
    rows = [row for failure in KNOWN_FAILURES for row in _rows(failure)]
    table = ["| failure | operators | the alert says | instead of | write |", "|---" * 5 + "|", *rows]
    safe, raises = (", ".join(f"`{code}`" for code in codes) for codes in (SAFE_CODE, RAISING_CODE))
    return "\n".join([HEAD, *table, NUMBERS, *_numbers(), SAFE.format(safe=safe, raises=raises)])


def _rows(failure: KnownFailure) -> list[str]:
    first = f"| {failure.name} | {' '.join(f'`{op}`' for op in sorted(failure.ops))} | {_said(failure.happened)} "
    if not failure.fixes:
        return [f"{first}| | no remedy |"]
    codes = [f"| `{_shown(fix.before)}` | {fix.advice}: `{_shown(fix.after)}` |" for fix in failure.fixes]
    return [(first if index == 0 else "| | | ") + code for index, code in enumerate(codes)]


def _said(happened: str) -> str:
    for operand in ("self", "other", "result", "exponent"):
        happened = happened.replace(f"{{{operand}}}", f"*{operand}*").replace(f"{{{operand}:value}}", f"*{operand}*")
    return happened.format(max="*limit*", dtype="*type*", largest="; the largest value that went in: *value* of *operand*")


def _shown(template: str) -> str:
    """With the numbers of float32; the function stays open, as it is one of several."""
    words = {name: written(value) for name, value in numbers_of(torch.float32).items()}
    for name, text in (words | {"op": "f", "exponent": "p", "bound": "bound", "base": "w", "top": "bound"}).items():
        template = template.replace(f"{{{name}}}", text)
    return template


def _numbers() -> list[str]:
    dtypes = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    lines = ["| | " + " | ".join(str(dtype).removeprefix("torch.") for dtype in dtypes) + " |", "|---" * 5 + "|"]
    for name, what in MEANINGS.items():
        lines.append(f"| {what} | " + " | ".join(written(numbers_of(dtype)[name]) for dtype in dtypes) + " |")
    return lines


if __name__ == "__main__":
    main()
