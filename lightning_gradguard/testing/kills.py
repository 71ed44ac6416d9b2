"""Kill a training at random moments, let it resume, and compare where it ends bit for bit with one that was never killed."""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_gradguard.policy import require_int
from lightning_gradguard.wording import counted

Train = Callable[[Path], Any]

_RESULT = "result.pt"
_SLOW = ("torch", "lightning.pytorch", "pytorch_lightning")
"""Packages that take seconds to import; where they are loaded, the training needs them."""

_MAX_TRIES = 10
_PATIENCE_SECONDS = 120
_MAX_SHOWN = 5


@dataclass(frozen=True)
class Outcome:
    """One training that was killed, and resumed.

    Attributes:
        killed_after: seconds from its beginning to the kill.
        differences: where its end differs from that of the training that was never killed; empty if nowhere.
    """

    killed_after: float
    differences: tuple[str, ...]


@dataclass(frozen=True)
class KillReport:
    """What came of all of them.

    Attributes:
        seconds: that a training takes which is not killed.
        outcomes: one for each kill.
    """

    seconds: float
    outcomes: tuple[Outcome, ...]

    @property
    def survived(self) -> bool:
        """Whether each one came to the same end."""
        return not any(outcome.differences for outcome in self.outcomes)

    def __str__(self) -> str:
        """For instance `5 of 5 killed trainings came to the same end, bit for bit.`"""
        num_same = sum(not outcome.differences for outcome in self.outcomes)
        lines = [f"{num_same} of {len(self.outcomes)} killed trainings came to the same end, bit for bit."]
        for outcome in self.outcomes:
            shown = outcome.differences[:_MAX_SHOWN]
            more = len(outcome.differences) - len(shown)
            lines += [f"killed after {outcome.killed_after:.2f} s: {difference}" for difference in shown]
            lines += [f"killed after {outcome.killed_after:.2f} s: {counted(more, 'more difference')}"] * (more > 0)
        return "\n".join(lines)


def kill_and_resume(
    train: Train, folder: str | Path, *, num_kills: int = 3, seed: int = 0, signal_number: int | None = None
) -> KillReport:
    """Find out whether a training survives `kill -9` at any moment, or another signal.

    It is run once to its end; then, for each kill, it is begun anew in a folder of its own, killed at a random moment, and
    called again in the same folder until it ends. Each run is a process of its own.

    For the same end bit for bit a training must be deterministic, and give the same batches after it is resumed: save in
    the middle of an epoch only with a data loader that has a `state_dict`.

    Args:
        train: called with a folder. It begins a training, or goes on from what lies there, and returns where it ended:
            weights, counts, whatever is to be the same, in tensors and plain types. It has to be a function of a module,
            since other processes import it; in a script call this under `if __name__ == "__main__":`.
        folder: for all of it; made if it is not there, and else empty.
        num_kills: how many, >= 1.
        seed: of the random moments.
        signal_number: as `signal.SIGTERM`, which a cluster sends first, or `signal.SIGINT`; None: `kill -9`.

    Raises:
        ValueError: if `num_kills` is out of range, or the folder holds something.
        RuntimeError: if a training ends with an error, or so fast that it can't be killed.

    For example, with a Trainer:

        def train(folder):
            last = folder / "last.ckpt"
            saving = ModelCheckpoint(folder, every_n_train_steps=20, save_last=True)
            trainer = Trainer(max_epochs=3, callbacks=[GradGuard(), saving])
            model = MyModule()
            trainer.fit(model, ckpt_path=last if last.exists() else None)
            return {"weights": model.state_dict(), "steps": trainer.global_step}
    """
    require_int("num_kills", num_kills, at_least=1, remedy="The default is 3.")
    root, chance = Path(folder), random.Random(seed)  # noqa: S311 - not for cryptography
    if root.exists() and any(root.iterdir()):
        raise ValueError(f"`folder` must be empty, got {str(root)!r}. What lies there would be gone on from.")
    runs = _Runs(train)
    expected, seconds = runs.to_the_end(root / "whole")
    outcomes = []
    for number in range(num_kills):
        place = root / f"killed-{number}"
        killed_after = runs.killed(place, chance.uniform(0.02, 0.98) * seconds, signal_number)
        found, _ = runs.to_the_end(place)
        outcomes.append(Outcome(killed_after, tuple(differences(expected, found))))
    return KillReport(seconds, tuple(outcomes))


