"""Which sinks a Trainer's loggers and folder ask for."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import Trainer

from lightning_gradguard.sinks import ConsoleSink, JsonlSink, LoggerSink, Sink, TensorBoardSink


def built_in_sinks(trainer: Trainer) -> list[Sink]:
    """Console, `alerts.jsonl` and one sink a logger; on other ranks than the first none.

    Must be called on all ranks, since the Trainer agrees on its folder between them.
    """
    log_dir = trainer.log_dir
    if not trainer.is_global_zero:
        return []
    sinks: list[Sink] = [ConsoleSink()]
    if trainer.fast_dev_run:  # type: ignore[attr-defined]  # set by a connector
        return sinks
    if log_dir is not None:
        sinks.append(JsonlSink(Path(log_dir) / "gradguard" / "alerts.jsonl"))
    for logger in trainer.loggers:
        # By name, since `lightning` and `pytorch_lightning` have distinct classes.
        if any(cls.__name__ == "TensorBoardLogger" for cls in type(logger).__mro__):
            sinks.append(TensorBoardSink(lambda logger=logger: logger.experiment))  # type: ignore[misc]
        else:
            sinks.append(LoggerSink(logger))
    return sinks
