"""Which sinks a Trainer's loggers and folder ask for."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from lightning_gradguard.errors import SinkWarning, type_and_text
from lightning_gradguard.sinks import (
    ConsoleSink,
    CsvSink,
    JsonlSink,
    LoggerSink,
    MlflowSink,
    Notify,
    Sink,
    TensorBoardSink,
    WandbSink,
)
from lightning_gradguard.sinks.tags import LoggedNorms
from lightning_gradguard.trainer.packages import rank_zero_info, silences_loggers
from lightning_gradguard.trainer.run_folder import is_elsewhere, run_folder

if TYPE_CHECKING:
    from lightning.pytorch import Trainer
    from lightning.pytorch.loggers import Logger


def all_sinks(
    trainer: Trainer, own: Sequence[Sink], settings: Mapping[str, str], norms: LoggedNorms = "groups"
) -> tuple[Sink, ...]:
    """`alerts.jsonl`, one sink a logger, the user's own, and the console; on other ranks than the first none.

    Must be called on all ranks, since the Trainer agrees on its folder between them.

    Args:
        trainer: whose loggers and folder.
        own: the user's.
        settings: of the guard, in words.
        norms: of what norms the loggers get.
    """
    log_dir, folder = trainer.log_dir, run_folder(trainer)
    if not trainer.is_global_zero:
        return ()
    for each in own:
        if isinstance(each, Notify) and log_dir is not None:
            each.begin(str(log_dir))
    built_in: list[Sink] = []
    if not trainer.fast_dev_run:  # type: ignore[attr-defined]  # set by a connector
        if folder is not None:
            if is_elsewhere(str(log_dir)):
                rank_zero_info(f"GradGuard writes alerts and bundles to {folder}, since {log_dir} is not on this machine.")
            built_in.append(JsonlSink(folder / "alerts.jsonl"))
        loggers = [] if silences_loggers() else trainer.loggers
        built_in.extend(sink for logger in loggers if (sink := _built(logger, settings, norms)) is not None)
    # The console comes last: where warnings are errors it raises, and the others must have the alert by then.
    return (*built_in, *own, ConsoleSink())


def _built(logger: Logger, settings: Mapping[str, str], norms: LoggedNorms) -> Sink | None:
    """The logger's sink; None, and a warning, if it can't be made."""
    try:
        return _of_logger(logger, settings, norms)
    except Exception as error:
        if isinstance(error, Warning):
            raise  # The user has turned warnings into errors, so this is what was asked for.
        warnings.warn(
            f"There is no sink for {type(logger).__name__} ({type_and_text(error)}). Training goes on; what the "
            "guard sees is not logged there.",
            SinkWarning,
            stacklevel=2,
        )
        return None


def _of_logger(logger: Logger, settings: Mapping[str, str], norms: LoggedNorms) -> Sink:
    # By name, since `lightning` and `pytorch_lightning` have distinct classes.
    names = {cls.__name__ for cls in type(logger).__mro__}
    if "TensorBoardLogger" in names:
        return TensorBoardSink(lambda: logger.experiment, settings, norms=norms)  # type: ignore[attr-defined]  # of the subclass
    if "WandbLogger" in names:
        return WandbSink(logger, importlib.import_module("wandb").Histogram, norms=norms)
    if "MLFlowLogger" in names:
        return MlflowSink(logger, norms=norms)
    if "CSVLogger" in names:
        return CsvSink(logger, norms=norms)
    return LoggerSink(logger, norms=norms)
