"""Writes bad steps as bundles into the run's folder."""

from __future__ import annotations

import itertools
import shlex
import warnings
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from torch import distributed

from lightning_gradguard.alert import KEPT, Alert
from lightning_gradguard.errors import SinkWarning, type_and_text
from lightning_gradguard.forensics.bundle import SUFFIX, Bundle, as_plain, versions
from lightning_gradguard.measure.distributed import is_sharded
from lightning_gradguard.report.alerting import INVESTIGATED
from lightning_gradguard.trainer.packages import rank_zero_info
from lightning_gradguard.trainer.replay.diagnosis import Diagnosis
from lightning_gradguard.trainer.replay.window import Window
from lightning_gradguard.trainer.run_folder import run_folder

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

MAX_BUNDLES = 3
"""Kept in a folder at most: the first ones, since what comes later mostly follows from them."""


class Bundles:
    """Writes up to three bundles a run. A failure is a warning; training goes on.

    Must be made on all ranks, since the Trainer agrees on its folder between them. One rank writes it: the one to
    blame, else the first.

    Args:
        trainer: the Trainer.
        module: the one that is trained.
        window: the running micro-batches.
        diagnosis: what it remembers of healthy steps.
        max_mib: size of a bundle at most, in MiB.
        guard: the guard's configuration, in words.
    """

    def __init__(
        self,
        trainer: Trainer,
        module: LightningModule,
        window: Window,
        diagnosis: Diagnosis,
        *,
        max_mib: float,
        guard: dict[str, str],
    ) -> None:
        self._trainer = trainer
        self._module = module
        self._window = window
        self._diagnosis = diagnosis
        self._room = int(max_mib * 2**20)
        self._guard = guard
        self._folder = run_folder(trainer)
        self._has_failed = False
        self._has_written = False
        self._has_told = False

    def write(self, alerts: tuple[Alert, ...], *, is_alone: bool = False) -> tuple[Alert, ...]:
        """Write the step of these alerts, before the optimizer applies it.

        A collective if there are several ranks, unless `is_alone`.

        Returns:
            The alerts; the one whose step was written says where, and how to replay it.
        """
        # Only findings have a limit above 0; that one is over is no reason to keep a step.
        alert = next((alert for alert in alerts if alert.kind in INVESTIGATED and alert.limit > 0.0), None)
        if alert is None or self._folder is None:
            return alerts
        path = self._written(alert) if _writer(alert) == self._trainer.global_rank else None
        paths = [path]
        if self._trainer.world_size > 1 and not is_alone:
            paths = [None] * self._trainer.world_size
            distributed.all_gather_object(paths, path)
        path = next((path for path in paths if path is not None), None)
        if path is None:
            return alerts
        if not self._has_told:
            self._has_told = True
            rank_zero_info(f"GradGuard: {path} holds batches of your data. `max_bundle_mib=None` writes no such files.")
        told = replace(alert, message=f"{alert.message}{KEPT}{shlex.quote(path)}`.")
        return tuple(told if it is alert else it for it in alerts)

    def _written(self, alert: Alert) -> str | None:
        """Write a bundle; its path, or None if there are enough already, or it failed."""
        assert self._folder is not None
        rank = f"-rank{_writer(alert)}" if self._trainer.world_size > 1 else ""
        path = self._folder / f"{alert.kind}-step{alert.step}{rank}{SUFFIX}"
        try:
            if len(list(self._folder.glob(f"*{SUFFIX}"))) >= MAX_BUNDLES:
                self._tell_if_others_are_in_the_way()
                return None
            if not self._trainer.ckpt_path:  # a resumed run takes steps again, and with them their files
                path = _free(path)
            self._collect(alert).save(path)
            self._has_written = True
        except Exception as error:  # noqa: BLE001 - whatever goes wrong here, training goes on
            if not self._has_failed:
                self._has_failed = True
                warnings.warn(
                    f"The step could not be written as a bundle ({type_and_text(error)}). Training goes on without "
                    "it. Later ones are tried, and further failures are not shown. `max_bundle_mib=None` turns bundles off.",
                    SinkWarning,
                    stacklevel=2,
                )
            return None
        return str(path)

    def _tell_if_others_are_in_the_way(self) -> None:
        if not (self._has_written or self._has_told or self._trainer.ckpt_path):
            self._has_told = True
            rank_zero_info(
                f"GradGuard: {self._folder} holds {MAX_BUNDLES} bundles of other runs, and no more are written there. Move "
                "them, or log to another folder."
            )

    def _collect(self, alert: Alert) -> Bundle:
        optimizer, diagnosis = self._trainer.optimizers[alert.optimizer], self._diagnosis
        bundle = Bundle(alert.to_dict(), self._guard, versions())
        batches = [
            {"batch": it.batch, "batch_idx": it.batch_idx, "rng": it.rng, "cuda_rng": it.cuda_rng}
            for it in self._window.of(optimizer, alert.step)
        ]
        if self._window.is_held(alert.step) and not alert.action.skips:
            bundle.left_out.append(
                "weights from before the step: the device had applied it before the host knew; these are later"
            )
        # What counts most comes first.
        room = bundle.take("batches", batches, self._room)
        healthy = diagnosis.healthy_batch(optimizer)
        room = room if healthy is None else bundle.take("healthy", healthy, room)
        if is_sharded([*self._module.parameters()]):
            bundle.left_out.append("model, optimizer: sharded over the ranks")
            return bundle
        room = bundle.take("model", self._module.state_dict(), room)
        try:
            bundle.take("optimizer", optimizer.state_dict(), room)
        except KeyError:  # torch's own, where parameters were replaced and the old ones' state is still there
            bundle.left_out.append("optimizer: it has state of parameters that it no longer trains")
        bundle.weight_growths = as_plain(diagnosis.weight_growths(optimizer))
        bundle.healthy_norms = diagnosis.healthy_norms(optimizer)
        bundle.is_from_start = diagnosis.is_from_start
        return bundle


def _free(path: Path) -> Path:
    """The path, or the next one of which there is no file: another run in the same folder may have had such a step."""
    stem = path.name.removesuffix(SUFFIX)
    others = (path.with_name(f"{stem}-{number}{SUFFIX}") for number in itertools.count(2))
    return next(each for each in itertools.chain([path], others) if not each.exists())


def _writer(alert: Alert) -> int:
    """The rank whose batch it is; the same answer on all of them."""
    if alert.culprit is not None:
        return alert.culprit.rank
    # Of finite gradients each rank says that it was first.
    return alert.rank if alert.kind == "nonfinite" else 0
