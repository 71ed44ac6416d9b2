"""What a training leaves in TensorBoard's event file."""

from __future__ import annotations

import html
import math
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from lightning_package import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.plugins.custom_scalar import layout_pb2
from toys import Net, fit, make_batches

from lightning_gradguard import Explosion, GradGuard, GradientWarning

SCALARS = ("global_norm", "clipped_norm", "clip_coef", "explosion_limit", "num_skipped", "num_clipped", "num_alerts")
PARAMETERS = ("body.weight", "body.bias", "head.weight", "head.bias")


class Events:
    """One event file, read back."""

    def __init__(self, logger: TensorBoardLogger) -> None:
        self.accumulator = EventAccumulator(logger.log_dir, {"tensors": 0, "histograms": 0, "scalars": 0}).Reload()
        self.tags = self.accumulator.Tags()
        (path,) = Path(logger.log_dir).glob("events.out.tfevents.*")
        self.raw = [event for event in EventFileLoader(str(path)).Load() if event.HasField("summary")]

    def steps(self, tag: str) -> list[int]:
        """The x values of a scalar."""
        return [event.step for event in self.accumulator.Scalars(tag)]

    def values(self, tag: str) -> list[float]:
        """The y values of a scalar."""
        return [event.value for event in self.accumulator.Scalars(tag)]

    def histogram_steps(self, tag: str) -> list[int]:
        """The x values of a histogram."""
        return [event.step for event in self.accumulator.Histograms(tag)]


def _train(root, guard, faults=None, *, count=24, **settings):
    """Fit with a TensorBoard logger; its events."""
    logger = TensorBoardLogger(root)
    module = Net(faults, log=True)
    if faults:
        with pytest.warns(GradientWarning, match="at step"):
            fit(root, module, guard, batches=make_batches(count), logger=logger, **settings)
    else:
        fit(root, module, guard, batches=make_batches(count), logger=logger, **settings)
    return Events(logger)


@pytest.mark.smoke
def test_tensorboard_has_every_tag_of_the_contract_with_its_kind(tmp_path):
    """Scalars, groups, histograms of norms and of elements, alerts as text, and the page."""
    events = _train(tmp_path, GradGuard(clip=0.5, histogram_every_n_steps=8), {20: "nan"})
    assert {f"gradguard/{name}" for name in SCALARS} <= set(events.tags["scalars"])
    assert {"gradguard/norm/body", "gradguard/norm/head"} <= set(events.tags["scalars"])
    assert {"gradguard/log10_norms", *(f"gradients/{name}" for name in PARAMETERS)} <= set(events.tags["histograms"])
    assert {"gradguard/alerts", "custom_scalars__config__"} <= set(events.tags["tensors"])


def test_tensorboard_kinds_are_known_to_its_plugins(tmp_path):
    """TensorBoard finds scalars, histograms, text and custom scalars by the plugin's name in the metadata."""
    accumulator = _train(tmp_path, GradGuard(histogram_every_n_steps=8), {20: "nan"}).accumulator
    kinds = {
        "gradguard/global_norm": "scalars",
        "gradguard/log10_norms": "histograms",
        "gradguard/alerts": "text",
        "custom_scalars__config__": "custom_scalars",
    }
    assert {tag: accumulator.SummaryMetadata(tag).plugin_data.plugin_name for tag in kinds} == kinds


@pytest.mark.parametrize("interval", [1, 3, 50])
def test_tensorboard_x_axis_equals_that_of_lightnings_own_scalars(interval, tmp_path):
    """The same steps as `self.log`, whatever the Trainer's cadence."""
    events = _train(tmp_path, GradGuard(), log_every_n_steps=interval, count=60)
    assert events.steps("gradguard/global_norm") == events.steps("train_loss")
    assert len(events.steps("train_loss")) == 60 // interval


@pytest.mark.parametrize("interval", [1, 2])
def test_tensorboard_x_axis_under_accumulation_equals_that_of_lightnings_own_scalars(interval, tmp_path):
    """Steps, not batches; two epochs with a partial last window each."""
    settings = {"accumulate_grad_batches": 4, "log_every_n_steps": interval, "max_epochs": 2}
    events = _train(tmp_path, GradGuard(), count=22, **settings)
    assert events.steps("gradguard/global_norm") == events.steps("train_loss")


def test_tensorboard_x_axis_in_manual_optimization_equals_that_of_lightnings_own_scalars(tmp_path):
    """One point a batch."""

    class Manual(Net):
        def __init__(self) -> None:
            super().__init__(log=True)
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()

    logger = TensorBoardLogger(tmp_path)
    fit(tmp_path, Manual(), GradGuard(), logger=logger, log_every_n_steps=2)
    events = Events(logger)
    assert events.steps("gradguard/global_norm") == events.steps("train_loss")


