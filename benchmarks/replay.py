"""What naming a culprit costs, over a plain step: one replay with the damage followed, on an incident; nothing else is paid.

A plain step is forward and backward. The replay is `Replay.run`, on a healthy step and on one with a NaN in the first
weight, from which on everything is damaged; saving the state and putting it back is included. In a run without incidents
there is one note of each batch.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from benchmarks._interleaved import Variant, interleave
from benchmarks._report import begin, parser, timing_table
from benchmarks._workloads import WORKLOADS, Workload, describe
from lightning_gradguard import GradGuard
from lightning_gradguard.trainer.replay.investigation import _Search

ROUNDS, WARMUP, MAX_SECONDS, BAR = 30, 2, 20.0, 4.0
PLAIN, UNWATCHED, HEALTHY, DAMAGED, NOTE = (
    "plain step",
    "replay, nothing followed",
    "replay",
    "replay of NaN",
    "note of a batch",
)
LSTM_WIDTH, LSTM_STEPS = 128, 32


class Lstm(nn.Module):
    """Two layers over sequences, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.LSTM(LSTM_WIDTH, LSTM_WIDTH, num_layers=2, batch_first=True)
        self.head = nn.Linear(LSTM_WIDTH, 10)

    def forward(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Cross entropy of the class."""
        return F.cross_entropy(self.head(self.body(batch[0])[0][:, -1]), batch[1])


class Trained(LightningModule):
    """A workload under a Trainer."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The network's loss."""
        return self.net(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Never steps far."""
        return torch.optim.SGD(self.parameters(), lr=0.0)


class Timed(GradGuard):
    """Measures in the middle of the first step, where an investigation happens."""

    def __init__(self, measure: Callable[[Timed, LightningModule, Any], None]) -> None:
        super().__init__()
        self.measure = measure

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Measure instead of judging."""
        self.measure(self, pl_module, optimizer)


def variants(guard: Timed, module: Any, optimizer: Any) -> dict[str, Variant]:
    """By name; what is timed happens between a backward pass and its step."""
    replay = guard._fit._incidents.investigation._replay
    batch = guard._fit._incidents._window._entries[-1].batch

    def plain() -> None:
        with torch.enable_grad():
            module.zero_grad()
            module.training_step(batch, 0).backward()

    first = next(module.parameters()).detach().view(-1)[:1]
    before = first.clone()

    def healthy() -> None:
        first.copy_(before)
        module.zero_grad()

    def spoiled() -> None:
        module.zero_grad()
        first.fill_(math.nan)

    def followed() -> None:
        replay.run(optimizer, observe=_Search(module).observe)

    return {
        PLAIN: Variant(plain, healthy),
        UNWATCHED: Variant(lambda: replay.run(optimizer), healthy),
        HEALTHY: Variant(followed, healthy),
        DAMAGED: Variant(followed, spoiled),
        NOTE: Variant(guard._fit._incidents._window.reopen),
    }


def compare(console: Console, title: str, net: nn.Module, batch: Any, *, quick: bool) -> None:
    """One workload."""

    def measure(guard: Timed, module: LightningModule, optimizer: Any) -> None:
        timings = interleave(
            variants(guard, module, optimizer),
            rounds=3 if quick else ROUNDS,
            warmup=1 if quick else WARMUP,
            max_seconds=MAX_SECONDS,
        )
        met = {name: "met" if timings.ratio(name, PLAIN).value <= BAR else "missed" for name in (HEALTHY, DAMAGED)}
        more = {} if quick else {f"at most {BAR:g}": met}
        console.print(timing_table(f"{title}, {describe(net)}", timings, [PLAIN], more))

    silent = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = Trainer(max_steps=1, accelerator="cpu", devices=1, callbacks=[Timed(measure)], **silent)
    trainer.fit(Trained(net), DataLoader([batch], batch_size=None))


def main() -> None:
    """A transformer, a deep MLP, a conv net and an LSTM."""
    chosen = parser(__doc__).parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    console = begin(chosen)
    work: list[Workload] = [WORKLOADS[name] for name in ("gpt", "mlp", "conv")]
    for workload in work:
        compare(console, workload.title, workload.model(chosen.quick), workload.batches()[0], quick=chosen.quick)
    batch = (torch.randn(32, LSTM_STEPS, LSTM_WIDTH), torch.randint(10, (32,)))
    compare(console, "LSTM", Lstm(), batch, quick=chosen.quick)


if __name__ == "__main__":
    main()
