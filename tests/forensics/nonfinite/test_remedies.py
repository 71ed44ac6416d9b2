"""A remedy is a promise: each is applied, as it is printed, to a line that fails."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule
from lines import alert_of, fit, line_of, outcome, tensors
from remedy_examples import EXAMPLES
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_gradguard.forensics.nonfinite.known_failures import KNOWN_FAILURES

ROOT = Path(__file__).parents[3]
FAILURES = {failure.name: failure for failure in KNOWN_FAILURES}
CASES = [(example, index) for example in EXAMPLES for index in example.fixes]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("example", "index"), CASES, ids=str)
def test_remedy_as_it_is_printed_ends_the_failure(example, index, tmp_path):
    """No NaN and no Inf are left in result and gradients, and healthy ones stay; the values named were there."""
    fix = FAILURES[example.failure].fixes[index]
    before = fix.before.replace("{op}", example.op.replace("special_", "special."))
    before = before.replace("{exponent}", example.exponent).replace("{base}", example.base)
    fails, healthy = tensors(example.fails, example.dtype), tensors(example.healthy, example.dtype)
    line = line_of(tmp_path, before, fails, example.setup)

    alert = alert_of(line, fails)
    assert example.said in alert.message
    codes = re.findall(r"`([^`]+)`\.", alert.remedy)
    shown = 0 if fix.within else index
    fixed = line_of(tmp_path, codes[shown], fails, example.setup)

    assert any(not values.isfinite().all() for values in outcome(line, fails))
    assert all(values.isfinite().all() for values in outcome(fixed, fails))
    for was, now in zip(outcome(line, healthy), outcome(fixed, healthy), strict=True):
        torch.testing.assert_close(now, was, rtol=example.tolerance, atol=example.tolerance, check_dtype=False)


class Attention(LightningModule):
    """Attention where one sample is padding throughout."""

    def __init__(self, opened):
        super().__init__()
        torch.manual_seed(0)
        self.opened = opened
        self.attn = torch.nn.MultiheadAttention(4, 2, batch_first=True)

    def training_step(self, batch, batch_idx):
        x, pad = batch
        if self.opened:
            pad = pad & ~pad.all(-1, keepdim=True)
        return self.attn(x, x, x, key_padding_mask=pad)[0].square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def test_every_fix_has_an_example():
    """None is promised untried."""
    tried = {(example.failure, index) for example, index in CASES}
    assert tried == {(failure.name, index) for failure in KNOWN_FAILURES for index in range(len(failure.fixes))}


@pytest.mark.filterwarnings("ignore")
def test_multihead_attention_with_a_sample_of_padding_is_explained_and_mended():
    """The mask is opened where it covers all, as the remedy says."""
    batch = torch.randn(3, 5, 4), torch.tensor([[False] * 5, [True] * 5, [False, False, True, True, True]])
    (alert,) = fit(Attention(opened=False), batch).alerts
    assert alert.culprit.samples == (1,)
    assert "summed over nothing but -Inf" in alert.message
    assert "as for `key_padding_mask`" in alert.remedy
    assert fit(Attention(opened=True), batch).alerts == []


def documentation():
    """The script that writes the page."""
    spec = importlib.util.spec_from_file_location("known_failures_table", ROOT / "docs" / "known_failures_table.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_page_is_up_to_date():
    """It is what the script makes of the list."""
    script = documentation()
    assert script.PAGE.read_text(encoding="utf-8") == script.page()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("code", documentation().SAFE_CODE)
def test_what_the_page_calls_safe_is_safe(code, tmp_path):
    """Finite, forward and backward, at zeros and ones."""
    line = line_of(tmp_path, code, ["z", "one"])
    assert all(values.isfinite().all() for values in outcome(line, {"z": torch.zeros(2, 2), "one": torch.ones(2, 2)}))


WHOLE_LINES = [
    (
        "(x - x.mean(0)) / x.var(0).sqrt()",
        [[1.0, 2.0], [1.0, 3.0]],
        ["x / torch.where(y.abs() < 1e-8, 1e-8, y)", "torch.sqrt(x.clamp_min(1e-12))"],
        "(x - x.mean(0)) / torch.where((s := x.var(0).clamp_min(1e-12).sqrt()).abs() < 1e-8, 1e-8, s)",
    ),
    (
        "(x - x.mean(0)) / x.var(0, correction=0) ** 0.5",
        [[1.0, 2.0], [1.0, 3.0]],
        ["x / torch.where(y.abs() < 1e-8, 1e-8, y)", "torch.pow(x.clamp_min(1e-8), p)"],
        "(x - x.mean(0)) / torch.where((s := x.var(0, correction=0).clamp_min(1e-8) ** 0.5).abs() < 1e-8, 1e-8, s)",
    ),
    (
        "torch.log(torch.acos(x))",
        [0.5, 1.0],
        ["torch.log(x.clamp_min(1e-8))", "torch.acos(x.clamp_max(1 - 1e-6))"],
        "torch.log(torch.acos(x.clamp_max(1 - 1e-6)).clamp_min(1e-8))",
    ),
    (
        "x / x.std(0)",
        [[1.0, 2.0]],
        ["torch.std(x, dim, correction=min(1, x.shape[dim] - 1)).clamp_min(1e-8)"],
        "x / torch.std(x, 0, correction=min(1, x.shape[0] - 1)).clamp_min(1e-8)",
    ),
    (
        "x / x.norm(dim=1, keepdim=True)",
        [[1.0, 2.0], [0.0, 0.0]],
        ["x / torch.where(y.abs() < 1e-8, 1e-8, y)"],
        "x / torch.where((n := x.norm(dim=1, keepdim=True)).abs() < 1e-8, 1e-8, n)",
    ),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("code", "x", "remedies", "fixed"), WHOLE_LINES)
def test_remedies_suffice_for_a_line_of_several_operators(code, x, remedies, fixed, tmp_path):
    """Also where what is clamped comes from an operator with an infinite slope."""
    inputs = tensors({"x": x}, torch.float32)
    assert re.findall(r"`([^`]+)`\.", alert_of(line_of(tmp_path, code, inputs), inputs).remedy) == remedies
    assert all(values.isfinite().all() for values in outcome(line_of(tmp_path, fixed, inputs), inputs))


@pytest.mark.filterwarnings("ignore")
def test_remedies_of_all_that_fails_on_a_line_are_told(tmp_path):
    """With the first alone the line would go on to fail."""
    inputs = tensors({"x": [1.0, 0.0]}, torch.float32)
    code = "torch.lgamma(x) - torch.log(x) * x"
    alert = alert_of(line_of(tmp_path, code, inputs), inputs)
    assert "got 0 at [1]; it has a pole at 0" in alert.message
    assert "; on the same line `log` got 0 at [1]" in alert.message
    for safe in re.findall(r"`([^`]+)`\.", alert.remedy):
        code = code.replace(f"{safe.partition('(')[0]}(x)", safe)
    assert all(values.isfinite().all() for values in outcome(line_of(tmp_path, code, inputs), inputs))


@pytest.mark.parametrize("code", documentation().RAISING_CODE)
def test_what_the_page_says_to_raise_raises(code, tmp_path):
    """So that there is no NaN to explain."""
    with pytest.raises((IndexError, RuntimeError, ValueError)):
        line_of(tmp_path, code, ["z", "one"])(torch.zeros(2, 2), torch.ones(2, 2))


@pytest.mark.parametrize("backend", [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION])
@pytest.mark.parametrize("is_additive", [True, False])
def test_attention_kernels_give_no_nan_for_a_masked_row(backend, is_additive):
    """None of those that a CPU has."""
    keep = torch.tensor([[True, True, False], [False, False, False], [True, True, True]])
    mask = torch.zeros(3, 3).masked_fill(~keep, -torch.inf) if is_additive else keep
    x = torch.randn(1, 1, 3, 4, requires_grad=True)
    with sdpa_kernel(backend):
        out = torch.nn.functional.scaled_dot_product_attention(x, x, x, attn_mask=mask)
    out.sum().backward()
    assert out.isfinite().all()
    assert x.grad.isfinite().all()


class Angle(LightningModule):
    """The arc cosine of what autocast has rounded to half precision."""

    def __init__(self):
        super().__init__()
        self.cosine = torch.nn.Linear(2, 2, bias=False)
        torch.nn.init.eye_(self.cosine.weight)

    def training_step(self, batch, batch_idx):
        return torch.acos(self.cosine(batch).float()).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.filterwarnings("ignore")
def test_remedy_under_autocast_holds_before_the_cast_too(tmp_path):
    """`1 - 1e-6` is 1 in bfloat16, and 0.99 is not."""
    x = torch.tensor([[0.5, 1.0]])
    (alert,) = fit(Angle(), x, precision="bf16-mixed").alerts
    assert "got 1 at [0, 1]" in alert.message
    (code,) = re.findall(r"`([^`]+)`\.", alert.remedy)
    fixed = line_of(tmp_path, code, ["x"])
    assert all(values.isfinite().all() for values in outcome(fixed, {"x": x.bfloat16()}))
