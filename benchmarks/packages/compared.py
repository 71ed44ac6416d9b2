"""Healthy trainings, seeded: is the one with a guard the one without, to the bit? And one NaN, put into one gradient.

What the NaN comes to has a reference that knows nothing of the guard: the same training without one and without the NaN, in
which the step of that batch is undone by hand. Both must end with the same weights.
"""

from __future__ import annotations

import copy
import random
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.packages.trainings import Training
from lightning_gradguard import GradGuard
from lightning_gradguard.testing import inject
from lightning_gradguard.trainer.packages import Callback

COLUMNS = ("training", "batches", "losses that differ", "weights that differ", "clipped", "skipped", "alerts")
BAD_STEP = 100
HUGE, CLOSE = 1e9, 0.05


class Noted(Callback):
    """Keeps the losses, and at the end the weights, and the guard that was there: some packages train with copies."""

    def __init__(self) -> None:
        self.losses: list[Tensor] = []
        self.weights: dict[str, Tensor] = {}
        self.guard: GradGuard | None = None

    def __deepcopy__(self, memo: Any) -> Noted:
        return self

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Keep the loss."""
        loss = outputs["loss"] if isinstance(outputs, dict) else outputs
        self.losses.append(loss.detach().clone())

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Keep weights, buffers and guard."""
        self.guard = next((callback for callback in trainer.callbacks if isinstance(callback, GradGuard)), None)
        self.weights = {name: value.detach().clone() for name, value in pl_module.state_dict().items()}


class Damaged(Callback):
    """Puts a NaN into the first parameter's gradient, in one backward pass."""

    def __init__(self) -> None:
        self._stack = ExitStack()

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """From now on."""
        self._stack.enter_context(inject(pl_module, "nan", step=BAD_STEP))

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Take the hook away."""
        self._stack.close()


class Undone(Callback):
    """Puts parameters, buffers and the optimizer's state back to what they were before one batch."""

    def __init__(self) -> None:
        self._num_batches = 0
        self._tensors: list[tuple[Tensor, Tensor]] = []
        self._states: list[Any] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Keep them."""
        if self._num_batches == BAD_STEP:
            tensors = [*pl_module.parameters(), *pl_module.buffers()]
            self._tensors = [(tensor, tensor.detach().clone()) for tensor in tensors]
            self._states = [copy.deepcopy(optimizer.state_dict()["state"]) for optimizer in trainer.optimizers]

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Put them back; what a scheduler has set stays."""
        if self._num_batches == BAD_STEP:
            with torch.no_grad():
                for tensor, before in self._tensors:
                    tensor.copy_(before)
            for optimizer, state in zip(trainer.optimizers, self._states, strict=True):
                optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
        self._num_batches += 1


@dataclass
class Played:
    """What a training came to."""

    losses: list[Tensor]
    weights: dict[str, Tensor]
    guard: GradGuard | None
    messages: list[str] = field(default_factory=list)


def play(training: Training, *others: Callback, guard: GradGuard | None = None, **trainer: Any) -> Played:
    """Train from the same seeds, whatever it is that a package draws from."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - gluonts draws from it
    torch.manual_seed(0)
    noted = Noted()
    training.train([noted, *others, *([] if guard is None else [guard])], max_epochs=training.epochs, **trainer)
    messages = [] if noted.guard is None else [alert.message for alert in noted.guard.alerts]
    return Played(noted.losses, noted.weights, noted.guard, messages)


def rows_and_messages(name: str, training: Training) -> tuple[list[list[str]], list[str]]:
    """A row for each training, compared with the one without a guard, and all alerts."""
    trainer = {"gradient_clip_val": None} if training.sets_clipping else {}
    training.train([], max_epochs=1)  # imports are done after this; some of them draw random numbers
    plain = play(training, **trainer)
    compared = {
        "again, without the guard": (plain, play(training, **trainer)),
        "`GradGuard()`": (plain, play(training, guard=GradGuard(), **trainer)),
        "`GradGuard(clip=1e9)`": (plain, play(training, guard=GradGuard(clip=HUGE), **trainer)),
        '`GradGuard(explosion="stop", nonfinite="stop")`': (
            plain,
            play(training, guard=GradGuard(explosion="stop", nonfinite="stop"), **trainer),
        ),
        f"`GradGuard(clip={CLOSE})`, against `gradient_clip_val={CLOSE}`": (
            play(training, gradient_clip_val=CLOSE),
            play(training, guard=GradGuard(clip=CLOSE), **trainer),
        ),
        "one NaN, `GradGuard()`": (
            play(training, Undone(), **trainer),
            play(training, Damaged(), guard=GradGuard(), **trainer),
        ),
    }
    rows, messages = [], []
    for what, (reference, played) in compared.items():
        rows.append([f"{name}: {what}", *_compared(reference, played)])
        messages.extend(f"{name}: {what}: {message}" for message in played.messages)
    if training.sets_clipping:
        messages.append(f"{name}: {_refusal(training)}")
    return rows, messages


def _refusal(training: Training) -> str:
    """What a guard that clips says where the package clips, too."""
    try:
        play(training, guard=GradGuard(clip=HUGE))
    except ValueError as error:
        return f"{type(error).__name__}: {error}"
    return "not refused"


def _compared(reference: Played, played: Played) -> list[str]:
    losses = [not torch.equal(a, b) for a, b in zip(reference.losses, played.losses, strict=False)]
    weights = [
        not torch.equal(reference.weights[key], played.weights[key])
        for key in reference.weights.keys() & played.weights.keys()
    ]
    apart = reference.weights.keys() ^ played.weights.keys()
    guard = played.guard
    row = [
        f"{len(reference.losses)}, {len(played.losses)}"
        if len(reference.losses) != len(played.losses)
        else str(len(played.losses)),
        f"{sum(losses)} of {len(losses)}",
        f"{sum(weights) + len(apart)} of {len(weights) + len(apart)}",
    ]
    if guard is None:
        return [*row, "", "", ""]
    kinds = Counter(alert.kind for alert in guard.alerts)
    said = ", ".join(f"{number} {kind}" for kind, number in kinds.items()) or "none"
    return [*row, str(guard.num_clipped), str(guard.num_skipped), said]
