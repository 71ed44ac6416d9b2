"""What is lost when files, states, disks and processes misbehave: `python -m benchmarks.reliability`.

Prints the table of `docs/reliability.md`. Each row injects one kind of fault so many times at random, seeded, and counts
what was lost that had been whole.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import random
import resource
import shutil
import signal
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn

from benchmarks._report import begin, parser, table
from lightning_gradguard import Alert, GradGuard, Guard
from lightning_gradguard.errors import GuardWarning, SinkWarning
from lightning_gradguard.files.json_lines import Reader, append
from lightning_gradguard.files.torch_files import UnreadableError, load_plain
from lightning_gradguard.forensics.bundle import Bundle
from lightning_gradguard.testing import kill_and_resume

NUM_BATCHES, FAULTS = 40, (5, 12, 19, 26, 33)


@dataclass
class Row:
    """A row of the table."""

    fault: str
    number: int
    lost: str
    said: str


class Net(LightningModule):
    """Small; NaN in some batches."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 1))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """A sum is learnt."""
        loss = (self.net(batch) - batch.sum(1, keepdim=True)).square().mean()
        self.log("loss", loss)
        return loss * math.nan if batch_idx in FAULTS else loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """With state of its own."""
        return torch.optim.AdamW(self.parameters(), lr=0.01)


class Loader:
    """Numbered batches; goes on where a checkpoint was made."""

    position, first = 0, 0

    def __len__(self) -> int:
        return NUM_BATCHES

    def __iter__(self) -> Iterator[Tensor]:
        first, self.first = self.first, 0
        for index in range(first, NUM_BATCHES):
            self.position = index + 1
            yield torch.randn(8, 6, generator=torch.Generator().manual_seed(index))

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.first = state["position"]


def fit(folder: Path, *callbacks: Callback, logger: Any = False, **settings: Any) -> Net:
    """One epoch."""
    torch.manual_seed(0)
    model = Net()
    quiet = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False, "log_every_n_steps": 1}
    saves = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    trainer = Trainer(
        max_epochs=1, default_root_dir=folder, callbacks=list(callbacks), logger=logger, enable_checkpointing=saves, **quiet
    )
    trainer.fit(model, Loader(), **settings)
    return model


def train(folder: Path) -> dict[str, Any]:
    """What is killed: it saves every five steps."""
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    guard = GradGuard(clip=1.0, max_replays=1)
    last = folder / "last.ckpt"
    saving = ModelCheckpoint(folder, every_n_train_steps=5, save_last=True)
    model = fit(folder, guard, saving, ckpt_path=last if last.exists() else None)
    return {"weights": model.state_dict(), "guard": guard.state_dict(), "skipped": guard.num_skipped}


def broken_lines(number: int, chance: random.Random) -> Row:
    """A file of lines is cut or strewn with bytes at random, and appended to."""
    num_lost = num_left_out = 0
    with tempfile.TemporaryDirectory() as root:
        for index in range(number):
            path = Path(root) / f"{index}.jsonl"
            lines = [json.dumps({"n": each, "text": "x" * chance.randrange(200)}).encode() for each in range(10)]
            whole = set(range(10))
            spoiled = chance.randrange(10)
            lines[spoiled] = chance.choice((lines[spoiled][: chance.randrange(len(lines[spoiled]))], chance.randbytes(50)))
            whole.discard(spoiled)
            path.write_bytes(b"\n".join(lines[: chance.randrange(spoiled + 1, 11)]))
            whole = {each for each in whole if b'{"n": %d' % each in path.read_bytes()}
            append(path, {"n": 10})
            reader = Reader(path, lambda entry: int(entry["n"]))
            num_lost += len((whole | {10}) - set(reader.read()))
            num_left_out += reader.left_out.count
    return Row(
        "a line of `alerts.jsonl` or `quarantine.jsonl` broken or replaced by random bytes, then appended to",
        number,
        f"{num_lost} whole lines",
        f"the number of lines left out ({num_left_out:,} in all), the first, and why",
    )


def junk_in_states(number: int, chance: random.Random) -> Row:
    """One place of a guard's saved state becomes something else."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    guard = Guard(model.named_parameters(), clip=1.0)
    for _ in range(30):
        model.zero_grad()
        model(torch.randn(4, 4)).square().mean().backward()
        guard.step()
    text = json.dumps(guard.state_dict())
    num_raised = num_said = 0
    for _ in range(number):
        state = json.loads(text)
        places = list(_places(state))
        *path, last = chance.choice(places)
        target = state
        for key in path:
            target = target[key]
        target[last] = chance.choice((None, "x", -1, [], {}, math.nan, [1, "a"], {"a": 1}, True, 1e300))
        fresh = Guard(model.named_parameters(), clip=1.0)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                fresh.load_state_dict(state)
                fresh.step()
            except Exception:  # noqa: BLE001 - what is counted
                num_raised += 1
        num_said += bool(caught)
    return Row(
        "one place in a guard's saved state replaced by something else",
        number,
        f"{num_raised} trainings",
        f"what starts afresh, and why ({num_said:,} times; else the value was still one that can be)",
    )


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, entry in entries:
        yield (*path, key)
        yield from _places(entry, (*path, key))


