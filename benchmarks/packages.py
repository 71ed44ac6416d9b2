"""Packages whose training ends in an exception of torch because of NaN in one row: without the guard, and with it.

The row is written before the training begins; which of a batch it is, a callback notes from the batch itself. Nothing of the
packages is changed; the guard is passed through their own arguments. `pip install -e '.[packages]'`.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks._report import begin, parser, table
from lightning_gradguard import GradGuard
from lightning_gradguard.trainer.packages import Callback

EPOCHS = 3


class DamagedRows(Callback):
    """Notes which rows of each batch hold NaN, and how many steps there were."""

    def __init__(self) -> None:
        self.rows: dict[int, set[int]] = {}
        self.num_batches = 0

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Look at the batch."""
        self.rows[self.num_batches] = set().union(*map(_damaged_rows, _tensors(batch)))
        self.num_batches += 1


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor) and value.is_floating_point():
        yield value
    elif isinstance(value, Mapping):
        for entry in value.values():
            yield from _tensors(entry)


def _damaged_rows(tensor: Tensor) -> set[int]:
    return set(tensor.flatten(1).isnan().any(1).nonzero().flatten().tolist()) if tensor.dim() > 1 else set()


def scvi(callbacks: list[Any]) -> None:
    """SCVI, a variational autoencoder, on counts of 400 cells; a gene of cell 17 is NaN."""
    import anndata
    from scvi.model import SCVI

    counts = np.random.default_rng(0).poisson(2.0, (400, 50)).astype(np.float32)
    counts[17, 3] = np.nan
    data = anndata.AnnData(counts)
    SCVI.setup_anndata(data)
    SCVI(data).train(max_epochs=EPOCHS, accelerator="cpu", train_size=1.0, batch_size=64, callbacks=callbacks)


def gluonts(callbacks: list[Any]) -> None:
    """DeepAR, an autoregressive network, on 40 series; a dynamic feature of series 7 is NaN."""
    import pandas as pd
    from gluonts.dataset.common import ListDataset
    from gluonts.torch import DeepAREstimator

    random, length = np.random.default_rng(0), 120
    series = []
    for number in range(40):
        features = random.normal(size=(1, length)).astype(np.float32)
        if number == 7:
            features[0, :] = np.nan
        target = random.normal(size=length).cumsum()
        start = pd.Period("2024-01-01", freq="D")
        series.append({"start": start, "target": target, "feat_dynamic_real": features})
    estimator = DeepAREstimator(
        freq="D",
        prediction_length=7,
        num_feat_dynamic_real=1,
        batch_size=16,
        num_batches_per_epoch=10,
        trainer_kwargs={
            "max_epochs": EPOCHS,
            "callbacks": callbacks,
            "accelerator": "cpu",
            "logger": False,
            "enable_progress_bar": False,
        },
    )
    estimator.train(ListDataset(series, freq="D"))


PACKAGES: dict[str, tuple[str, Callable[[list[Any]], None]]] = {
    "scvi-tools": ("scvi", scvi),
    "gluonts": ("gluonts", gluonts),
}


def outcome(train: Callable[[list[Any]], None], guard: GradGuard | None) -> list[str]:
    """How a training ends, and what the guard says of the batches with NaN."""
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002 - gluonts draws from it
    noted = DamagedRows()
    try:
        train([noted] if guard is None else [noted, guard])
        end = "finished"
    except Exception as error:  # noqa: BLE001 - it is the finding
        end = f"{type(error).__name__}: {str(error).splitlines()[0][:60]}"
    num_damaged = sum(1 for rows in noted.rows.values() if rows)
    row = [end, str(noted.num_batches), str(num_damaged)]
    if guard is None:
        return [*row, "", "", ""]
    culprits = [(alert.step, alert.culprit) for alert in guard.alerts if alert.kind == "nonfinite"]
    right = sum(
        1 for step, it in culprits if it and set(it.samples or it.probable_samples or ()) == noted.rows.get(step, set())
    )
    first = next((alert.message for alert in guard.alerts), "")
    return [*row, str(guard.num_skipped), f"{right} of {len(culprits)}", first]


def main() -> None:
    """All packages that are installed."""
    chosen = parser(__doc__).parse_args()
    console = begin(chosen)
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "pytorch_lightning", "lightning.fabric", "scvi"):
        logging.getLogger(name).setLevel(logging.ERROR)
    rows, told = [], []
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for name, (module, train) in PACKAGES.items():
            if importlib.util.find_spec(module) is None:
                rows.append([name, "not installed", *[""] * 5])
                continue
            for guard in (None, GradGuard(max_replays=100, max_bundle_mib=None)):
                *figures, message = outcome(train, guard)
                rows.append([f"{name}, {'without' if guard is None else 'with'} the guard", *figures])
                if message:
                    told.append(f"{name}: {message}")
        os.chdir("/")
    columns = ["training", "end", "batches", "with NaN", "skipped", "alerts with the right rows"]
    console.print(table("One NaN in the data", columns, [row[: len(columns)] for row in rows]))
    for message in told:
        console.print(message, soft_wrap=True)


if __name__ == "__main__":
    main()
