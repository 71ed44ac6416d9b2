"""Single lines of code as the training step of a real fit."""

from __future__ import annotations

import importlib.util

import torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader

from lightning_gradguard import GradGuard


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
