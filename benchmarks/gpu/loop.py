"""A small network in a plain loop with a guard, some of whose steps are bad."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_gradguard import Explosion, GradientWarning, Guard

FEATURES, WIDTH, CLASSES, BATCH_SIZE = 16, 64, 8, 32
MAX_NORM = 1e3
"""Of the detector; healthy steps are far below it."""

Fault = Literal["none", "nan", "huge"]
Network = Callable[[], nn.Module]
MakeOptimizer = Callable[[nn.Module], torch.optim.Optimizer]


def mlp() -> nn.Module:
    """Three layers."""
    hidden = (nn.Linear(FEATURES, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Tanh())
    return nn.Sequential(*hidden, nn.Linear(WIDTH, CLASSES))


def normalized() -> nn.Module:
    """With running statistics."""
    return nn.Sequential(nn.Linear(FEATURES, WIDTH), nn.BatchNorm1d(WIDTH), nn.ReLU(), nn.Linear(WIDTH, CLASSES))


class Loop:
    """Trains a classifier on one batch; everything that a step needs lies on the device beforehand.

    Args:
        device: where.
        make_optimizer: for the network.
        network: what is trained; called once.
        wrap: what is called instead of the network, made from it.
        scaler: for fp16 with autocast; None: fp32.
        settings: of the guard.
    """

    def __init__(
        self,
        device: torch.device,
        make_optimizer: MakeOptimizer,
        *,
        network: Network = mlp,
        wrap: Callable[[nn.Module], Callable[[Tensor], Tensor]] = lambda network: network,
        scaler: torch.amp.GradScaler | None = None,
        **settings: Any,
    ) -> None:
        torch.manual_seed(0)
        self.device = device
        self.network = network().to(device)
        self.inputs = torch.randn(BATCH_SIZE, FEATURES, device=device)
        self.targets = torch.randint(CLASSES, (BATCH_SIZE,), device=device)
        self.call = wrap(self.network)
        self.optimizer = make_optimizer(self.network)
        self.scaler = scaler
        settings = {"explosion": Explosion("skip", max_norm=MAX_NORM, patience=1, cooldown=0), **settings}
        self.guard = Guard(
            self.network.named_parameters(),
            optimizer=self.optimizer,
            named_buffers=self.network.named_buffers(),
            scaler=scaler,
            **settings,
        )
        self._inputs = {"none": self.inputs, "nan": self.inputs * torch.nan, "huge": self.inputs * 100.0}

    def step(self, fault: Fault = "none") -> None:
        """One step. A fault is in its inputs, so that running statistics get it as well; a huge one is in the loss, too."""
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device.type, torch.float16, enabled=self.scaler is not None):
            loss = F.mse_loss(self.call(self._inputs[fault]).float(), F.one_hot(self.targets, CLASSES).float())
        loss = loss * (1e6 if fault == "huge" else 1.0)
        if self.scaler is not None:
            loss = self.scaler.scale(loss)
        self.guard.before_backward(loss)
        loss.backward()
        self.guard.step()
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()

    def state(self) -> dict[str, Any]:
        """A copy of all that a step may change: parameters, buffers, and the optimizer's state."""
        return copy.deepcopy({"model": self.network.state_dict(), "optimizer": self.optimizer.state_dict()["state"]})


def same(left: Any, right: Any) -> bool:
    """Whether two nested states are equal, tensors bit for bit."""
    if isinstance(left, Tensor):
        return torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(value, right[key]) for key, value in left.items())
    return bool(left == right)


@contextmanager
def no_sync(device: torch.device) -> Iterator[None]:
    """In here whatever waits for the device raises. On a CPU nothing does."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings that the faults are meant to raise."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GradientWarning)
        yield


class LeftOutError(Exception):
    """A check that can't be made here; the message says why."""


def expect(is_so: bool, otherwise: str) -> None:  # noqa: FBT001 - the one thing that is expected
    """Fail a check; unlike `assert`, under `python -O` too."""
    if not is_so:
        raise AssertionError(otherwise)