def test_tensorboard_step_with_an_alert_is_always_written(tmp_path):
    """The spike is in the picture although its step is not due."""
    events = _train(tmp_path, GradGuard(explosion=Explosion("warn", max_norm=1e3)), {13: "huge"}, log_every_n_steps=10)
    assert events.steps("gradguard/global_norm") == [9, 13, 19]
    assert events.values("gradguard/global_norm")[1] > 1e3
    assert events.values("gradguard/num_alerts") == [0, 1, 1]
    assert events.steps("train_loss") == [9, 19]


def test_tensorboard_skipped_step_is_written_with_its_nan(tmp_path):
    """Nothing is dropped: the norm is NaN there."""
    events = _train(tmp_path, GradGuard(), {5: "nan"}, count=8)
    assert math.isnan(events.values("gradguard/global_norm")[5])
    assert events.values("gradguard/num_skipped") == [0, 0, 0, 0, 0, 1, 1, 1]


def test_tensorboard_values_are_those_of_the_records(tmp_path):
    """The curve is what the guard measured, in float32."""
    seen = []
    events = _train(tmp_path, GradGuard(clip=0.5, sinks=[seen.append]))
    assert events.values("gradguard/global_norm") == pytest.approx([r.measurement.global_norm for r in seen])
    assert events.values("gradguard/clipped_norm") == pytest.approx([r.clipped_norm for r in seen])
    assert events.values("gradguard/clip_coef") == pytest.approx([r.clip_coef for r in seen])
    assert events.values("gradguard/num_clipped") == [r.totals.num_clipped for r in seen]


def test_tensorboard_explosion_limit_appears_after_the_warm_up(tmp_path):
    """There is no limit before there is a history, and no point at infinity either."""
    events = _train(tmp_path, GradGuard())
    assert events.steps("gradguard/explosion_limit") == list(range(16, 24))


def test_tensorboard_log_every_n_steps_of_the_guard_overrides_the_trainers(tmp_path):
    """Scalars at 3, 7, 11 ...; Lightning's own at every step."""
    events = _train(tmp_path, GradGuard(log_every_n_steps=4))
    assert events.steps("gradguard/global_norm") == [3, 7, 11, 15, 19, 23]
    assert len(events.steps("train_loss")) == 24


def test_tensorboard_log_every_zero_steps_writes_alerts_only(tmp_path):
    """0 switches the curves off, not the alerts."""
    events = _train(tmp_path, GradGuard(log_every_n_steps=0, histogram_every_n_steps=None), {5: "nan"})
    assert events.steps("gradguard/global_norm") == [5]
    assert "gradguard/alerts" in events.tags["tensors"]


def test_tensorboard_histogram_every_n_steps_is_honoured(tmp_path):
    """Every tenth step."""
    events = _train(tmp_path, GradGuard(histogram_every_n_steps=10))
    assert all(events.histogram_steps(f"gradients/{name}") == [9, 19] for name in PARAMETERS)


def test_tensorboard_histograms_off_leaves_only_those_of_the_norms(tmp_path):
    """`histogram_every_n_steps=None`."""
    events = _train(tmp_path, GradGuard(histogram_every_n_steps=None), count=120)
    assert events.tags["histograms"] == ["gradguard/log10_norms"]


def test_tensorboard_step_costs_one_event_for_scalars_and_one_for_histograms(tmp_path):
    """Not one event a tag, which costs fifty times as much."""
    events = _train(tmp_path, GradGuard(histogram_every_n_steps=8))
    tags = [(event.step, {value.tag for value in event.summary.value}) for event in events.raw]
    scalars = Counter(step for step, names in tags if "gradguard/global_norm" in names)
    touching = Counter(step for step, names in tags if any(name.startswith("gradguard/") for name in names))
    histograms = Counter(step for step, names in tags if any(name.startswith("gradients/") for name in names))
    assert scalars == touching == dict.fromkeys(range(24), 1)
    assert histograms == {7: 1, 15: 1, 23: 1}


def test_tensorboard_histogram_holds_every_finite_element(tmp_path):
    """As many samples as the parameter has elements; what lies between the edges is a decade."""
    events = _train(tmp_path, GradGuard(histogram_every_n_steps=8))
    (first, *_) = events.accumulator.Histograms("gradients/body.weight")
    assert first.histogram_value.num == 48
    assert -12 < first.histogram_value.min <= first.histogram_value.max < 3
    (norms, *_) = events.accumulator.Histograms("gradguard/log10_norms")
    assert norms.histogram_value.num == 4


def test_tensorboard_histogram_counts_nan_apart(tmp_path):
    """A step whose gradients are all NaN has empty histograms, a count of NaN, and a word about it."""
    events = _train(tmp_path, GradGuard(histogram_every_n_steps=8), {7: "nan"}, count=16)
    bad, good = events.accumulator.Histograms("gradients/body.weight")
    assert (bad.histogram_value.num, good.histogram_value.num) == (0, 48)
    assert events.steps("gradguard/num_nan") == [7, 15]
    assert events.values("gradguard/num_nan") == [48 + 8 + 8 + 1, 0]
    assert "48 NaN" in events.accumulator.SummaryMetadata("gradients/body.weight").summary_description


