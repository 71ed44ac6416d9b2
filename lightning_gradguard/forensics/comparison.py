"""Whether gradients are those of a replay."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

TOLERANCE = 1e-5
"""Relative error up to which gradients count as the same: non-deterministic kernels sum in varying order."""


def compare_gradients(replayed: Mapping[int, Tensor], parameters: Sequence[Tensor]) -> tuple[bool, float | None]:
    """Whether a replay gave the gradients that parameters have, and the relative error of the finite elements.

    (False, None) where there are no gradients any more.

    Args:
        replayed: gradients by the identity of their parameters.
        parameters: with the gradients of the step itself.
    """
    pairs = [(it.grad, replayed.get(id(it))) for it in parameters if it.grad is not None]
    if not pairs:
        return False, None
    difference = total = 0.0
    is_alike = True
    for there, again in pairs:
        if again is None or again.shape != there.shape:
            return False, None
        left, right = _values(there), _values(again)
        is_alike &= bool((left.isfinite() == right.isfinite()).all())
        both = left.isfinite() & right.isfinite()
        difference += float((left - right)[both].abs().double().square().sum())
        total += float(left[both].abs().double().square().sum())
    error = 0.0 if not difference else float((difference / total) ** 0.5) if total else float("inf")
    return is_alike and error <= TOLERANCE, error


def _values(grad: Tensor) -> Tensor:
    grad = getattr(grad, "_local_tensor", grad)
    return grad.to_dense() if grad.is_sparse else grad
