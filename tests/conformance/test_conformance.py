"""The matrix: precision x optimizer x loop x topology, five behaviours in each cell.

`docs/conformance_table.py` makes `docs/conformance.md` from the results of this file.
"""

from __future__ import annotations

import pytest
from cells import ALL_CELLS, REASONS, Cell, reason_against
from training import train

_CLIP_TOLERANCE = {"fp32": 1e-5, "fp64": 1e-7, "bf16-mixed": 1e-5, "bf16-true": 1e-2, "fp16": 1e-5}
"""Distance of the weights from those clipped by hand, relative to their length. Fused kernels divide by a float32 factor,
whatever the precision; ranks sum in another order; and Adam makes steps of full length out of gradients near 0."""

_FIRST_TOLERANCE = {"fp32": 1e-6, "bf16-mixed": 1e-6, "bf16-true": 1e-2}
"""The same of the clipped gradients at the first evaluation of LBFGS. It divides differences of gradients by each other, so
that a last bit grows some hundred thousand times (in fp64, to 1e-11), and weights can't be compared where ranks sum in
another order."""

_NORM_TOLERANCE = {"fp32": 1e-6, "fp64": 1e-12, "bf16-mixed": 1e-6, "bf16-true": 1e-6, "fp16": 1e-6}


def test_healthy_run_ends_with_the_weights_of_one_without_the_guard(found):
    """Bit for bit, the optimizers' state too; every step is counted and none alerted."""
    for rank in found:
        healthy = rank["healthy"]
        assert healthy["weights_equal"]
        assert healthy["state_equal"]
        assert healthy["num_steps"] == healthy["expected_steps"]
        assert healthy["num_alerts"] == 0


def test_clip_equals_torchs_clipping_by_hand(cell, found):
    """To the last bit in fp32 on one device with a kernel that does not clip itself, else within a tolerance."""
    exact = (cell.precision, cell.topology) == ("fp32", "single") and not cell.optimizer.endswith("fused")
    for rank in found:
        clip = rank["clip"]
        assert clip["moved"]
        assert clip["num_clipped"] > 0
        if cell.optimizer == "lbfgs" and cell.topology == "tp" and cell.precision != "fp64":
            assert clip["first_error"] <= _FIRST_TOLERANCE[cell.precision]
        else:
            assert clip["equal"] if exact else clip["error"] <= _CLIP_TOLERANCE[cell.precision]


def test_nan_on_one_rank_skips_exactly_that_step_on_all(found):
    """Weights and optimizer state end as in a run in which that step was never taken."""
    for rank in found:
        nan = rank["nan"]
        assert nan["num_skipped"] == 1
        assert nan["unchanged_steps"] == [1]
        assert nan["differs_from_plain"]
        assert nan["weights_equal"]
        assert nan["state_equal"]


def test_stop_ends_the_training_at_that_step_on_all_ranks(found):
    """With the weights from before it, even where one rank alone saw the fault."""
    for rank in found:
        stop = rank["stop"]
        assert stop["stopped_at"] == stop["expected"]
        assert stop["num_steps"] == stop["expected"] + 1
        assert stop["weights_equal"]


def test_raise_ends_the_training_at_that_step_on_all_ranks(found):
    """With the weights from before it, even where one rank alone saw the fault."""
    for rank in found:
        assert rank["raise"]["raised_at"] == rank["raise"]["expected"]
        assert rank["raise"]["weights_equal"]


def test_norms_equal_those_by_hand(cell, found):
    """The true norm over all ranks' whole gradients, unscaled, computed in float64 without the guard."""
    norms = found[0]["norms"]
    assert norms["guard"] == pytest.approx(norms["by_hand"], rel=_NORM_TOLERANCE[cell.precision])


def test_cells_that_can_not_exist_each_have_a_reason():
    """The table prints it; and no reason is left over."""
    assert {reason_against(cell) for cell in ALL_CELLS} - {None} == set(REASONS)


def test_lbfgs_under_a_scaler_is_refused_by_lightning():
    """The first of the reasons."""
    with pytest.raises(Exception, match="LBFGS"):
        train(Cell("fp16", "lbfgs", "automatic", "single"))