class _Runs:
    """Runs trainings in processes of their own."""

    def __init__(self, train: Train) -> None:
        self._train = train
        methods = multiprocessing.get_all_start_methods()
        # A server that has imported everything once forks in no time; and it has no threads, as this process may.
        self._context: BaseContext = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
        self._context.set_forkserver_preload([train.__module__, *(name for name in _SLOW if name in sys.modules)])

    def to_the_end(self, folder: Path) -> tuple[Any, float]:
        """Where a training ends, and the seconds that it took."""
        process, begun_at = self._begin(folder)
        process.join()
        seconds = time.monotonic() - begun_at
        if process.exitcode:
            raise RuntimeError(f"The training in {folder} ended with exit code {process.exitcode}; see its error above.")
        return torch.load(folder / _RESULT, weights_only=True), seconds

    def killed(self, folder: Path, seconds: float, signal_number: int | None) -> float:
        """Begin a training and kill it after so many seconds, or earlier where it would be over by then."""
        for _ in range(_MAX_TRIES):
            process, _ = self._begin(folder)
            process.join(seconds)
            if signal_number is None:
                process.kill()
            elif process.exitcode is None:  # pragma: no branch - it may be over by now
                os.kill(process.pid, signal_number)
            process.join(_PATIENCE_SECONDS)
            if process.exitcode is None:  # pragma: no cover - a training that hangs for minutes
                process.kill()
                raise RuntimeError(f"The training in {folder} did not end within {_PATIENCE_SECONDS} s of its signal.")
            if not (folder / _RESULT).exists():
                return seconds
            shutil.rmtree(folder)
            seconds /= 2
        raise RuntimeError(f"The training in {folder} is over before it can be killed; let it take more steps.")

    def _begin(self, folder: Path) -> tuple[Any, float]:
        folder.mkdir(parents=True, exist_ok=True)
        here, there = self._context.Pipe(duplex=False)
        process = self._context.Process(target=_run, args=(self._train, folder, there))  # type: ignore[attr-defined]
        process.start()
        there.close()
        try:
            here.recv()
        except EOFError:
            process.join()
            raise RuntimeError(
                f"The process of the training in {folder} could not be started; see its error above."
            ) from None
        finally:
            here.close()
        return process, time.monotonic()


def _run(train: Train, folder: Path, parent: Connection) -> None:
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # A shell's background jobs ignore Ctrl-C, and hand that down.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    parent.send("begun")
    parent.close()
    torch.save(train(folder), folder / _RESULT)


def differences(left: Any, right: Any, name: str = "") -> list[str]:
    """Where two trees of tensors and plain types differ, bit for bit; NaN equals NaN.

    >>> differences({"w": torch.zeros(3), "n": 1}, {"w": torch.tensor([0.0, 1.0, 0.0]), "n": 1})
    ["['w']: 1 of 3 elements differs"]
    """
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        return [f"{name}: {problem}" for problem in _differences_of_tensors(left, right)]
    if isinstance(left, Mapping) and isinstance(right, Mapping):
        missing = [f"{name}[{key!r}] is in one of them only" for key in left.keys() ^ right.keys()]
        return missing + [
            found for key in left if key in right for found in differences(left[key], right[key], f"{name}[{key!r}]")
        ]
    if isinstance(left, (list, tuple)) and isinstance(right, (list, tuple)):
        if len(left) != len(right):
            return [f"{name}: {len(left)} against {len(right)} entries"]
        pairs = enumerate(zip(left, right, strict=True))
        return [found for index, (a, b) in pairs for found in differences(a, b, f"{name}[{index}]")]
    # A float's text is exact, and NaN's is NaN's.
    return [] if type(left) is type(right) and repr(left) == repr(right) else [f"{name}: {left!r} against {right!r}"]


def _differences_of_tensors(left: Tensor, right: Tensor) -> list[str]:
    if left.shape != right.shape or left.dtype != right.dtype:
        return [f"{left.dtype} {list(left.shape)} against {right.dtype} {list(right.shape)}"]
    pair = [tensor.detach().cpu().contiguous().reshape(-1, 1).view(torch.uint8) for tensor in (left, right)]
    number = int((pair[0] != pair[1]).any(dim=1).sum())
    return [f"{number:,} of {counted(left.numel(), 'element')} {'differs' if number == 1 else 'differ'}"] if number else []