def test_tensorboard_alert_text_has_message_remedy_and_parameters(tmp_path):
    """The text of the alert at its step."""
    guard = GradGuard()
    events = _train(tmp_path, guard, {5: "nan"}, count=8)
    (event,) = events.accumulator.Tensors("gradguard/alerts")
    text = html.unescape(event.tensor_proto.string_val[0].decode())
    assert event.step == 5
    assert guard.alerts[0].message in text
    assert guard.alerts[0].remedy in text
    assert "| `body.weight` |" in text


@pytest.mark.smoke
def test_tensorboard_custom_scalars_page_parses_and_selects_our_tags(tmp_path):
    """One page named GradGuard; every pattern of a chart matches a tag that is there."""
    events = _train(tmp_path, GradGuard(clip=0.5))
    (event,) = events.accumulator.Tensors("custom_scalars__config__")
    page = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
    assert [category.title for category in page.category] == ["GradGuard"]
    for chart in page.category[0].chart:
        for pattern in chart.multiline.tag:
            assert [tag for tag in events.tags["scalars"] if re.match(pattern, tag)]


def test_tensorboard_custom_scalars_page_keeps_groups_together(tmp_path):
    """One chart shows the norms of all groups."""
    events = _train(tmp_path, GradGuard())
    page = layout_pb2.Layout.FromString(events.accumulator.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    (pattern,) = [chart.multiline.tag[0] for chart in page.category[0].chart if "group" in chart.title]
    selected = {tag for tag in events.tags["scalars"] if re.match(pattern, tag)}
    assert selected == {"gradguard/norm/body", "gradguard/norm/head"}


@pytest.mark.parametrize(
    ("norms", "expected"),
    [
        ("totals", set()),
        ("groups", {"body", "head"}),
        ("all", {"body", "head", *PARAMETERS}),
    ],
)
def test_tensorboard_log_norms_chooses_the_curves(norms, expected, tmp_path):
    """Of the whole model in any case; of groups and parameters as asked for."""
    events = _train(tmp_path, GradGuard(log_norms=norms))
    names = {tag.partition("/norm/")[2] for tag in events.tags["scalars"] if "/norm/" in tag}
    assert names == expected
    assert "gradguard/global_norm" in events.tags["scalars"]


def test_tensorboard_other_norms_and_histograms_after_clipping(tmp_path):
    """Beside the tags that there are in any case; the description of a histogram says which gradients it is of."""
    guard = GradGuard(clip=1e-3, log_norm_types=[math.inf], histogram_every_n_steps=8, histograms_of="clipped")
    events = _train(tmp_path, guard, {13: "nan"}, log_every_n_steps=8)
    assert events.steps("gradguard/global_norm") == [7, 13, 15, 23]
    assert events.steps("gradguard/global_norm_inf") == [7, 15, 23]  # at 13 an alert alone is due
    assert {"gradguard/norm_inf/body", "gradguard/norm_inf/head", "gradguard/norm/body"} <= set(events.tags["scalars"])
    assert events.histogram_steps("gradients/body.weight") == [7, 15, 23]
    assert all(event.histogram_value.max <= -3.0 + 0.01 for event in events.accumulator.Histograms("gradients/body.weight"))
    assert (
        "gradient elements after clipping" in events.accumulator.SummaryMetadata("gradients/body.weight").summary_description
    )


def test_tensorboard_log_norms_unknown_is_refused():
    """With the choice in the message."""
    with pytest.raises(ValueError, match="`log_norms` must be one of 'totals', 'groups', 'all', got 'none'"):
        GradGuard(log_norms="none")


def test_tensorboard_has_learning_rate_weight_norm_and_update_ratio(tmp_path):
    """The rate as it is, the norm as torch computes it, and the update as it was, within the sample's error."""
    guard = GradGuard()
    logger = TensorBoardLogger(tmp_path)
    seen = []

    class Watching(Net):
        def on_before_optimizer_step(self, optimizer):
            seen.append([parameter.detach().clone() for parameter in self.parameters()])

    fit(tmp_path, Watching(), guard, logger=logger, log_every_n_steps=2)
    events = Events(logger)
    flat = [torch.cat([parameter.flatten() for parameter in weights]) for weights in seen]
    steps = events.steps("gradguard/weight_norm")
    assert steps == events.steps("gradguard/learning_rate") == events.steps("gradguard/update_ratio")
    assert events.values("gradguard/weight_norm") == pytest.approx([float(flat[step].norm()) for step in steps])
    ratios = [float((flat[step] - flat[step - 1]).norm() / flat[step].norm()) for step in steps]
    assert events.values("gradguard/update_ratio") == pytest.approx(ratios, rel=1e-4)  # small tensors are taken whole
