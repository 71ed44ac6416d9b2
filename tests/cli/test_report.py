"""A report without a server: what it says, that it needs nothing from outside, and that it stays small."""

from __future__ import annotations

import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from markdown_it import MarkdownIt
from typer.testing import CliRunner

sys.path.append(str(Path(__file__).parents[1] / "trainer"))
sys.path.append(str(Path(__file__).parents[1] / "tensorboard_plugin"))

from lightning_package import TensorBoardLogger, Trainer
from recording import alert_at, layout_of, record_at, write, write_for_tab
from toys import Net, make_batches

from lightning_gradguard import Culprit, GradGuard, GradientWarning
from lightning_gradguard.cli.commands import app
from lightning_gradguard.cli.report.content import RunReport, read
from lightning_gradguard.cli.report.figures import unfolded
from lightning_gradguard.cli.report.render import MAX_RUNS, at_length, ranges, to_html

HOSTILE = "</script><img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    """A real run with a NaN, a healthy one, and one without event files."""
    folder = tmp_path_factory.mktemp("logs")
    for name, faults in (("damaged", {12: "nan"}), ("healthy", None)):
        trainer = Trainer(
            max_steps=24,
            accelerator="cpu",
            logger=TensorBoardLogger(folder, name=name, version=""),
            callbacks=[GradGuard(clip=0.5)],
            log_every_n_steps=2,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
        )
        if faults:
            with pytest.warns(GradientWarning):
                trainer.fit(Net(faults), make_batches(24))
        else:
            trainer.fit(Net(), make_batches(24))
    lines = folder / "bare" / "gradguard" / "alerts.jsonl"
    lines.parent.mkdir(parents=True)
    lines.write_text(json.dumps(alert_at(3, "a.weight").to_dict()) + '\n{"half": ')
    return folder


def run(*arguments: object):
    """The outcome of a command."""
    return CliRunner().invoke(app, ["report", *map(str, arguments)])


@pytest.mark.smoke
def test_report_of_a_damaged_run_has_verdict_settings_and_plots(logs, tmp_path):
    """In one HTML file, with the plots in it."""
    done = run(logs / "damaged", "-o", tmp_path / "r.html")
    assert done.exit_code == 0, done.output
    text = (tmp_path / "r.html").read_text()
    assert "nonfinite at step 12" in text
    assert "What was found" in text
    assert "ClipNorm" in text
    assert "Steps passed over: 12." in text
    assert text.count('class="plot"') == 2
    assert "1 run" in done.output


class Links(HTMLParser):
    """Every address that a page would load something from."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.found += [value for name, value in attrs if name in ("src", "href", "action", "data")]


def test_report_needs_nothing_from_outside(logs):
    """No address, and a policy that forbids any."""
    text = to_html(read(logs / "damaged"), "t")
    links = Links()
    links.feed(text)
    assert links.found == []
    assert "default-src 'none'" in text


def test_report_of_a_folder_has_a_row_for_each_run(logs, tmp_path):
    """One without event files says that it has no curves, and its half line is passed over."""
    assert run(logs, "--output", tmp_path / "all.html").exit_code == 0
    text = (tmp_path / "all.html").read_text()
    for name in ("bare", "damaged", "healthy"):
        assert f"<td>{name}</td>" in text
    assert "There are no event files of this run here" in text
    assert text.count('class="plot"') == 4


def test_report_of_a_healthy_run_says_up_to_where(logs):
    """No more than was logged."""
    (report,) = read(logs / "healthy")
    assert report.verdict == "No alerts up to step 23."
    assert report.steps.num_skipped == 0
    assert report.steps.num_clipped > 0


def test_report_in_markdown_and_json_says_the_same(logs):
    """To standard output, for scripts and issues."""
    text = run(logs / "damaged", "--format", "md", "-o", "-").output
    assert "## This run" in text
    assert "nonfinite at step 12" in text
    (entry,) = json.loads(run(logs / "damaged", "--json").output)
    assert entry["alerts_by_kind"] == {"nonfinite": 1}
    assert entry["steps"]["skipped"] == [12]
    assert entry["verdict"].startswith("Alerts: 1 nonfinite.")
    assert entry["settings"]["clip"] == "ClipNorm(max_norm=0.5, norm_type=2.0)"


