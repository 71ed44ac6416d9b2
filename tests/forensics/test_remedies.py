"""A remedy is a promise: each is applied, as it is printed, to a line that fails."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from remedy_examples import EXAMPLES
from torch.utils.data import DataLoader

from lightning_gradguard import GradGuard
from lightning_gradguard.forensics.nonfinite.known_failures import KNOWN_FAILURES

ROOT = Path(__file__).parents[2]
FAILURES = {failure.name: failure for failure in KNOWN_FAILURES}
CASES = [(example, index) for example in EXAMPLES for index in example.fixes]


def tensors(inputs, dtype):
    """As tensors; integers and booleans stay what they are."""
    made = {name: torch.tensor(values) if isinstance(values, list) else values for name, values in inputs.items()}
    return {name: value.to(dtype) if is_float(value) else value for name, value in made.items()}


def is_float(value):
    """A tensor that may need a gradient."""
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def line_of(folder, code, names, setup=""):
    """A function in a file of its own that runs the code."""
    statement = code if "out =" in code else f"out = {code}"
    head = "import torch\nfrom torch.nn import functional as F\n\n\n"
    text = f"{head}def line({', '.join(names)}):\n    {setup}\n    {statement}\n    return out\n"
    file = folder / f"step_{len([*folder.iterdir()])}.py"
    file.write_text(text)
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.line


class Step(LightningModule):
    """Runs a line on a batch; each floating-point input depends on a parameter."""

    def __init__(self, line, names):
        super().__init__()
        self.line = line
        self.shift = torch.nn.ParameterDict({name: torch.nn.Parameter(torch.zeros(())) for name in names})

    def training_step(self, batch, batch_idx):
        made = {k: v + self.shift[k].to(v.dtype) if k in self.shift else v for k, v in batch.items()}
        return self.line(**made).float().sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def fit(module, batch, **settings):
    """One step of a real Trainer under a guard."""
    guard = GradGuard()
    silent = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = Trainer(max_steps=1, callbacks=[guard], accelerator="cpu", devices=1, **silent, **settings)
    trainer.fit(module, DataLoader([batch], batch_size=None))
    return guard


def alert_of(line, inputs):
    """What a guard says of a step of a real Trainer that runs the line."""
    module = Step(line, [name for name, value in inputs.items() if is_float(value)])
    return fit(module, inputs).alerts[0]


def outcome(line, inputs):
    """Result and gradients."""
    leaves = {k: v.clone().requires_grad_() if is_float(v) else v for k, v in inputs.items()}
    out = line(**leaves)
    out.float().sum().backward()
    return [out.detach(), *(leaf.grad for leaf in leaves.values() if is_float(leaf) and leaf.grad is not None)]


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
