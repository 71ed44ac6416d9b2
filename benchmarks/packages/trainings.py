"""The trainings: data that is made up here, and a small model of each package, which trains it as its documentation says.

Nothing of the packages is changed. Callbacks and further arguments of the Trainer go through each package's own parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

QUIET = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
SERIES, LENGTH = 40, 120


@dataclass(frozen=True)
class Training:
    """A package, and how it trains."""

    module: str
    """What is imported to see whether it is there."""

    train: Callable[..., object]
    """Called with callbacks and with further keywords for the Trainer; `damaged=True` writes NaN into one row."""

    epochs: int
    """Enough for a few hundred steps, so that each detector's window is full."""

    sets_clipping: bool = False
    """Whether the package itself gives its Trainer a `gradient_clip_val`."""


def scvi(callbacks: list[Any], *, damaged: bool = False, **trainer: Any) -> None:
    """SCVI, a variational autoencoder, on counts of 400 cells; a gene of cell 17 is NaN."""
    import anndata
    from scvi import settings
    from scvi.model import SCVI

    settings.seed = 0  # None draws the order of the cells from the system

    counts = np.random.default_rng(0).poisson(2.0, (400, 50)).astype(np.float32)
    if damaged:
        counts[17, 3] = np.nan
    data = anndata.AnnData(counts)
    SCVI.setup_anndata(data)
    SCVI(data).train(train_size=1.0, batch_size=64, callbacks=callbacks, **(QUIET | trainer))


def gluonts(callbacks: list[Any], *, damaged: bool = False, **trainer: Any) -> None:
    """DeepAR, an autoregressive network, on 40 series; a dynamic feature of series 7 is NaN."""
    import pandas as pd
    from gluonts.dataset.common import ListDataset
    from gluonts.torch import DeepAREstimator

    random = np.random.default_rng(0)
    series = []
    for number in range(SERIES):
        features = random.normal(size=(1, LENGTH)).astype(np.float32)
        if damaged and number == 7:
            features[0, :] = np.nan
        target = random.normal(size=LENGTH).cumsum()
        start = pd.Period("2024-01-01", freq="D")
        series.append({"start": start, "target": target, "feat_dynamic_real": features})
    estimator = DeepAREstimator(
        freq="D",
        prediction_length=7,
        num_feat_dynamic_real=1,
        batch_size=16,
        num_batches_per_epoch=10,
        trainer_kwargs={"callbacks": callbacks, **QUIET, **trainer},
    )
    estimator.train(ListDataset(series, freq="D"))


def pytorch_forecasting(callbacks: list[Any], **trainer: Any) -> None:
    """A temporal fusion transformer on 40 series, with the optimizer that is its default."""
    import pandas as pd
    from lightning.pytorch import Trainer
    from pytorch_forecasting import TemporalFusionTransformer, TimeSeriesDataSet
    from pytorch_forecasting.metrics import QuantileLoss

    random = np.random.default_rng(0)
    time = np.arange(LENGTH)
    values = [np.sin(time / random.uniform(2, 6)) + 0.1 * random.normal(size=LENGTH) for _ in range(SERIES)]
    frame = pd.DataFrame(
        {
            "series": np.repeat([str(number) for number in range(SERIES)], LENGTH),
            "time": np.tile(time, SERIES),
            "value": np.concatenate(values),
        }
    )
    data = TimeSeriesDataSet(
        frame,
        time_idx="time",
        target="value",
        group_ids=["series"],
        max_encoder_length=24,
        max_prediction_length=6,
        time_varying_unknown_reals=["value"],
        time_varying_known_reals=["time"],
    )
    model = TemporalFusionTransformer.from_dataset(
        data, hidden_size=8, attention_head_size=2, hidden_continuous_size=4, learning_rate=0.01, loss=QuantileLoss()
    )
    settings = {**QUIET, "enable_checkpointing": False, "limit_train_batches": 40, **trainer}
    Trainer(callbacks=callbacks, **settings).fit(model, data.to_dataloader(train=True, batch_size=32))


def chemprop(callbacks: list[Any], **trainer: Any) -> None:
    """A message passing network on 200 alkanes and alcohols; the target is a count of their atoms, with noise."""
    from chemprop import data, models, nn
    from lightning.pytorch import Trainer

    random = np.random.default_rng(0)
    points = []
    for _ in range(200):
        lengths = random.integers(1, 8, size=3)
        smiles = "C" * lengths[0] + "C(" + "C" * lengths[1] + ")" + "O" * int(random.integers(0, 2)) + "C" * lengths[2]
        points.append(data.MoleculeDatapoint.from_smi(smiles, [float(lengths.sum()) + random.normal()]))
    dataset = data.MoleculeDataset(points)
    scaler = dataset.normalize_targets()
    output = nn.UnscaleTransform.from_standard_scaler(scaler)
    model = models.MPNN(
        nn.BondMessagePassing(d_h=32), nn.MeanAggregation(), nn.RegressionFFN(input_dim=32, output_transform=output)
    )
    loader = data.build_dataloader(dataset, batch_size=20, num_workers=0, seed=0)
    Trainer(callbacks=callbacks, **{**QUIET, "enable_checkpointing": False, **trainer}).fit(model, loader)


def darts(callbacks: list[Any], **trainer: Any) -> None:
    """N-BEATS on one series with a season; under `pytorch_lightning`."""
    from darts import TimeSeries
    from darts.models import NBEATSModel

    random = np.random.default_rng(0)
    time = np.arange(600)
    values = np.sin(time / 4) + 0.1 * random.normal(size=600)
    model = NBEATSModel(
        input_chunk_length=24,
        output_chunk_length=6,
        num_stacks=2,
        num_blocks=1,
        num_layers=2,
        layer_widths=32,
        batch_size=32,
        n_epochs=trainer.pop("max_epochs"),
        random_state=0,
        pl_trainer_kwargs={"callbacks": callbacks, **QUIET, **trainer},
    )
    model.fit(TimeSeries.from_values(values.astype(np.float32)))


def neuralforecast(callbacks: list[Any], **trainer: Any) -> None:
    """NHITS on 40 series, under `pytorch_lightning`. One epoch is one batch of series."""
    import pandas as pd
    from neuralforecast import NeuralForecast
    from neuralforecast.models import NHITS

    random = np.random.default_rng(0)
    days = pd.date_range("2024-01-01", periods=LENGTH)
    frames = [
        pd.DataFrame(
            {"unique_id": str(number), "ds": days, "y": np.sin(np.arange(LENGTH) / 4) + 0.1 * random.normal(size=LENGTH)}
        )
        for number in range(SERIES)
    ]
    steps = trainer.pop("max_epochs")
    model = NHITS(h=6, input_size=24, max_steps=steps, mlp_units=[[32, 32]] * 3, callbacks=callbacks, **QUIET, **trainer)
    NeuralForecast(models=[model], freq="D").fit(pd.concat(frames))


TRAININGS = {
    "scvi-tools": Training("scvi", scvi, epochs=40),
    "gluonts": Training("gluonts", gluonts, epochs=30, sets_clipping=True),
    "pytorch-forecasting": Training("pytorch_forecasting", pytorch_forecasting, epochs=6),
    "chemprop": Training("chemprop", chemprop, epochs=30),
    "darts": Training("darts", darts, epochs=16),
    "neuralforecast": Training("neuralforecast", neuralforecast, epochs=250),
}
