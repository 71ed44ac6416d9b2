"""Where records go: one file each."""

from lightning_gradguard.sinks.base import FunctionSink, Sink
from lightning_gradguard.sinks.console import ConsoleSink
from lightning_gradguard.sinks.jsonl import JsonlSink
from lightning_gradguard.sinks.logger import CsvSink, LoggerSink, MlflowSink, WandbSink
from lightning_gradguard.sinks.notify import Notify
from lightning_gradguard.sinks.tensorboard import TensorBoardSink

__all__ = [
    "ConsoleSink",
    "CsvSink",
    "FunctionSink",
    "JsonlSink",
    "LoggerSink",
    "MlflowSink",
    "Notify",
    "Sink",
    "TensorBoardSink",
    "WandbSink",
]
