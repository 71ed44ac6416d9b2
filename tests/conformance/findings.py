"""What the tests look at: one dictionary of plain values for each cell, from all of its ranks."""

from __future__ import annotations

import json
import traceback
import warnings
from pathlib import Path
from typing import Any

import torch
from cells import CELLS, Cell
from filelock import FileLock
from ranks import on_ranks
from torch import Tensor
from training import BAD_STEP, MAX_NORM, NUM_STEPS, Run, train

from lightning_gradguard import GradGuard


def findings_of(group: str, folder: Path) -> dict[str, list[dict[str, Any]]]:
    """The findings of all cells of a group, by cell, one for each rank; made once for all workers of a test run."""
    path = folder / f"{group}.json"
    with FileLock(path.with_suffix(".lock")):
        if not path.exists():
            of_ranks = [look_at_all(group)] if group.startswith("single") else on_ranks(2, look_at_all, group)
            path.write_text(json.dumps(of_ranks))
    of_ranks = json.loads(path.read_text())
    return {name: [found[name] for found in of_ranks] for name in of_ranks[0]}


def look_at_all(group: str) -> dict[str, dict[str, Any]]:
    """The findings of this rank, by cell."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the guard warns of every NaN; here they are counted
        return {str(cell): _look_at(cell) for cell in CELLS if cell.group == group}


def _look_at(cell: Cell) -> dict[str, Any]:
    try:
        return _compare(cell)
    except Exception:  # noqa: BLE001  # it is the finding, and the other cells go on
        return {"error": traceback.format_exc()}


def _compare(cell: Cell) -> dict[str, Any]:
    plain = train(cell)
    healthy_norms: list[float] = []
    healthy = train(cell, guard=_guard(healthy_norms))
    by_hand = train(cell, clip_by_hand=True)
    clipping = _guard(clip=MAX_NORM)
    clipped = train(cell, guard=clipping)
    skipping = _guard()
    skipped = train(cell, guard=skipping, inject=True)
    left_out = train(cell, leave_out=True)
    stopping = _guard(nonfinite="stop")
    stopped = train(cell, guard=stopping, spoil=True)
    raising = _guard(nonfinite="raise")
    raised = train(cell, guard=raising, spoil=True)
    num_optimizers = len(plain.weights)
    bad_decision = (BAD_STEP + 1) * num_optimizers - 1
    return {
        "healthy": {
            "weights_equal": _same(healthy.weights, plain.weights),
            "state_equal": _same(healthy.state, plain.state),
            "num_steps": healthy.guard.num_steps,
            "expected_steps": NUM_STEPS * num_optimizers,
            "num_alerts": len(healthy.guard.alerts),
        },
        "clip": {
            "equal": _same(clipped.weights, by_hand.weights),
            "moved": not _same(clipped.weights, plain.weights),
            "error": _error(clipped.weights, by_hand.weights),
            "first_error": _error(clipped.first_gradients, by_hand.first_gradients) if by_hand.first_gradients else None,
            "num_clipped": clipping.num_clipped,
        },
        "nan": {
            "weights_equal": _same(skipped.weights, left_out.weights),
            "state_equal": _same(skipped.state, left_out.state),
            "differs_from_plain": not _same(skipped.weights, plain.weights),
            "num_skipped": skipping.num_skipped,
            "unchanged_steps": _unchanged_steps(skipped),
        },
        "stop": {
            "weights_equal": _same(stopped.weights[-1], plain.before_step[BAD_STEP][-1]),
            "num_steps": stopping.num_steps,
            "stopped_at": stopping.stopped_by and stopping.stopped_by.step,
            "expected": bad_decision,
        },
        "raise": {
            "weights_equal": _same(raised.weights[-1], plain.before_step[BAD_STEP][-1]),
            "raised_at": raised.error and raised.error.alert.step,
            "expected": bad_decision,
        },
        "norms": {"guard": healthy_norms, "by_hand": list(plain.norms.values())},
    }


def _guard(norms: list[float] | None = None, **settings: Any) -> GradGuard:
    sinks = [] if norms is None else [lambda record: norms.append(record.measurement.global_norm)]
    return GradGuard(sinks=sinks, **settings)


def _unchanged_steps(run: Run) -> list[int]:
    """The steps that did not move the weights of the optimizer that is tampered with."""
    weights = [before[-1] for before in run.before_step] + [run.weights[-1]]
    return [step for step in range(len(weights) - 1) if _same(weights[step], weights[step + 1])]


def _same(left: Any, right: Any) -> bool:
    if isinstance(left, Tensor):
        return torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(_same(value, right[key]) for key, value in left.items())
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(_same(*pair) for pair in zip(left, right, strict=True))
    return bool(left == right)


def _error(left: list[list[Tensor]], right: list[list[Tensor]]) -> float:
    """Distance relative to length, over all weights of this rank."""
    a, b = (torch.cat([tensor.double().flatten() for net in nets for tensor in net]) for nets in (left, right))
    return float((a - b).norm() / b.norm())