def mutated_files(number: int, chance: random.Random) -> Row:
    """Some bytes of a bundle or a checkpoint are changed, cut or doubled."""
    num_raised = num_read = 0
    with tempfile.TemporaryDirectory() as root, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(Path(root), GradGuard(max_replays=1), ModelCheckpoint(root, save_last=True))
        files = [next(Path(root).rglob("*.bundle.pt")).read_bytes(), (Path(root) / "last.ckpt").read_bytes()]
        path = Path(root) / "mutated.pt"
        for _ in range(number):
            content = bytearray(chance.choice(files))
            for _ in range(chance.choice((1, 2, 8))):
                at, length = chance.randrange(len(content)), chance.choice((1, 4, 64))
                content[at : at + length] = chance.choice((chance.randbytes(length), b"", content[at : at + length] * 2))
            path.write_bytes(content)
            try:
                load_plain(path)
                with contextlib.suppress(UnreadableError):
                    Bundle.load(path)
                num_read += 1
            except UnreadableError:
                pass
            except Exception:  # noqa: BLE001 - what is counted
                num_raised += 1
    return Row(
        "bytes of a bundle or a checkpoint changed, cut or doubled, then read",
        number,
        f"{num_raised} crashes",
        f"why it can't be read, in a line; {num_read:,} could still be read",
    )


class Misbehaves(Callback):
    """Lets the disk misbehave between two batches."""

    def __init__(self, condition: Callable[[Path], Any], folder: Path, begin: int, end: int) -> None:
        self.condition, self.folder, self.begin, self.end = condition, folder, begin, end
        self.stack = contextlib.ExitStack()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.begin:
            self.stack.enter_context(self.condition(self.folder))
        if batch_idx == self.end:
            self.stack.close()


@contextlib.contextmanager
def no_room(folder: Path) -> Iterator[None]:
    """No file may grow, as on a full disk or beyond a quota."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@contextlib.contextmanager
def in_the_way(folder: Path) -> Iterator[None]:
    """Each folder is a file for a while."""
    places = [path for path in folder.iterdir() if path.is_dir()]
    for path in places:
        path.rename(path.with_name(f"{path.name}.away"))
        while not path.is_file():
            # The thread of TensorBoard's writer may make the folder again just now.
            shutil.rmtree(path, ignore_errors=True)
            with contextlib.suppress(OSError):
                path.touch()
    try:
        yield
    finally:
        for path in places:
            path.unlink()
            while (away := path.with_name(f"{path.name}.away")).exists():
                shutil.rmtree(path, ignore_errors=True)
                with contextlib.suppress(OSError):
                    away.rename(path)


def sick_disk(name: str, condition: Callable[[Path], Any], number: int, chance: random.Random) -> Row:
    """The disk misbehaves for some batches of a training."""
    num_alerts = num_ended = num_reported = 0
    said: list[int] = []
    for _ in range(number):
        begin = chance.randrange(1, NUM_BATCHES - 8)
        with tempfile.TemporaryDirectory() as root, warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            folder = Path(root)
            misbehaves = Misbehaves(condition, folder, begin, begin + chance.randrange(1, 7))
            guard = GradGuard(quarantine="list", max_bundle_mib=1.0, max_replays=1)
            try:
                with misbehaves.stack:
                    fit(folder, guard, misbehaves, logger=TensorBoardLogger(folder))
            except Exception:  # noqa: BLE001 - what is counted
                num_ended += 1
                traceback.print_exc()
            found = [alert.step for path in folder.rglob("alerts.jsonl") for alert in Reader(path, Alert.from_dict).read()]
            # Not of each fault: what is repeated too often is only counted.
            num_alerts += len({alert.step for alert in guard.alerts} - set(found))
            num_reported += len(guard.alerts)
            said.append(sum(issubclass(each.category, (SinkWarning, GuardWarning)) for each in caught))
    return Row(
        f"{name} for 1 to 6 batches of a training, TensorBoard and the user's `self.log` on",
        number,
        f"{num_ended} trainings, {num_alerts} of {num_reported} alerts; the events of that while",
        f"{min(said)} to {max(said)} warnings a training, one for each thing that could not be written",
    )


def kills(name: str, signal_number: int | None, number: int, seed: int) -> Row:
    """A training is killed at a random moment, and resumed."""
    folder = Path(tempfile.mkdtemp())
    try:
        report = kill_and_resume(train, folder / "runs", num_kills=number, seed=seed, signal_number=signal_number)
    finally:
        shutil.rmtree(folder)
    num_other = sum(bool(outcome.differences) for outcome in report.outcomes)
    return Row(
        f"{name} at a random moment, then resumed from the last checkpoint",
        number,
        f"{num_other} came to another end than the training that was never killed, bit for bit",
        "nothing",
    )


def main() -> None:
    """All of them."""
    chosen = parser(__doc__).parse_args()
    console = begin(chosen)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    logging.getLogger("lightning_gradguard").setLevel(logging.ERROR)
    few, many = (1, 20) if chosen.quick else (20, 1000)
    rows = [
        broken_lines(many, random.Random(0)),
        junk_in_states(many, random.Random(1)),
        mutated_files(many, random.Random(2)),
        sick_disk("no file can grow", no_room, few, random.Random(3)),
        sick_disk("a file in the place of each folder", in_the_way, few, random.Random(4)),
        kills("`kill -9`", None, few, 5),
        kills("SIGTERM", signal.SIGTERM, few, 6),
        kills("Ctrl-C", signal.SIGINT, few, 7),
    ]
    columns = ["what was injected", "how often", "lost", "said"]
    console.print(table("What is lost", columns, [[row.fault, f"{row.number:,}", row.lost, row.said] for row in rows]))


if __name__ == "__main__":
    main()
