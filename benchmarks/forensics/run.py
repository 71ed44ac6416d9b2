"""Runs a labelled step in a real fit, and compares what was said with the truth."""

from __future__ import annotations

import random
import re
import warnings
from dataclasses import dataclass
from tempfile import TemporaryDirectory

import numpy as np
import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader

from benchmarks.forensics.labels import Case
from lightning_gradguard import GradGuard
from lightning_gradguard.alert import Culprit
from lightning_gradguard.forensics.nonfinite.trial import Trial


@dataclass(frozen=True)
class Outcome:
    """What was said of a case.

    Attributes:
        case: which.
        culprit: who was named; None if nobody was.
        wrong: what is not as the label has it, in words.
        false: statements that are not true.
        remedy: "works", "fails" or "not applied"; "" where there is none.
    """

    case: Case
    culprit: Culprit | None
    wrong: tuple[str, ...]
    false: tuple[str, ...]
    remedy: str = ""

    @property
    def has_wrong_samples(self) -> bool:
        """Whether samples are said to be certain that are not the bad ones."""
        return self._differs(self.culprit.samples if self.culprit else None)

    @property
    def has_wrong_guess(self) -> bool:
        """Whether samples are said to be probable that are not the bad ones."""
        return self._differs(self.culprit.probable_samples if self.culprit else None)

    def _differs(self, samples: tuple[int, ...] | None) -> bool:
        return not self.case.has_open_samples and samples not in (None, self.case.samples)

    @property
    def lacks_remedy(self) -> bool:
        """Whether none is told where there is one."""
        return self.case.needs_remedy and not self.remedy

    @property
    def is_exact(self) -> bool:
        """Whether phase, module, operator, line and helper are right, or nobody is named where all is in order."""
        return not self.wrong


def judge(case: Case) -> Outcome:
    """One step, and what was said of it."""
    culprit, has_alert = _fit(case)
    if case.phase == "none":
        return Outcome(case, culprit, () if not has_alert else ("an alert on a healthy step",), ())
    if case.phase == "nobody":
        is_right = culprit is None or culprit.cause == "foreign"
        said = "" if has_alert and is_right else f"{culprit.op} in {culprit.module!r} is named" if culprit else "no alert"
        return Outcome(case, culprit, (said,) if said else (), () if is_right else (said,))
    if culprit is None:
        return Outcome(case, None, ("nobody is named" if has_alert else "no alert",), ())
    return Outcome(case, culprit, tuple(_wrong(case, culprit)), tuple(_false(case, culprit)), _try_remedy(case, culprit))


def _fit(case: Case) -> tuple[Culprit | None, bool]:
    """The culprit of one step, and whether there was an alert at all."""
    torch.manual_seed(7)
    random.seed(7)
    np.random.seed(7)  # noqa: NPY002 - what the cases draw from
    module = case.make()
    guard = GradGuard(**case.guard)
    folder = TemporaryDirectory()
    silent = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = Trainer(max_steps=1, callbacks=[guard], accelerator="cpu", devices=1, default_root_dir=folder.name, **silent)
    with folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, DataLoader([module.batch()], batch_size=None, collate_fn=lambda batch: batch))
    alerts = [alert for alert in guard.alerts if alert.kind == "nonfinite"]
    return alerts[0].culprit if alerts else None, bool(alerts)


def _try_remedy(case: Case, culprit: Culprit) -> str:
    if culprit.phase not in ("forward", "backward") or not culprit.remedy:
        return ""
    trial = Trial(culprit)
    try:
        with trial:
            _, has_alert = _fit(case)
    except Exception as error:  # noqa: BLE001 - of whatever kind, the remedy is no good
        return f"fails with {error}"
    if not trial.is_whole:
        return "not applied"
    return "fails" if has_alert else "works"


def _wrong(case: Case, culprit: Culprit):
    for name in ("phase", "module"):
        found, truth = getattr(culprit, name), getattr(case, name)
        if not (found.startswith(truth[:-1]) if truth.endswith("*") else found == truth):
            yield f"{name} {found!r}"
    if case.phase in ("forward", "backward"):
        if case.ops and culprit.op not in case.ops.split():
            yield f"operator {culprit.op}"
        if case.lines and (culprit.file, culprit.line) not in case.lines:
            yield f"line {culprit.line}: {culprit.source}"
    if case.helper and (not culprit.frames or culprit.frames[0].function != case.helper):
        yield f"helper {culprit.frames[0].function if culprit.frames else None}"
    yield from (f"{part!r} is not said" for part in case.says if part not in culprit.message)
    if not culprit.reproduced:
        yield "not reproduced"


def _false(case: Case, culprit: Culprit):
    yield from (part for part in case.never if part in culprit.message)
    if "finite inputs" in culprit.message and any(re.search(r"\d (NaN|Inf)", text) for text in culprit.inputs):
        yield "inputs are said to be finite that are not"
