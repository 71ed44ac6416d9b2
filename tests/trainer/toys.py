"""Models, data and a Trainer that are small enough for a fit in well under a second."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning_package import Callback, Checkpoint, LightningModule, Trainer
from torch import Tensor, nn

FEATURES, BATCH_SIZE = 6, 8


class Batches:
    """A data loader without workers or shuffling: the same batches in every epoch."""

    def __init__(self, batches: Sequence[Any]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


class ResumableBatches(Batches):
    """The same, for a run that is resumed in the middle of an epoch."""

    position, first = 0, 0

    def __iter__(self) -> Iterator[Any]:
        first, self.first = self.first, 0
        for number in range(first, len(self)):
            self.position = number + 1
            yield self.batches[number]

    def state_dict(self) -> dict[str, int]:
        """How many batches of the running epoch were given out."""
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Begin the next epoch there."""
        self.first = state["position"]


def make_batches(count: int, seed: int = 1) -> Batches:
    """Batches of a noisy linear problem, each with its number, so that a model can spoil one of them."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(FEATURES, 1, generator=generator)
    inputs = torch.randn(count, BATCH_SIZE, FEATURES, generator=generator)
    targets = inputs @ weights + 0.1 * torch.randn(count, BATCH_SIZE, 1, generator=generator)
    return Batches([(torch.tensor(number), x, y) for number, (x, y) in enumerate(zip(inputs, targets, strict=True))])


SPOIL: dict[str, Callable[[Tensor], Tensor]] = {
    "nan": lambda loss: loss * torch.nan,
    "inf": lambda loss: loss * torch.inf,
    "huge": lambda loss: loss * 1e6,
    "enormous": lambda loss: loss * 1e25,  # every gradient is finite, its square is not
    "nan_loss": lambda loss: loss + torch.nan,  # the gradient of a sum does not see the summand
}


class Net(LightningModule):
    """A two-layer regression; `faults` says which batch is spoiled, and how ("none": the step has no gradients)."""

    def __init__(self, faults: Mapping[int, str] | None = None, optimizer: str = "adamw", *, log: bool = False) -> None:
        super().__init__()
        self.body = nn.Linear(FEATURES, 8)
        self.head = nn.Linear(8, 1)
        self.faults = dict(faults or {})
        self.kind = optimizer
        self.logs = log

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> Tensor | None:
        """Mean squared error, spoiled where asked for."""
        number, x, y = batch
        loss = nn.functional.mse_loss(self.head(torch.tanh(self.body(x))), y)
        if self.logs:
            self.log("train_loss", loss, batch_size=BATCH_SIZE)
        fault = self.faults.get(int(number))
        if fault == "none":
            return None
        return SPOIL[fault](loss) if fault else loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Optimizers with as much state as can be disturbed."""
        if self.kind == "sgd":
            return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)
        return torch.optim.AdamW(self.parameters(), lr=0.01, weight_decay=0.1)


class ValidatedNet(Net):
    """The same with a validation loop."""

    def validation_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> None:
        """Log the validation loss."""
        _, x, y = batch
        self.log("val_loss", nn.functional.mse_loss(self.head(torch.tanh(self.body(x))), y), batch_size=BATCH_SIZE)


class Snapshots(Callback):
    """Copies of the weights and of the optimizers' states after each batch; index -1 is before the first."""

    def __init__(self) -> None:
        self.weights: dict[int, dict[str, Tensor]] = {}
        self.optimizers: dict[int, list[Any]] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Copy the state before the first batch."""
        self._take(-1, trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Copy the state after a batch."""
        self._take(len(self.weights) - 1, trainer, pl_module)

    def _take(self, index: int, trainer: Trainer, pl_module: LightningModule) -> None:
        self.weights[index] = weights_of(pl_module)
        self.optimizers[index] = copy.deepcopy([optimizer.state_dict()["state"] for optimizer in trainer.optimizers])


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    """A copy of parameters and buffers."""
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def same(left: Any, right: Any) -> bool:
    """Whether two nested structures are equal, tensors bit for bit."""
    if isinstance(left, Tensor):
        return isinstance(right, Tensor) and left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(value, right[key]) for key, value in left.items())
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(same(a, b) for a, b in zip(left, right, strict=True))
    return bool(left == right)


def make_trainer(root: Path | str, *callbacks: Callback, **settings: Any) -> Trainer:
    """A silent Trainer on one CPU."""
    saves = any(isinstance(callback, Checkpoint) for callback in callbacks)
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": saves, "logger": False}
    defaults = {"accelerator": "cpu", "devices": 1, "max_epochs": 1, "log_every_n_steps": 1, "default_root_dir": root}
    return Trainer(callbacks=list(callbacks), **{**quiet, **defaults, **settings})


def fit(
    root: Path | str, module: LightningModule, *callbacks: Callback, batches: Batches | None = None, **settings: Any
) -> Trainer:
    """Train `module` for one epoch of 12 batches, if nothing else is asked for."""
    trainer = make_trainer(root, *callbacks, **settings)
    trainer.fit(module, make_batches(12) if batches is None else batches)
    return trainer


def seeded(make: Callable[[], Any], seed: int = 0) -> Any:
    """Build something from a given random state."""
    torch.manual_seed(seed)
    return make()


def read_alerts(root: Path | str) -> list[dict[str, Any]]:
    """The lines of `alerts.jsonl`; a line that isn't strict JSON is an error."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    text = (Path(root) / "gradguard" / "alerts.jsonl").read_text(encoding="utf-8")
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]
