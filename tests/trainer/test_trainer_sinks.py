"""Files, loggers and functions that records go to."""

from __future__ import annotations

import csv
import sys
import types
from pathlib import Path

import pytest
from lightning_package import CSVLogger, Logger, TensorBoardLogger, rank_zero_only
from message_server import ENOUGH_S, serving
from toys import Net, fit, make_batches, read_alerts

from lightning_gradguard import Explosion, GradGuard, GradientWarning, Notify, SinkWarning

FIELDS = [
    "time",
    "step",
    "epoch",
    "batch_idx",
    "micro_batch",
    "optimizer",
    "rank",
    "kind",
    "action",
    "value",
    "limit",
    "parameters",
    "culprit",
    "message",
    "remedy",
]


class Remembering:
    """A sink as users write them."""

    def __init__(self) -> None:
        self.records: list = []
        self.num_closed = 0

    def write(self, record) -> None:
        """Keep the record."""
        self.records.append(record)

    def close(self) -> None:
        """Count the calls."""
        self.num_closed += 1


def _bad(root, guard=None, faults=None, **settings):
    """Fit with bad batches that are warned of."""
    guard = guard or GradGuard()
    with pytest.warns(GradientWarning, match="at step"):
        fit(root, Net(faults or {5: "nan"}, log=True), guard, **settings)
    return guard


@pytest.mark.smoke
def test_jsonl_has_one_strict_line_an_alert_with_the_fields_of_the_contract(tmp_path):
    """NaN is a string, since JSON has no word for it."""
    guard = _bad(tmp_path, GradGuard(explosion=Explosion("warn", max_norm=1e3)), {3: "nan", 7: "huge"})
    first, second = read_alerts(tmp_path)
    assert list(first) == list(second) == ["version", *FIELDS]
    assert (first["kind"], first["action"], first["step"], first["value"]) == ("nonfinite", "skip", 3, "NaN")
    assert (second["kind"], second["action"], second["step"], second["limit"]) == ("explosion", "warn", 7, 1e3)
    assert second["value"] == guard.alerts[1].value
    assert list(first["parameters"][0]) == ["name", "norm", "num_nan", "num_inf"]
    assert [line["message"] for line in (first, second)] == [alert.message for alert in guard.alerts]


def test_jsonl_lies_in_the_trainers_log_dir(tmp_path):
    """With a logger that is its version folder."""
    logger = TensorBoardLogger(tmp_path, name="run", version=3)
    _bad(tmp_path, logger=logger)
    assert len(read_alerts(tmp_path / "run" / "version_3")) == 1


def test_jsonl_second_fit_appends(tmp_path):
    """Nothing of the first run is lost."""
    _bad(tmp_path)
    _bad(tmp_path)
    assert len(read_alerts(tmp_path)) == 2


def test_jsonl_holds_the_alert_of_an_error(tmp_path):
    """It is on disk before the exception is raised."""
    with pytest.raises(RuntimeError), pytest.warns(GradientWarning):
        fit(tmp_path, Net({5: "nan"}), GradGuard(nonfinite="raise"))
    assert [line["action"] for line in read_alerts(tmp_path)] == ["raise"]


def test_jsonl_unwritable_folder_is_one_warning_and_training_goes_on(tmp_path):
    """A file stands where the folder should be; two alerts, one warning."""
    (tmp_path / "gradguard").write_text("in the way")
    guard = GradGuard(max_bundle_mib=None)
    with pytest.warns(SinkWarning, match="Training goes on") as caught, pytest.warns(GradientWarning):
        fit(tmp_path, Net({3: "nan", 5: "nan"}), guard)
    assert len([warning for warning in caught if warning.category is SinkWarning]) == 1
    assert (guard.num_steps, guard.num_skipped, len(guard.alerts)) == (12, 2, 2)


def test_no_logger_still_warns_and_writes_alerts(tmp_path):
    """`logger=False`: the folder is the Trainer's root."""
    guard = _bad(tmp_path, logger=False)
    assert len(read_alerts(tmp_path)) == len(guard.alerts) == 1


@pytest.mark.smoke
def test_csv_logger_gets_the_scalars(tmp_path):
    """In Lightning's own metrics file, at Lightning's own steps."""
    logger = CSVLogger(tmp_path, flush_logs_every_n_steps=1)
    _bad(tmp_path, GradGuard(clip=0.5, histogram_every_n_steps=4), logger=logger, batches=make_batches(20))
    rows = list(csv.DictReader(Path(logger.experiment.metrics_file_path).read_text().splitlines()))
    ours = [row for row in rows if row.get("gradguard/global_norm")]
    assert [int(row["step"]) for row in ours] == list(range(20))
    assert {"gradguard/clip_coef", "gradguard/norm/body", "gradguard/explosion_limit", "train_loss"} <= set(rows[0])
    assert float(ours[-1]["gradguard/num_skipped"]) == 1


def test_several_loggers_all_get_the_scalars(tmp_path):
    """TensorBoard and CSV side by side; the alerts lie in the first one's folder."""
    board, table = TensorBoardLogger(tmp_path, name="board"), CSVLogger(tmp_path, name="table")
    _bad(tmp_path, logger=[board, table])
    assert "gradguard/global_norm" in (tmp_path / "table" / "version_0" / "metrics.csv").read_text()
    assert list((tmp_path / "board" / "version_0").glob("events.out.tfevents.*"))
    assert len(read_alerts(tmp_path / "board" / "version_0")) == 1


