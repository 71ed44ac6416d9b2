"""Trainings of packages that are built on Lightning: healthy ones with and without the guard, and with NaN in the data."""

from __future__ import annotations

import importlib.util
import logging
import os
import random
import tempfile
import warnings
from importlib.metadata import version

import numpy as np
import torch

from benchmarks._report import begin, parser, table
from benchmarks.packages import compared, damaged
from benchmarks.packages.trainings import TRAININGS


def main() -> None:
    """All packages that are installed."""
    arguments = parser(__doc__)
    arguments.add_argument(
        "--only", choices=tuple(TRAININGS), action="append", help="some packages; more than once for several"
    )
    chosen = arguments.parse_args()
    console = begin(chosen)
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "pytorch_lightning", "lightning.fabric", "scvi"):
        logging.getLogger(name).setLevel(logging.ERROR)
    there = {
        name: training
        for name, training in TRAININGS.items()
        if name in (chosen.only or TRAININGS) and importlib.util.find_spec(training.module)
    }
    missing = [name for name in TRAININGS if name not in there]
    console.print("Trained: " + (", ".join(f"{name} {version(name)}" for name in there) or "none"))
    console.print("Not installed, or not asked for: " + (", ".join(missing) or "none"))
    healthy, ends, told = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for name, training in there.items():
            rows, messages = compared.rows_and_messages(name, training)
            healthy.extend(rows)
            told.extend(messages)
            if name in damaged.NAMES:
                random.seed(0)
                np.random.seed(0)  # noqa: NPY002 - gluonts draws from it
                torch.manual_seed(0)
                rows, message = damaged.rows_and_message(name, training)
                ends.extend(rows)
                told.append(f"{name}, NaN in the data: {message}")
        os.chdir("/")
    console.print(table("The same seeds with the guard and without", compared.COLUMNS, healthy))
    console.print(table("NaN in one row of the data", damaged.COLUMNS, ends))
    for message in told:
        console.print(message, soft_wrap=True, markup=False)


if __name__ == "__main__":
    main()
