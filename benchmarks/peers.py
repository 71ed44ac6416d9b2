"""What others that watch or clip gradients cost, as a whole step of a plain loop that is watched at every step.

Each has a copy of the network and its optimizer, and they take turns step by step. Their packages are in the extra
`peers`; one that is missing is left out. None has a network to talk to: wandb runs offline, into a temporary folder.
"""

from __future__ import annotations

import importlib
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.optim import Optimizer

from benchmarks._interleaved import Variant, interleave
from benchmarks._report import begin, parser, timing_table
from benchmarks._workloads import WORKLOADS, Workload, adamw, describe
from lightning_gradguard import Guard

MODELS = ("gpt", "mlp")
ROUNDS, WARMUP, MAX_SECONDS = 60, 30, 75.0  # 30 steps are beyond the warm-up of all
PLAIN, TORCH, GUARD = "plain loop", "clip_grad_norm_", "Guard(clip=1.0)"


@dataclass(frozen=True)
class Peer:
    """What a peer does around a step.

    Attributes:
        before_forward: given the number of the step.
        after_backward: given the loss.
        step: instead of the optimizer's; None: that one.
        close: at the end.
    """

    before_forward: Callable[[int], object] = lambda step: None
    after_backward: Callable[[Tensor], object] = lambda loss: None
    step: Callable[[], object] | None = None
    close: Callable[[], object] = lambda: None


def _guard(model: nn.Module, optimizer: Optimizer) -> Peer:
    guard = Guard(model.named_parameters(), optimizer=optimizer, clip=1.0, log_every_n_steps=0, histogram_every_n_steps=None)

    def after_backward(loss: Tensor) -> None:
        guard.before_backward(loss)  # it only notes the loss, so in this loop it may be late
        guard.step()

    return Peer(after_backward=after_backward)


def _wandb(model: nn.Module, optimizer: Optimizer) -> Peer:
    import wandb

    run = wandb.init(mode="offline", dir=".", settings=wandb.Settings(console="off", silent=True))
    run.watch(model, log="gradients", log_freq=1)

    def close() -> None:
        run.unwatch(model)
        run.finish()

    return Peer(after_backward=lambda loss: run.log({"loss": loss.item()}), close=close)


def _zclip(model: nn.Module, optimizer: Optimizer) -> Peer:
    from zclip import ZClip

    clipper = ZClip()
    return Peer(after_backward=lambda loss: clipper.step(model))


def _autoclip(model: nn.Module, optimizer: Optimizer) -> Peer:
    from autoclip.torch.quantile import QuantileClip

    clipper = QuantileClip(model.parameters(), quantile=0.1, history_length=1000)
    return Peer(after_backward=lambda loss: clipper.step())


def _smartclip(model: nn.Module, optimizer: Optimizer) -> Peer:
    import smartclip

    clipper = smartclip.AGC()
    return Peer(after_backward=lambda loss: smartclip.apply(model, clipper))


def _trainpulse(model: nn.Module, optimizer: Optimizer) -> Peer:
    from trainpulse import Monitor
    from trainpulse.callbacks import make_pytorch_hooks

    monitor = Monitor()
    (hooks,) = make_pytorch_hooks(model, monitor)
    steps = iter(range(10**9))

    def after_backward(loss: Tensor) -> None:
        step = next(steps)
        hooks.set_step(step + 1)
        monitor.log("loss", step, loss.item())

    return Peer(after_backward=after_backward, close=hooks.remove)


def _stabilityguard(model: nn.Module, optimizer: Optimizer) -> Peer:
    from stabilityguard import GuardedOptimizer

    guarded = GuardedOptimizer(optimizer, model, log_every=10**9, verbose=False)
    return Peer(step=guarded.step)


def _arc_vigil(model: nn.Module, optimizer: Optimizer) -> Peer:
    from arc_vigil import BendexMonitor

    return Peer(before_forward=BendexMonitor(model).observe)


