"""What every sink has to keep to. A sink has no state; the records of one run go through each of them."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace

import pytest
from raw_loop import records
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from lightning_gradguard import Culprit, GradientWarning, Sink, SinkWarning
from lightning_gradguard.record import Position
from lightning_gradguard.sinks import (
    ConsoleSink,
    FunctionSink,
    JsonlSink,
    LoggerSink,
    MlflowSink,
    TensorBoardSink,
    WandbSink,
)
from lightning_gradguard.sinks.base import SafeSink, to_sink
from lightning_gradguard.sinks.tags import scalars, tag_prefix


class Metrics:
    """A logger that keeps what it gets; it has what W&B's and MLflow's have beside."""

    run_id = "7"

    def __init__(self):
        self.rows, self.tables, self.artifacts, self.sent = [], [], {}, []

    @property
    def experiment(self):
        return self

    def log_metrics(self, metrics, step=None):
        self.rows.append((step, metrics))

    def alert(self, **message):
        self.sent.append(message)

    def log_text(self, *arguments, **table):
        if table:
            self.tables.append(table)
        else:
            run_id, text, path = arguments
            self.artifacts[run_id, path] = text


MAKERS = {
    "console": lambda folder: ConsoleSink(),
    "function": lambda folder: FunctionSink(lambda record: None),
    "jsonl": lambda folder: JsonlSink(folder / "new" / "alerts.jsonl"),
    "logger": lambda folder: LoggerSink(Metrics()),
    "mlflow": lambda folder: MlflowSink(Metrics()),
    "wandb": lambda folder: WandbSink(Metrics(), dict),
    "tensorboard": lambda folder: TensorBoardSink(SummaryWriter(folder)),
    "tensorboard-lazy": lambda folder: TensorBoardSink(lambda: SummaryWriter(folder)),
}


def write_all(sink, run):
    """Write all records of a run."""
    for record in run:
        sink.write(record)


every_sink = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
quiet = pytest.mark.filterwarnings("ignore::lightning_gradguard.GradientWarning")


@every_sink
def test_sink_is_one(make, tmp_path):
    """Each has the two methods of the protocol, and shows what it is."""
    sink = make(tmp_path)
    assert isinstance(sink, Sink)
    assert to_sink(sink) is sink
    assert type(sink).__name__ in repr(sink)


@quiet
@every_sink
def test_sink_takes_every_kind_of_record(make, tmp_path):
    """Healthy, clipped, NaN, without gradients; with scalars and histograms or without."""
    sink = make(tmp_path)
    for settings in ({}, {"log_every_n_steps": 0, "histogram_every_n_steps": None}, {"histogram_every_n_steps": 1}):
        for record in records(**settings):
            sink.write(record)
    sink.close()


@quiet
@every_sink
def test_sink_writing_changes_no_record(make, tmp_path):
    """The next sink gets the same."""
    sink = make(tmp_path)
    for record in records():
        before = repr(record)
        sink.write(record)
        assert repr(record) == before


@quiet
@every_sink
def test_sink_closed_twice_can_be_written_to(make, tmp_path):
    """A Trainer may fit again; closing an unused one is fine as well."""
    sink = make(tmp_path)
    sink.close()
    for record in records():
        sink.write(record)
        sink.close()
        sink.close()


def test_console_warns_of_each_alert_with_its_remedy():
    """And of nothing else."""
    seen = records()
    with pytest.warns(GradientWarning) as caught:
        write_all(ConsoleSink(), seen)
    assert [str(warning.message) for warning in caught] == [
        f"{alert.message} {alert.remedy}" for record in seen for alert in record.alerts
    ]
    assert len(caught) == 1


def test_function_is_called_with_every_record():
    """A plain function is a sink."""
    seen, run = [], records()
    sink = to_sink(seen.append)
    for record in run:
        sink.write(record)
    assert seen == run


def test_jsonl_without_an_alert_leaves_nothing(tmp_path):
    """No folder, no file."""
    sink = JsonlSink(tmp_path / "gradguard" / "alerts.jsonl")
    sink.write(records()[0])
    assert list(tmp_path.iterdir()) == []


def test_jsonl_lines_are_strict_json_of_the_alerts(tmp_path):
    """One a line, appended; NaN as a string that `float` reads back."""
    path = tmp_path / "alerts.jsonl"
    for _ in range(2):
        sink = JsonlSink(path)
        write_all(sink, records())

    def refuse(constant):
        raise AssertionError(constant)

    lines = [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]
    assert len(lines) == 2
    (alert,) = records()[2 + 1].alerts
    assert lines[0].keys() == {"version", *asdict(alert)}
    assert lines[0].pop("version") == 1
    assert lines[0] | {"time": 0} == alert.to_dict() | {"time": 0}
    assert math.isnan(float(lines[0]["value"]))
    assert math.isinf(float(lines[0]["limit"]))
    assert lines[0]["action"] == "skip"
    assert set(lines[0]["parameters"][0]) == {"name", "norm", "num_nan", "num_inf"}


def test_jsonl_folder_that_cannot_be_made_fails_safely(tmp_path):
    """One warning, and no error."""
    (tmp_path / "file").write_text("")
    sink = SafeSink(JsonlSink(tmp_path / "file" / "alerts.jsonl"))
    with pytest.warns(SinkWarning, match="Training goes on") as caught:
        write_all(sink, [*records(), *records()])
    assert len(caught) == 1


def test_safe_sink_close_failing_warns():
    """Closing can't hurt either."""

    class Fails:
        def write(self, record):
            """Takes anything."""

        def close(self):
            raise ValueError("no")

    with pytest.warns(SinkWarning, match="ValueError: no"):
        SafeSink(Fails()).close()


