"""Runs a function in several processes that form one gloo group, and brings its results back."""

from __future__ import annotations

import json
import logging
import os
import socket
import tempfile
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed, multiprocessing

_TIMEOUT = timedelta(seconds=120)


def on_ranks(num_ranks: int, work: Callable[..., Any], *args: Any) -> list[Any]:
    """What `work(*args)` returns on each rank; plain data, by rank.

    Warnings are silent in there: the guard warns of every fault that a test injects.
    """
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(_enter, (num_ranks, _free_port(), folder, (work, args)), nprocs=num_ranks)
        return [json.loads((Path(folder) / str(rank)).read_text()) for rank in range(num_ranks)]


def _enter(rank: int, num_ranks: int, port: int, folder: str, job: tuple[Callable[..., Any], tuple[Any, ...]]) -> None:
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": rank, "WORLD_SIZE": num_ranks, "LOCAL_RANK": rank}
    os.environ |= {name: str(value) for name, value in place.items()} | {"NODE_RANK": "0"}
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    distributed.init_process_group("gloo", timeout=_TIMEOUT)
    work, args = job
    found = work(*args)
    (Path(folder) / str(rank)).write_text(json.dumps(found))
    distributed.barrier()
    distributed.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