def test_report_of_a_folder_without_runs_says_what_a_run_is(tmp_path):
    """And writes nothing."""
    done = run(tmp_path, "-o", tmp_path / "r.html")
    assert done.exit_code == 2
    assert "There is no run with data of GradGuard in or below" in " ".join(done.output.split())
    assert not (tmp_path / "r.html").exists()


def test_report_of_hostile_names_and_texts_keeps_them_text(tmp_path):
    """In HTML and in Markdown, in names, messages, kinds and source."""
    culprit = Culprit("forward", HOSTILE, HOSTILE, "x.py", 3, HOSTILE, message=HOSTILE, factors=(f"| {HOSTILE} |", "|---|"))
    layout = layout_of(HOSTILE, "b.weight")
    alert = alert_at(2, HOSTILE, kind=HOSTILE, message=HOSTILE, culprit=culprit)
    write(tmp_path / "run", [record_at(step, layout, alerts=(alert,) if step == 2 else ()) for step in range(4)])
    text = to_html(read(tmp_path), HOSTILE)
    assert "<img" not in text
    assert "What to try" in text
    assert text.count("</script>") == text.count("<script")
    markdown = run(tmp_path, "--format", "md", "-o", "-").output
    assert "<img" not in MarkdownIt("commonmark", {"html": True}).enable("table").render(markdown)


def test_report_at_full_size_is_small(tmp_path):
    """1,000 parameters by 20,000 steps would be 80 MB of numbers; here a tenth of the steps, which draws as many columns."""
    layout = layout_of(*(f"layers.{index // 4}.part{index % 4}.weight" for index in range(1000)))
    rng = np.random.default_rng(0)
    norms = rng.lognormal(size=(64, 1000))
    write_for_tab(tmp_path / "run", [record_at(step, layout, norms[step % 64]) for step in range(2000)])
    assert len(to_html(read(tmp_path), "t").encode()) < 5e6


def test_report_without_plotly_leaves_the_plots_out_and_says_so(logs, monkeypatch):
    """Words and tables stay."""
    monkeypatch.setattr("lightning_gradguard.cli.report.render.plotly_path", lambda: None)
    text = to_html(read(logs / "damaged"), "t")
    assert 'pip install "lightning-gradguard[tensorboard-tab]"' in re.sub("&#34;", '"', text)
    assert 'class="plot"' not in text
    assert "nonfinite at step 12" in text


def test_report_of_an_alerts_file_is_that_of_its_run(logs):
    """Whichever of the two is named."""
    (report,) = read(logs / "bare" / "gradguard" / "alerts.jsonl")
    (expected,) = read(logs / "bare")
    assert report.to_dict() == expected.to_dict()
    assert len(report.alerts) == 1


def test_report_of_many_runs_tells_of_those_with_alerts():
    """The first of the others follow."""
    reports = [RunReport(str(number), {}, [{}] * (number == MAX_RUNS), {}, (), Path()) for number in range(MAX_RUNS + 1)]
    assert [report.name for report in at_length(reports)] == [str(MAX_RUNS), *map(str, range(MAX_RUNS - 1))]
    assert at_length(reports[:2]) == reports[:2]


def test_report_of_a_flat_model_shows_as_many_parameters_as_there_is_room_for(tmp_path):
    """There is no module to fold them into."""
    layout = layout_of(*(f"p{index}" for index in range(9)))
    write_for_tab(tmp_path / "run", [record_at(0, layout, np.arange(1.0, 10.0))])
    (report,) = read(tmp_path)
    snapshot = report.series[0].snapshot()
    assert [snapshot.tree.paths[node] for node in unfolded(snapshot, most=3)] == ["p0", "p1", "p2"]


def test_ranges_many_stretches_are_cut():
    """A run that skips every other step is no page of numbers."""
    assert ranges(range(0, 1000, 2), most=2) == "0, 2 and 498 more stretches"


@pytest.mark.parametrize("format_", ["html", "md"])
def test_report_of_half_a_surrogate_pair_is_written(format_, tmp_path):
    """JSON can hold one, UTF-8 can't."""
    path = tmp_path / "run" / "gradguard" / "alerts.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"step": 1, "kind": "nonfinite", "action": "skip", "message": "NaN in \ud800."}))
    outcome = run(tmp_path / "run", "--format", format_, "--output", tmp_path / "report")
    assert outcome.exit_code == 0, outcome.output
    assert "ud800" in (tmp_path / "report").read_text("utf-8")
