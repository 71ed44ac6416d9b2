"""The axes of the matrix, and which of their combinations can't exist."""

from __future__ import annotations

import itertools
from typing import NamedTuple

PRECISIONS = ("fp32", "fp64", "bf16-mixed", "bf16-true", "fp16")
OPTIMIZERS = ("sgd_foreach", "sgd_forloop", "sgd_fused", "adamw_foreach", "adamw_forloop", "adamw_fused", "lbfgs")
LOOPS = ("automatic", "accumulation", "manual", "gan")
TOPOLOGIES = ("single", "ddp", "fsdp2", "tp", "fsdp1")


class Cell(NamedTuple):
    """One way to train."""

    precision: str
    optimizer: str
    loop: str
    topology: str

    def __str__(self) -> str:
        """Read by `docs/conformance_table.py` in the names of the tests."""
        return ":".join(self)

    @property
    def group(self) -> str:
        """The cells that are trained one after another in one process group: those of a topology, quick or slow."""
        return self.topology if self.is_quick else f"{self.topology}-slow"

    @property
    def is_quick(self) -> bool:
        """Whether it is tested by default.

        On one device every second one is, so that all pairs of axes meet. On many ranks every second pair of precision and
        loop is, each with the next optimizer: each precision and each loop meets each topology. The rest is slow.
        """
        if self.topology == "single":
            places = PRECISIONS.index(self.precision), OPTIMIZERS.index(self.optimizer), LOOPS.index(self.loop)
            return sum(places) % 2 == 0
        possible = [name for name in OPTIMIZERS if reason_against(self._replace(optimizer=name)) is None]
        turn = PRECISIONS.index(self.precision) + LOOPS.index(self.loop) + TOPOLOGIES.index(self.topology)
        return turn % 2 == 0 and self.optimizer == possible[(turn // 2 + PRECISIONS.index(self.precision)) % len(possible)]


REASONS = {
    "lbfgs-fp16": "Lightning refuses LBFGS under a GradScaler.",
    "lbfgs-accumulation": (
        "Lightning evaluates LBFGS's closure on the last micro-batch alone and adds each evaluation to the gradients of the "
        "one before, so that there is no right result to compare with."
    ),
    "fused-sgd-dtensor": "torch has no fused SGD for DTensors.",
    "lbfgs-fsdp2": "torch's LBFGS flattens each gradient, which DTensors refuse for shards of unequal size.",
    "lbfgs-fsdp1": "LBFGS takes the piece that a rank holds for the whole, so GradGuard refuses it where FSDP1 shards.",
    "fp64-fsdp1": "Lightning's FSDP1 strategy has no fp64.",
    "manual-fsdp1": (
        "Lightning calls `training_step` inside of FSDP1's forward pass, in which torch's FSDP1 takes no backward pass, so "
        "there is no manual optimization, guard or not."
    ),
}
"""Why a combination can't exist, by the name that `reason_against` gives it."""


def reason_against(cell: Cell) -> str | None:
    """Key of the reason why a cell can't exist; None if it can."""
    if cell.topology == "fsdp1" and (cell.precision == "fp64" or cell.loop in ("manual", "gan")):
        return "fp64-fsdp1" if cell.precision == "fp64" else "manual-fsdp1"
    if cell.optimizer == "sgd_fused" and cell.topology in ("fsdp2", "tp"):
        return "fused-sgd-dtensor"
    if cell.optimizer != "lbfgs":
        return None
    if cell.precision == "fp16":
        return "lbfgs-fp16"
    if cell.loop == "accumulation":
        return "lbfgs-accumulation"
    return f"lbfgs-{cell.topology}" if cell.topology in ("fsdp2", "fsdp1") else None


ALL_CELLS = [
    Cell(precision, optimizer, loop, topology)
    for topology, precision, optimizer, loop in itertools.product(TOPOLOGIES, PRECISIONS, OPTIMIZERS, LOOPS)
]
CELLS = [cell for cell in ALL_CELLS if reason_against(cell) is None]
