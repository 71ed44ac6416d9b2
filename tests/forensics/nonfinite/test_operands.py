"""What an alert says of values: the operand at fault, its value and its index, and nothing that was not there."""

from __future__ import annotations

import math
import re

import pytest
import torch
from lightning.pytorch import LightningModule
from lines import alert_of, fit, line_of, outcome, tensors
from torch.utils.checkpoint import checkpoint

from lightning_gradguard.forensics.nonfinite.operands import operands_of
from lightning_gradguard.forensics.tensors import Range

ROW = [[1.0, 2.0], [3.0, 4.0]]
LINES = [
    # written in place
    ("(x * 1).log_()", {"x": [[1.0, 0.0]]}, "`log_`", "got 0 at [0, 1]"),
    ("(x * 1).div_(y)", {"x": ROW, "y": [[1.0], [0.0]]}, "`div_`", "divided 3 by 0 at [1, 0]"),
    ("(x * 1).pow_(-1)", {"x": [1.0, 0.0]}, "`pow_`", "raised 0 at [1] to the power -1"),
    # one of two operands
    ("x / n", {"x": [1.0, 5.0], "n": [2, 0]}, "`div`", "divided 5 by 0 at [1]"),
    ("x / y", {"x": ROW, "y": [1.0, 0.0]}, "`div`", "divided 2 by 0 at [1]"),
    ("x / y", {"x": [1.0, 1e35], "y": [1.0, 1e-5]}, "`div`", "divided 1e+35 by 1e-05 at [1]"),
    ("x * y", {"x": [1.0, 3e38], "y": [1.0, -2e20]}, "`mul`", "multiplied 3e+38 at [1] by -2e+20 at [1]"),
    ("x - y", {"x": [3e38, 1.0], "y": [-3e38, 1.0]}, "`sub`", "subtracted -3e+38 at [0] from 3e+38 at [0]"),
    ("torch.mm(x, w)", {"x": [[2e25, 1.0]], "w": [[3e25], [0.0]]}, "`mm`", "3e+25 at [0, 0] of `mat2`"),
    ("F.mse_loss(x, y)", {"x": [[1e25, 1.0]], "y": [[1.0, 2.0]]}, "`mse_loss`", "1e+25 at [0, 0] of `self`"),
    (
        "torch.special.xlog1py(x, y)",
        {"x": [1.0, 1.0], "y": [1.0, -1.0]},
        "`special_xlog1py`",
        "gave Inf for finite inputs",
    ),
    # in the backward pass, of the forward pass
    ("torch.where(m, torch.exp(x), 0.0)", {"x": [1.0, 800.0], "m": [True, False]}, "exp", "overflowed at 800 at [1]"),
    ("torch.exp(-torch.exp(x))", {"x": [1.0, 800.0]}, "exp", "overflowed at 800 at [1]"),
    ("torch.where(m, x / y, 0.0)", {"x": [1.0, 3.0], "y": [1.0, 0.0], "m": [True, False]}, "Div", "a divisor of 0 at [1]"),
    ("torch.pow(x, y)", {"x": [1.0, -2.0], "y": [1.0, 2.0]}, "`PowBackward1`", "by its exponent at a base of -2 at [1]"),
    # what is the pole, and what is not
    ("torch.lgamma(x)", {"x": [1.0, -1.0]}, "`lgamma`", "got -1 at [1]; it has a pole there"),
    ("torch.lgamma(x)", {"x": [1.0, 1e38]}, "`lgamma`", "gave Inf for finite inputs"),
    ("torch.pow(x, 3)", {"x": [1e-20, 1e13]}, "`pow`", "raised 1e+13 at [1] to the power 3"),
    ("torch.pow(x, -9)", {"x": [0.0, 1.0]}, "`pow`", "raised 0 at [0] to the power -9"),
    ("x / 0.0", {"x": [1.0, 5.0]}, "`div`", "divided 1 by 0"),
    ("x * torch.nan", {"x": [1.0]}, "`mul`", "works with NaN or Inf that is written in the code"),
    ("(x - torch.inf) - (x - torch.inf)", {"x": [1.0]}, "`sub`", "took the difference of two infinities"),
    ("torch.tan(x * torch.inf)", {"x": [1.0]}, "`tan`", "made NaN of Inf"),
    ("x[:0].std()", {"x": [1.0, 2.0]}, "`std`", "gave NaN for finite inputs"),
    # not in the list
    ("torch.polygamma(1, x)", {"x": [1.0, 0.0]}, "`polygamma`", "gave Inf for finite inputs"),
    ("torch.special.erfcx(x)", {"x": [1.0, -20.0]}, "`special_erfcx`", "gave Inf for finite inputs"),
    ("torch.linalg.qr(x)[0]", {"x": [[1.0, 1.0], [1.0, 1.0]]}, "`LinalgQrBackward0`", "gave NaN for finite inputs"),
]
WITHOUT_REMEDY = (
    *(
        "gave",
        "works with",
        "made NaN",
        "took the difference",
        "divided 1 by 0",
        "divided 1e+35",
        "got -1 at",
        "to the power -9",
    ),
    *("by its exponent", "multiplied", "subtracted", "`mat2`"),
)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("code", "inputs", "op", "said"), LINES, ids=lambda value: value if isinstance(value, str) else "")
def test_values_in_an_alert_are_those_that_were_there(code, inputs, op, said, tmp_path):
    """Operand, value and index; and a remedy only where one is known to work."""
    inputs = tensors(inputs, torch.float32)
    alert = alert_of(line_of(tmp_path, code, inputs), inputs)
    assert op in alert.message
    assert said in alert.message
    assert bool(alert.remedy) != any(text in said for text in WITHOUT_REMEDY)


