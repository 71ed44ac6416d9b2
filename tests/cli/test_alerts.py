"""`gradguard alerts` on files of all sorts."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest
from builders import examples
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("typer")

from typer.testing import CliRunner

from lightning_gradguard.cli.alerts import Runs
from lightning_gradguard.cli.commands import app

ALERT = {
    "time": 0.0, "step": 3, "epoch": 0, "batch_idx": 3, "micro_batch": 0, "optimizer": 0, "rank": 0, "kind": "nonfinite",
    "action": "skip", "value": "NaN", "limit": 0.0, "parameters": [], "culprit": None,
    "message": "Nonfinite at step 3: a gradient is NaN. The step is skipped.", "remedy": "Look [at] the batch.",
}  # fmt: skip


def call(*arguments, width=200):
    """Run the command in this process."""
    runner = CliRunner(env={"COLUMNS": str(width), "NO_COLOR": "1"})
    return runner.invoke(app, [str(argument) for argument in arguments])


def written(folder, *alerts, raw=b""):
    """A run with alerts."""
    (folder / "gradguard").mkdir(parents=True)
    path = folder / "gradguard" / "alerts.jsonl"
    path.write_bytes("".join(json.dumps(alert) + "\n" for alert in alerts).encode() + raw)
    return path


def test_half_line_is_said_and_all_others_are_listed(tmp_path):
    """Also the one that was glued to it."""
    line = json.dumps(ALERT).encode()
    written(tmp_path, ALERT, raw=line[:50] + line + b"\n" + line + b"\n" + line[:40])
    done = call("alerts", tmp_path)
    assert done.exit_code == 0
    assert "3 alerts." in done.stdout
    assert "2 lines left out, the first is line 2" in done.stderr.replace("\n", " ")


@pytest.mark.parametrize(
    "raw", [b"\xff\n", b"null\n", b'{"step": 1}\n', b"[" * 100_000, b"\x00" * 999, b"\xff\xfe" + "{}".encode("utf-16-le")]
)
def test_file_with_nothing_of_use_is_said(raw, tmp_path):
    """No traceback, and no alert."""
    written(tmp_path, raw=raw)
    done = call("alerts", tmp_path)
    assert done.exit_code == 0
    assert "No alerts below" in done.stdout
    assert "1 line left out" in done.stderr


def test_file_that_can_not_be_read_is_exit_code_2(tmp_path):
    """A folder in its place; with another one that can be read it is only said."""
    (tmp_path / "a" / "gradguard" / "alerts.jsonl").mkdir(parents=True)
    done = call("alerts", tmp_path)
    assert done.exit_code == 2
    assert "can't be read" in done.stderr
    written(tmp_path / "b", ALERT)
    done = call("alerts", tmp_path)
    assert (done.exit_code, "1 alert." in done.stdout, "can't be read" in done.stderr) == (0, True, True)


def test_file_that_can_not_be_read_is_said_once_while_it_is_followed(tmp_path, capsys):
    """Not with every look at it."""
    (tmp_path / "a" / "gradguard" / "alerts.jsonl").mkdir(parents=True)
    runs = Runs(tmp_path)
    assert [list(runs.read(is_growing=True)) for _ in range(3)] == [[], [], []]
    assert capsys.readouterr().err.count("can't be read") == 1


def test_names_are_shown_as_they_are_and_escape_codes_are_made_visible(tmp_path):
    """Brackets are no markup, and nothing reaches the terminal but text."""
    odd = "w[mask] [/x] [red]a[/red] :boom: \x1b]0;t\x07 \x1b[31m \u202e \ud800 \x9b"
    written(tmp_path, {**ALERT, "kind": "[bold]k\x1b[0m", "message": odd, "culprit": {"phase": odd, "message": odd}})
    for width in (60, 80, 300):
        done = call("alerts", tmp_path, width=width)
        assert done.exit_code == 0, done.output
        assert not set(done.output) & {"\x1b", "\x07", "\x9b", "\u202e", "\ud800"}
    for text in ("w[mask] [/x] [red]a[/red] :boom:", r"\x1b]0;t\x07", r"\x1b[31m", r"\u202e", r"\ud800", r"[bold]k\x1b[0m"):
        assert text in done.output


def test_table_is_readable_at_80_columns(tmp_path):
    """Whole words in each narrow column, and no line is longer."""
    message = "a: the gradient of `encoder.layers.11.attention.output.dense.weight` has 32 NaN elements"
    written(tmp_path, *({**ALERT, "step": 12_345_678, "kind": "update_ratio", "message": message} for _ in range(3)))
    lines = call("alerts", tmp_path, width=80).stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert sum("12345678   update_ratio   skip " in line for line in lines) == 3


def test_json_is_one_strict_object_a_line(tmp_path):
    """With the run, and infinities as texts."""
    written(tmp_path / "a", ALERT, {**ALERT, "limit": "Infinity"})
    lines = call("alerts", tmp_path, "--json").stdout.splitlines()
    found = [json.loads(line, parse_constant=pytest.fail) for line in lines]
    assert [(each["run"], each["limit"]) for each in found] == [("a", 0.0), ("a", "Infinity")]


def test_misspelt_kind_gets_the_nearest(tmp_path):
    """Among the built-in ones and those in the files; exit code 2."""
    written(tmp_path, ALERT, {**ALERT, "kind": "my_own"})
    for misspelt, nearest in (("nonfinit", "nonfinite"), ("exploson", "explosion"), ("my_onw", "my_own")):
        done = call("alerts", tmp_path, "--kind", misspelt)
        assert done.exit_code == 2
        assert f"Did you mean '{nearest}'?" in done.stderr
    assert call("alerts", tmp_path, "--follow", "--kind", "exploson").exit_code == 2
    assert "Did you mean" not in call("alerts", tmp_path, "--kind", "zzzzzz").stderr


def test_long_list_is_cut_and_that_is_said(tmp_path):
    """The last are shown."""
    written(tmp_path, *({**ALERT, "step": step} for step in range(5)))
    done = call("alerts", tmp_path, "--last", 2).stdout
    assert "5 alerts. The first 3 are not shown" in done
    assert "not shown" not in call("alerts", tmp_path, "--last", 0).stdout


def test_file_itself_can_be_named(tmp_path):
    """Not only its folder."""
    assert "1 alert." in call("alerts", written(tmp_path, ALERT)).stdout


@examples
@given(st.lists(st.one_of(st.binary(max_size=200), st.just(json.dumps(ALERT).encode())), max_size=5))
def test_any_bytes_are_listed_without_a_traceback(tmp_path_factory, lines):
    """Whatever stands in the file."""
    folder = tmp_path_factory.mktemp("any")
    written(folder, raw=b"\n".join(lines))
    done = call("alerts", folder)
    assert done.exit_code == 0, done.output
    assert done.exception is None


def test_alerts_are_followed_as_they_are_written(tmp_path):
    """Until Ctrl-C, which is no error; also those of a run that begins later."""
    path = written(tmp_path / "a", ALERT)
    # A shell's background jobs, and so their children, ignore Ctrl-C.
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    code += "from lightning_gradguard.cli import main; main()"
    command = [sys.executable, "-c", code, "alerts", str(tmp_path), "--follow"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"}
    ) as process:
        assert process.stdout.readline().startswith("a: step 3: nonfinite, skip: ")
        half = json.dumps({**ALERT, "step": 4})
        with path.open("a", encoding="utf-8") as file:
            file.write(half[:30])
            file.flush()
            file.write(half[30:] + "\n")
        assert process.stdout.readline().startswith("a: step 4")
        written(tmp_path / "b", {**ALERT, "step": 5})
        assert process.stdout.readline().startswith("b: step 5")
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0


def test_alerts_are_followed_as_json(tmp_path, monkeypatch):
    """Of the kinds that are asked for."""
    written(tmp_path, ALERT, {**ALERT, "kind": "explosion"})

    def interrupt(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr("time.sleep", interrupt)
    done = call("alerts", tmp_path, "--follow", "--json", "--kind", "explosion")
    assert json.loads(done.stdout)["kind"] == "explosion"