def test_loggers_that_lightning_silences_get_no_records(tmp_path, monkeypatch):
    """A child of DDP runs the whole script, and a fit on one device in it believes to be the first rank: no warning."""
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    _bad(tmp_path, logger=[TensorBoardLogger(tmp_path, name="board"), CSVLogger(tmp_path, name="table")])
    assert len(read_alerts(tmp_path / "board" / "version_0")) == 1


def test_fast_dev_run_leaves_no_file(tmp_path):
    """One batch, and nothing on disk, an alert included."""
    guard = _bad(tmp_path, faults={0: "nan"}, fast_dev_run=True, logger=True)
    assert (guard.num_steps, guard.num_skipped) == (1, 1)
    assert list(tmp_path.iterdir()) == []


def test_barebones_guards_without_logging(tmp_path):
    """The Trainer's mode without any logging: steps are judged all the same."""
    guard = GradGuard()
    settings = {"enable_progress_bar": None, "enable_model_summary": None, "enable_checkpointing": None, "logger": None}
    with pytest.warns(GradientWarning, match="Nonfinite"):
        fit(tmp_path, Net({5: "nan"}), guard, barebones=True, log_every_n_steps=None, **settings)
    assert (guard.num_steps, guard.num_skipped, guard.last.scalars_due) == (12, 1, False)


def test_sink_object_gets_every_record_and_one_close(tmp_path):
    """In order, from the first step to the last."""
    sink = Remembering()
    _bad(tmp_path, GradGuard(sinks=[sink]))
    assert [record.position.step for record in sink.records] == list(range(12))
    assert [record.decision.skip for record in sink.records] == [step == 5 for step in range(12)]
    assert sink.num_closed == 1


def test_sink_function_gets_every_record(tmp_path):
    """Epoch and batch are known to it."""
    places = []
    guard = GradGuard(sinks=[lambda record: places.append((record.position.epoch, record.position.batch_idx))])
    fit(tmp_path, Net(), guard, batches=make_batches(2), max_epochs=2)
    assert places == [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_sink_that_fails_is_one_warning_and_training_goes_on(tmp_path):
    """The other sinks still get everything."""
    seen = []

    def broken(record):
        raise OSError("disk full")

    guard = GradGuard(sinks=[broken, seen.append])
    with pytest.warns(SinkWarning, match="OSError: disk full.*Training goes on"):
        fit(tmp_path, Net(), guard)
    assert len(seen) == guard.num_steps == 12


def test_healthy_run_without_logger_leaves_no_file(tmp_path):
    """No alert, no folder."""
    fit(tmp_path, Net(), GradGuard())
    assert list(tmp_path.iterdir()) == []


def test_notify_names_the_run_by_its_folder(tmp_path):
    """And the message has arrived when `fit` returns."""
    pytest.importorskip("apprise")
    with serving() as server:
        _bad(tmp_path, GradGuard(sinks=[Notify(server.url)]))
        message = server.messages.get_nowait()
        assert server.messages.empty()
    assert message["title"].startswith(f"GradGuard: nonfinite at step 5, skip ({tmp_path} on ")


def test_notify_service_that_hangs_delays_the_end_of_a_fit_by_no_more_than_asked_for(tmp_path):
    """Nothing else of the training is touched."""
    pytest.importorskip("apprise")
    with serving() as server:
        server.may_answer.clear()
        with pytest.warns(SinkWarning, match="did not answer in time"):
            guard = _bad(tmp_path, GradGuard(sinks=[Notify(server.url, max_wait_s=0.1)]))
        assert server.messages.get(timeout=ENOUGH_S)
    assert (guard.num_steps, guard.num_skipped) == (12, 1)


class Own(Logger):
    """One of the user's, which saves nothing on this machine."""

    name, version, save_dir, run_id = "own", 0, None, "7"

    def __init__(self):
        super().__init__()
        self.tags, self.texts = set(), []

    @property
    def experiment(self):
        return self

    def log_metrics(self, metrics, step=None):
        self.tags |= metrics.keys()

    def log_hyperparams(self, *args, **kwargs):
        """Nothing."""

    def log_text(self, run_id, text, path):
        self.texts.append((run_id, path, len(text.splitlines())))


class MLFlowLogger(Own):
    """Is told from others by its name."""


@pytest.mark.parametrize(("make", "texts"), [(Own, []), (MLFlowLogger, [("7", "gradguard/alerts.jsonl", 1)])])
def test_logger_without_a_folder_gets_the_scalars_and_nothing_is_written(make, texts, tmp_path):
    """There is no place for files."""
    logger = make()
    guard = _bad(tmp_path, logger=logger)
    assert {"gradguard/global_norm", "gradguard/alerts/nonfinite"} <= logger.tags
    assert logger.texts == texts
    assert len(guard.alerts) == 1
    assert not list(tmp_path.rglob("gradguard"))


def test_warning_of_a_logger_is_an_error_where_that_was_asked_for(tmp_path, monkeypatch):
    """It is not said again as one of the guard's."""

    class WandbLogger(Own):
        pass

    def get(name):
        raise DeprecationWarning("wandb is late")

    module = types.ModuleType("wandb")
    module.__getattr__ = get
    monkeypatch.setitem(sys.modules, "wandb", module)
    with pytest.raises(DeprecationWarning, match="wandb is late"):
        fit(tmp_path, Net(), GradGuard(), logger=WandbLogger())