def _trainscope(model: nn.Module, optimizer: Optimizer) -> Peer:
    from trainscope import TrainScope, TrainScopeConfig

    scope = TrainScope(model, optimizer, TrainScopeConfig()).attach()
    return Peer(after_backward=lambda loss: scope.step(loss.item()), close=scope.detach)


OWN: dict[str, Callable[[nn.Module, Optimizer], Peer]] = {
    PLAIN: lambda model, optimizer: Peer(),
    TORCH: lambda model, optimizer: Peer(after_backward=lambda loss: nn.utils.clip_grad_norm_(model.parameters(), 1.0)),
    GUARD: _guard,
}
PEERS: dict[str, tuple[str, Callable[[nn.Module, Optimizer], Peer]]] = {
    "wandb.watch(log_freq=1)": ("wandb", _wandb),
    "ZClip": ("zclip", _zclip),
    "AutoClip, per parameter": ("autoclip", _autoclip),
    "smartclip AGC": ("smartclip", _smartclip),
    "trainpulse": ("trainpulse", _trainpulse),
    "stabilityguard": ("stabilityguard", _stabilityguard),
    "arc-vigil": ("arc_vigil", _arc_vigil),
    "trainscope": ("trainscope", _trainscope),
}


def available(console: Console) -> dict[str, Callable[[nn.Module, Optimizer], Peer]]:
    """Those whose packages can be imported; says which can't and why."""
    found = dict(OWN)
    for name, (package, make) in PEERS.items():
        try:
            importlib.import_module(package)
        except Exception as error:  # noqa: BLE001  # whatever keeps a package from being imported is printed
            console.print(f"{name}: left out, {error}.")
        else:
            found[name] = make
    return found


def loop(model: nn.Module, optimizer: Optimizer, batches: list[Any], peer: Peer) -> Iterator[None]:
    """A plain training loop that stops after each step."""
    for number, batch in enumerate(cycle(batches)):
        peer.before_forward(number)
        loss = model(batch)
        loss.backward()
        peer.after_backward(loss)
        (peer.step or optimizer.step)()
        optimizer.zero_grad()
        yield


def compare(console: Console, workload: Workload, device: str, *, quick: bool) -> None:
    """Time a step of each, and print."""
    batches = workload.batches()
    if device != "cpu":
        batches = torch.utils._pytree.tree_map(lambda leaf: leaf.to(device), batches)
    variants, weights = {}, workload.model(quick).state_dict()
    with ExitStack() as stack:
        for name, make in available(console).items():
            model = workload.model(quick).to(device)
            model.load_state_dict(weights)
            optimizer = adamw(model, "fused")
            try:
                peer = make(model, optimizer)
            except Exception as error:  # noqa: BLE001  # a peer that fails is reported, the others go on
                console.print(f"{name}: left out, it failed: {error!r}.")
                continue
            stack.callback(peer.close)
            variants[name] = Variant(loop(model, optimizer, batches, peer).__next__)
        timings = interleave(
            variants,
            rounds=2 if quick else ROUNDS,
            warmup=2 if quick else WARMUP,
            max_seconds=MAX_SECONDS,
            device=device,
        )
    title = f"{workload.title}, {describe(workload.model(quick))}, fused AdamW, {device}"
    console.print(timing_table(title, timings, [PLAIN, GUARD]))


@contextmanager
def _quiet() -> Iterator[None]:
    """What the peers print and write goes where it is thrown away."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        os.chdir(folder)
        stack.callback(os.chdir, before)
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        nowhere = stack.enter_context(Path(os.devnull).open("w", encoding="utf-8"))
        stack.enter_context(redirect_stdout(nowhere))
        yield


def main() -> None:
    """Both models."""
    chosen = parser(__doc__).parse_args()
    console = begin(chosen)
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        for name in MODELS[-1:] if chosen.quick else MODELS:
            with _quiet():
                compare(console, WORKLOADS[name], device, quick=chosen.quick)


if __name__ == "__main__":
    main()