@pytest.mark.filterwarnings("error::lightning_gradguard.GradientWarning")
def test_safe_sink_warnings_as_errors_are_passed_on():
    """Who turns warnings into errors asks for it."""
    sink = SafeSink(ConsoleSink())
    with pytest.raises(GradientWarning, match="NaN"):
        write_all(sink, records())


def test_logger_gets_due_steps_and_steps_with_an_alert():
    """Under the tags of the contract, at the loggers' step."""
    metrics = Metrics()
    sink = LoggerSink(metrics)
    run = records(log_every_n_steps=2)
    for record in run:
        sink.write(record)
    assert [step for step, _ in metrics.rows] == [1, 3]
    assert metrics.rows[0][1]["gradguard/global_norm"] == run[1].measurement.global_norm
    for record in records(log_every_n_steps=0):
        sink.write(record)
    assert [step for step, _ in metrics.rows] == [1, 3, 3]


def test_logger_is_told_of_alerts_by_kind():
    """As one more scalar, so that each logger can show it."""
    metrics = Metrics()
    write_all(LoggerSink(metrics), records())
    assert [step for step, row in metrics.rows if row.get("gradguard/alerts/nonfinite") == 1.0] == [3]


@pytest.mark.smoke
def test_wandb_gets_histograms_and_a_table_of_alerts():
    """Each histogram as counts and edges; the table grows with each alert."""
    metrics = Metrics()
    sink = WandbSink(metrics, dict)
    run = records(histogram_every_n_steps=1)
    write_all(sink, run)
    drawn = [row["gradients/0.weight"] for _, row in metrics.rows if "gradients/0.weight" in row]
    counts, edges = drawn[0]["np_histogram"]
    assert len(drawn) == len([record for record in run if record.histograms and "0.weight" in record.histograms.names])
    assert len(counts) + 1 == len(edges)
    (table,) = metrics.tables
    assert table["columns"][1] == "kind"
    assert table["data"][0][1:3] == ["nonfinite", "skip"]
    (sent,) = metrics.sent
    assert (sent["title"], sent["level"]) == ("GradGuard: nonfinite, skip", "WARN")
    assert sent["text"].startswith("Nonfinite at step 3")
    write_all(sink, records(nonfinite="warn"))
    assert (len(metrics.sent), len(metrics.tables[-1]["data"])) == (1, 2)  # what is only warned of is no message


def test_mlflow_gets_the_alerts_as_a_file():
    """One line of JSON each, all of them at each alert, since an artifact can't be appended to."""
    metrics = Metrics()
    sink = MlflowSink(metrics)
    write_all(sink, [*records(), *records()])
    lines = metrics.artifacts["7", "gradguard/alerts.jsonl"].splitlines()
    assert [json.loads(line)["kind"] for line in lines] == ["nonfinite", "nonfinite"]


@quiet
def test_tensorboard_alert_with_markup_in_it_stays_a_table(tmp_path):
    """Names and messages can't break out of their cells."""
    record = records()[3]
    culprit = Culprit("forward", "a|b", "aten::log", "m.py", 3, samples=(1, 2))
    (alert,) = record.alerts
    parameters = (replace(alert.parameters[0], name="<b>|`x`"),)
    alert = replace(alert, message="<script>|", parameters=parameters, culprit=culprit)
    with SummaryWriter(tmp_path) as writer:
        TensorBoardSink(writer).write(replace(record, alerts=(alert,)))
    events = EventAccumulator(str(tmp_path)).Reload()
    text = events.Tensors("gradguard/alerts")[0].tensor_proto.string_val[0].decode()
    assert "**&lt;script&gt;&#124;**" in text
    assert "| &lt;b&gt;&#124;`x` | nan |" in text
    assert "| who | forward: a&#124;b aten::log, m.py:3, samples 1, 2 |" in text


