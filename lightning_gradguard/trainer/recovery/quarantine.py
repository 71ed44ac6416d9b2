"""Which samples a Trainer's batches hold, and the list of those that have done damage."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

from torch import distributed as dist
from torch.utils.data import DataLoader, IterableDataset

from lightning_gradguard.act.stand_in import StandIn
from lightning_gradguard.alert import Culprit
from lightning_gradguard.errors import GuardWarning
from lightning_gradguard.measure.distributed import Ranks
from lightning_gradguard.record import Record
from lightning_gradguard.recovery.quarantine import Incident, QuarantineFile, WatchedSampler
from lightning_gradguard.trainer.conflicts import ConflictError
from lightning_gradguard.trainer.run_folder import run_folder

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

_MAX_BATCHES = 4096
"""Batches whose samples are remembered: more than an accumulation window, and than a verdict may come late."""


class Quarantine:
    """Lists batches that caused a skip or a rollback, and keeps their samples out of later ones.

    Args:
        mode: "list", or "skip" to leave the samples out as well.
        trainer: whose batches.
    """

    def __init__(self, mode: Literal["list", "skip"], trainer: Trainer) -> None:
        self._mode = mode
        self._trainer = trainer
        self._file: QuarantineFile | None = None
        self._process: StandIn | None = None
        self._sampler: WatchedSampler | None = None
        self._samples: OrderedDict[int, tuple[int, ...] | None] = OrderedDict()
        self._incidents: list[Incident] = []
        self._num_ready: int | None = None
        self._is_due = False
        self._has_failed = False
        self.find_culprit: Callable[[Record], Culprit | None] | None = None
        """Says who is to blame for a damaged step that no alert tells of; None where nobody can."""
        self.left_out: set[int] = set()
        """Samples that are kept out, or would be."""

    def attach(self) -> None:
        """Before there is a loader: read what an earlier part of the run has listed, and have a look at the loader.

        It is the strategy that has the last word on what training gets.
        """
        self._process = StandIn(self._trainer.strategy, "process_dataloader", self._process_and_watch)
        folder = run_folder(self._trainer)
        if folder is not None:
            self._file = QuarantineFile(folder / "quarantine.jsonl")
            listed = self._listed(self._file) if self._trainer.is_global_zero else set()
            self.left_out |= self._trainer.strategy.broadcast(listed)

    def detach(self) -> None:
        """List what is still waiting, and leave nothing on the strategy."""
        self._write()
        assert self._process is not None
        self._process.remove()

    def start(self) -> None:
        """Before the first batch: several loaders at once show nothing that could be told apart."""
        loader = self._trainer.fit_loop._combined_loader
        if loader is not None and len(loader.flattened) > 1:
            self._sampler = None
            self._refuse(f"{len(loader.flattened)} loaders at once")

    def begin_batch(self, batch_idx: int) -> None:
        """A batch begins."""
        # Batches that were passed over, and those that are None, count as ready too, but no hook is called for them.
        ready = self._trainer.fit_loop.epoch_loop.batch_progress.current.ready
        since = 0 if self._num_ready is None or ready <= self._num_ready else self._num_ready
        num_drawn = 1 if self._num_ready is None else ready - since
        self._num_ready = ready
        drawn = [self._sampler.take() for _ in range(num_drawn)] if self._sampler is not None else [None]
        self._samples[batch_idx] = drawn[-1]
        self._samples.move_to_end(batch_idx)
        if len(self._samples) > _MAX_BATCHES:
            self._samples.popitem(last=False)

    def note(self, record: Record) -> None:
        """A step was decided: note the batches that are to blame for it if it was skipped."""
        if not record.decision.skip or record.measurement.is_scaler_overflow:
            return
        position = record.position
        to_blame: dict[int | None, str] = {}
        for verdict, action in zip(record.verdicts, record.decision.actions, strict=True):
            # A NaN shows in one micro-batch; a norm is that of all of them.
            is_one = record.measurement.damage is not None or not position.batches
            batches = (position.batch_of(verdict.micro_batch),) if is_one else position.batches
            if action.skips and verdict.rank in (None, position.rank):
                to_blame |= {batch_idx: verdict.kind for batch_idx in batches if batch_idx not in to_blame}
        rows = self._certain_rows(record) if self._mode == "skip" else None
        epoch, step, rank = position.epoch or 0, position.step, position.rank
        self._incidents.extend(
            Incident(epoch, batch_idx or 0, step, rank, kind, self._samples_of(batch_idx or 0, rows))
            for batch_idx, kind in to_blame.items()
        )
        self._is_due = True

    def _certain_rows(self, record: Record) -> tuple[int, ...] | None:
        """The rows that made the damage, if a replay has shown them for certain, and on this rank."""
        culprits = [alert.culprit for alert in record.alerts if alert.kind == "nonfinite" and alert.culprit is not None]
        if not culprits and self.find_culprit is not None and record.measurement.damage is not None:
            culprits = [found for found in [self.find_culprit(record)] if found is not None]
        rank = record.position.rank
        return next((culprit.samples for culprit in culprits if culprit.samples and culprit.rank == rank), None)

    def _samples_of(self, batch_idx: int, rows: tuple[int, ...] | None) -> tuple[int, ...] | None:
        """Those of a batch that are to blame: its rows where these are known, else all of it."""
        samples = self._samples.get(batch_idx)
        if samples is None or rows is None or max(rows) >= len(samples):
            return samples
        return tuple(samples[row] for row in rows)

    def after_batch(self) -> None:
        """List what was noted. Where something was, it is a collective; all ranks have noted at the same steps."""
        if not self._is_due:
            return
        incidents, self._incidents, self._is_due = _of_all_ranks(self._incidents), [], False
        self.left_out.update(sample for incident in incidents for sample in incident.samples or ())
        self._write(incidents)

    def _write(self, incidents: Sequence[Incident] = ()) -> None:
        if self._file is None or not self._trainer.is_global_zero:
            return
        try:
            self._file.append(incidents)
        except OSError as error:
            self._fail(error, "each new batch is a new try, and then also lists those that are waiting")

    def _process_and_watch(self, process: Callable[..., Any], dataloader: object) -> object:
        processed: object = process(dataloader)
        if self._trainer.training:
            self._watch(processed)
        return processed

    def _listed(self, file: QuarantineFile) -> set[int]:
        try:
            samples, left_out = file.read()
        except OSError as error:
            self._fail(error, "what it lists is not left out")
            return set()
        if left_out.count:
            warnings.warn(f"{file!r}: {left_out}. All other lines count.", GuardWarning, stacklevel=2)
        return samples

    def _fail(self, error: OSError, lost: str) -> None:
        if not self._has_failed:
            self._has_failed = True
            warnings.warn(
                f"The list of quarantined batches can't be used ({error}). Training goes on; {lost}. Further failures of it "
                "are not shown.",
                GuardWarning,
                stacklevel=2,
            )

    def _watch(self, loader: object) -> None:
        self._sampler = None
        if not isinstance(loader, DataLoader):
            self._refuse(f"a {type(loader).__name__}")
        elif isinstance(loader.dataset, IterableDataset):
            self._refuse(f"the iterable data set {type(loader.dataset).__name__}")
        else:
            # A DataLoader refuses to have its sampler set; lists are made anew from it at the beginning of each epoch.
            name = "sampler" if loader.batch_sampler is None else "batch_sampler"
            inner = vars(loader)[name]
            inner = inner.inner if isinstance(inner, WatchedSampler) else inner
            self._sampler = WatchedSampler(inner, self.left_out if self._mode == "skip" else ())
            vars(loader)[name] = self._sampler

    def _refuse(self, what: str) -> None:
        if self._mode == "skip":
            raise ConflictError(
                f"`quarantine='skip'` needs one torch DataLoader over a map-style data set, whose sampler shows which "
                f"samples a batch has, got {what}. Use `quarantine='list'`, which then lists batches without their samples."
            )


def _of_all_ranks(incidents: list[Incident]) -> list[Incident]:
    ranks = Ranks.current()
    if ranks.size == 1:
        return incidents
    found: list[Any] = [None] * ranks.size
    dist.all_gather_object(found, incidents)
    return [incident for of_rank in found for incident in of_rank]