MASKED = [
    ("torch.log(x)", 0.0),
    ("torch.log1p(x)", -1.0),
    ("torch.sqrt(x)", -1.0),
    ("torch.rsqrt(x)", 0.0),
    ("torch.exp(x)", 800.0),
    ("torch.acos(x)", 2.0),
    ("torch.atanh(x)", 1.0),
    ("torch.logit(x)", 0.0),
    ("torch.pow(x, -1)", 0.0),
    ("torch.reciprocal(x)", 0.0),
    ("torch.lgamma(x)", 0.0),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("code", "value"), MASKED)
def test_remedy_holds_in_a_branch_that_is_masked_afterwards(code, value, tmp_path):
    """The result of `where` is finite, and the gradient is not, until the branch itself is safe."""
    inputs = tensors({"x": [0.5, value], "m": [True, False]}, torch.float32)
    masked = "torch.where(m, {}, 0.0)"
    line = line_of(tmp_path, masked.format(code), inputs)
    assert outcome(line, inputs)[0].isfinite().all()
    alert = alert_of(line, inputs)
    assert f"{value:g} at [1]" in alert.message
    (safe,) = re.findall(r"`([^`]+)`\.", alert.remedy)
    assert all(values.isfinite().all() for values in outcome(line_of(tmp_path, masked.format(safe), inputs), inputs))


class Checkpointed(LightningModule):
    """A root of zero in a part that is run once more in the backward pass."""

    def __init__(self, use_reentrant):
        super().__init__()
        self.use_reentrant = use_reentrant
        self.net = torch.nn.Linear(2, 2, bias=False)

    def training_step(self, batch, batch_idx):
        return checkpoint(torch.sqrt, self.net(batch).square(), use_reentrant=self.use_reentrant).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_value_in_a_checkpoint_is_known_although_it_is_given_out_once(use_reentrant):
    """By what the derivative divides by."""
    (alert,) = fit(Checkpointed(use_reentrant), torch.tensor([[1.0, 2.0], [0.0, 0.0]])).alerts
    assert "was differentiated at 0 at [1, 0], where its slope is infinite" in alert.message
    assert alert.remedy == "Keep the input above 0: `torch.sqrt(x.clamp_min(1e-12))`."


def test_operands_that_do_not_correspond_have_no_value():
    """But a range, and a largest value with its place."""
    result = torch.tensor([1.0, math.nan])
    (operand,) = operands_of([("x", torch.tensor([[1.0, -5.0, 2.0]]))], result)
    assert operand.at is None
    assert (operand.peak.value, operand.peak.index) == (-5.0, (0, 1))
    assert operand.span == Range(-5.0, 2.0)


@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_operands_without_real_values_are_left_out():
    """Complex, boolean, on the meta device, compressed; text and flags; an empty one has a size of 0."""
    result = torch.tensor([math.inf])
    values = [
        torch.zeros(1, dtype=torch.complex64),
        torch.zeros(1, dtype=torch.bool),
        torch.zeros(1, device="meta"),
        torch.eye(2).to_sparse_csr(),
        "mean",
        True,
        None,
        torch.zeros(0),
    ]
    (operand,) = operands_of([(str(index), value) for index, value in enumerate(values)], result)
    assert operand.size == 0


@pytest.mark.parametrize(
    ("dim", "index", "line"),
    [(1, (1,), Range(3.0, 4.0)), ([1], (1,), Range(3.0, 4.0)), ([0, 1], (1,), None), (0, (1,), Range(2.0, 4.0))],
)
def test_line_of_a_reduction_goes_through_the_damaged_element(dim, index, line):
    """Along its dimension; of several dimensions there is none."""
    result = torch.zeros(2)
    result[index] = math.nan
    found = {operand.name: operand for operand in operands_of([("self", torch.tensor(ROW)), ("dim", dim)], result)}
    assert found["self"].line == line


def test_line_that_does_not_correspond_to_the_result_is_not_known():
    """As where the result is longer than what went in."""
    result = torch.tensor([0.0, 0.0, math.nan])
    found = {operand.name: operand for operand in operands_of([("self", torch.tensor(ROW)), ("dim", 1)], result)}
    assert found["self"].line is None


def test_complex_result_has_no_damaged_element():
    """Its parts are looked at as real numbers elsewhere."""
    (operand,) = operands_of([("self", torch.ones(1))], torch.tensor([complex(math.nan, 0.0)]))
    assert operand.at is None


def test_expanded_result_is_not_walked_over():
    """It repeats itself, for longer than anybody can wait."""
    result = torch.tensor([math.inf]).expand(10**12)
    (operand,) = operands_of([("self", torch.ones(1))], result)
    assert operand.at.value == 1.0