@quiet
def test_tensorboard_alert_with_code_in_it_shows_it_as_written(tmp_path):
    """Underscores of names and paths; markup is in quotes, and stays harmless."""
    record = records()[3]
    message = "see `version_0/a*b.pt` in my_run, not `a<b|c`"
    alert = replace(record.alerts[0], message=message, remedy="one ` alone_", parameters=())
    with SummaryWriter(tmp_path) as writer:
        TensorBoardSink(writer).write(replace(record, alerts=(alert,)))
    events = EventAccumulator(str(tmp_path)).Reload()
    text = events.Tensors("gradguard/alerts")[0].tensor_proto.string_val[0].decode()
    assert '**see `version_0/a*b.pt` in my&#95;run, not "a&lt;b&#124;c"**' in text
    assert "| what to try | one ` alone&#95; |" in text
    assert "| parameter |" not in text


def test_scalars_hold_the_contract():
    """Norms, totals, groups; the limit only where there is one; counts apart with histograms."""
    run = records(explosion=None)
    first, with_histogram = scalars(run[0]), scalars(run[1])
    assert {"global_norm", "clipped_norm", "clip_coef", "num_skipped", "num_clipped", "num_alerts"} <= first.keys()
    assert {"norm/0", "norm/2"} <= first.keys()
    assert "explosion_limit" not in first
    unknown = scalars(replace(run[0], clip_coef=None, clipped_norm=None))
    assert first.keys() - unknown.keys() == {"clipped_norm", "clip_coef", "num_clipped"}
    assert {"num_zero", "num_nan", "num_inf"} <= with_histogram.keys() - first.keys()
    assert scalars(run[3])["num_nan"] == 26.0
    from lightning_gradguard import Explosion  # noqa: PLC0415

    assert scalars(records(explosion=Explosion(max_norm=7.0))[0])["explosion_limit"] == 7.0


def test_tags_with_several_optimizers_carry_the_index():
    """One optimizer needs none."""
    assert tag_prefix(Position(0)) == "gradguard"
    assert tag_prefix(Position(0, optimizer=1, num_optimizers=2)) == "gradguard/1"


@pytest.mark.smoke
@quiet
def test_tensorboard_file_holds_the_contracts_tags(tmp_path):
    """Scalars with their values, histograms, the alert's text, and the page."""
    sink = TensorBoardSink(lambda: SummaryWriter(tmp_path))
    run = records(histogram_every_n_steps=1)
    for record in run:
        sink.write(record)
    sink.close()
    events = EventAccumulator(str(tmp_path), size_guidance={"scalars": 0, "histograms": 0, "tensors": 0}).Reload()
    tags = events.Tags()
    named = set(tags["scalars"]) | set(tags["histograms"]) | set(tags["tensors"])
    names = ["global_norm", "clipped_norm", "clip_coef", "num_skipped", "num_clipped", "num_alerts", "norm/0", "log10_norms"]
    assert {f"gradguard/{name}" for name in [*names, "alerts"]} <= named
    assert {"gradients/0.weight", "gradients/2.bias", "custom_scalars__config__"} <= named
    values = [event.value for event in events.Scalars("gradguard/global_norm")]
    assert values == pytest.approx([record.measurement.global_norm for record in run], rel=1e-6, nan_ok=True)
    assert [event.step for event in events.Scalars("gradguard/clip_coef")] == [0, 1, 2, 3, 4]


@quiet
def test_tensorboard_two_optimizers_have_tags_of_their_own(tmp_path):
    """Scalars and distributions."""
    sink = TensorBoardSink(SummaryWriter(tmp_path))
    for record in records(histogram_every_n_steps=1):
        sink.write(replace(record, position=Position(0, optimizer=1, num_optimizers=2)))
    sink.close()
    tags = EventAccumulator(str(tmp_path)).Reload().Tags()
    assert "gradguard/1/global_norm" in tags["scalars"]
    assert "gradients/1/0.weight" in tags["histograms"]


def test_tensorboard_lazy_without_a_due_step_makes_no_folder(tmp_path):
    """The writer is asked for at the first value."""
    sink = TensorBoardSink(lambda: SummaryWriter(tmp_path / "logs"))
    sink.write(records(log_every_n_steps=0, histogram_every_n_steps=None)[0])
    sink.close()
    assert not (tmp_path / "logs").exists()


def test_sink_that_can_not_even_say_what_failed_is_one_warning():
    """Neither its name nor its error's text can be had."""

    class SilentError(Exception):
        def __str__(self):
            raise ValueError

    class Broken:
        def write(self, record):
            raise SilentError

        close = write

        def __repr__(self):
            raise RuntimeError

    sink = SafeSink(Broken())
    with pytest.warns(SinkWarning, match="Broken failed .SilentError: it has no text") as caught:
        write_all(sink, records())
    assert len(caught) == 1
