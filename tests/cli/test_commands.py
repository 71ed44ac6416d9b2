"""The command `gradguard`, by typer's own runner and once for real."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys

import pytest
import torch
from torch import nn

pytest.importorskip("typer")

from typer.testing import CliRunner

from lightning_gradguard.cli import main
from lightning_gradguard.cli.commands import app
from lightning_gradguard.cli.terminal import make_output_safe
from lightning_gradguard.forensics.bundle import Bundle, versions

ALERT = {
    "time": 0.0, "step": 3, "epoch": 0, "batch_idx": 3, "micro_batch": 0, "optimizer": 0, "rank": 0, "kind": "nonfinite",
    "action": "skip", "value": "NaN", "limit": 0.0, "parameters": [], "culprit": None,
    "message": "Nonfinite at step 3: a gradient is NaN. The step is skipped.", "remedy": "Look [at] the batch.",
}  # fmt: skip
CULPRIT = {"phase": "forward", "message": "`div` divided by 0", "cause": ""}
MODULE = """
import torch
from torch import nn

class Divides(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 1)

    def training_step(self, batch, batch_idx):
        return (self.layer(batch) / batch.sum(1, keepdim=True)).square().mean()

class Deep(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(*[part for _ in range(9) for part in (nn.Linear(2, 2), nn.Sigmoid())], nn.Linear(2, 1))

    def training_step(self, batch, batch_idx):
        return self.layers(batch).square().mean()
"""


@pytest.fixture
def call(monkeypatch, tmp_path):
    """Runs a command in a folder of its own, on a wide screen."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    runner = CliRunner(env={"COLUMNS": "220", "NO_COLOR": "1"})
    return lambda *arguments: runner.invoke(app, [str(argument) for argument in arguments])


def written(folder, *alerts):
    """A run with alerts."""
    (folder / "gradguard").mkdir(parents=True)
    path = folder / "gradguard" / "alerts.jsonl"
    path.write_text("".join(json.dumps(alert) + "\n" for alert in alerts), encoding="utf-8")
    return path


def saved_bundle(tmp_path, kind="nonfinite", **parts):
    """A bundle, and a module in a file beside it."""
    (tmp_path / "my_module.py").write_text(MODULE, encoding="utf-8")
    batch = torch.tensor([[1.0, 1.0], [0.0, 0.0]])
    entry = {"batch": batch, "batch_idx": 0, "rng": torch.get_rng_state(), "cuda_rng": None}
    path = tmp_path / "step3.bundle.pt"
    Bundle({**ALERT, "kind": kind}, {}, versions(), **{"batches": [entry], **parts}).save(path)
    return path


def test_alerts_of_all_runs_are_listed(call, tmp_path):
    """A row each, with the culprit where there is one."""
    written(tmp_path / "logs" / "a", ALERT, {**ALERT, "step": 9, "culprit": CULPRIT})
    written(tmp_path / "logs" / "b", {**ALERT, "kind": "explosion", "culprit": {**CULPRIT, "cause": "rate"}})
    done = call("alerts", "logs")
    assert done.exit_code == 0, done.output
    assert "3 alerts." in done.output
    assert "forward: `div` divided by 0" in done.output
    assert "rate: `div`" in done.output
    assert "a gradient is NaN" in done.output


def test_alerts_can_be_chosen_by_kind(call, tmp_path):
    """More than one kind as well."""
    written(tmp_path / "run", ALERT, {**ALERT, "kind": "explosion"}, {**ALERT, "kind": "vanishing"})
    assert "1 alert." in call("alerts", "run", "--kind", "explosion").output
    assert "2 alerts." in call("alerts", "run", "-k", "explosion", "-k", "vanishing").output
    assert "No alerts below run.\n" in call("alerts", "run", "--kind", "overflow").output


def test_alerts_of_the_folder_gradguard_are_those_of_its_run(call, tmp_path):
    """It is the folder that people find; and where there is none, that is said."""
    written(tmp_path / "run", ALERT)
    assert "1 alert." in call("alerts", "run/gradguard").output
    (tmp_path / "empty").mkdir()
    assert "there is no gradguard/alerts.jsonl" in call("alerts", "empty").output.replace("\n", " ")


def test_replay_without_a_module_prints_the_report(call, tmp_path):
    """Message, remedy and versions; brackets are no markup."""
    done = call("replay", saved_bundle(tmp_path, left_out=["model: 9 MiB, with 1 MiB left"]))
    assert done.exit_code == 0, done.output
    for text in (ALERT["message"], ALERT["remedy"], torch.__version__, "Left out: model: 9 MiB", "--module"):
        assert text in done.output


@pytest.mark.smoke
def test_replay_with_a_module_names_the_culprit_again(call, tmp_path):
    """Operator, row and line."""
    done = call("replay", saved_bundle(tmp_path), "--module", "my_module:Divides")
    assert done.exit_code == 0, done.output
    assert "has no weights" in done.output
    output = " ".join(done.output.split())
    assert re.search(r"divided \S+ by 0", output)
    assert "in row 1" in output
    assert "my_module.py" in done.output


def test_replay_of_a_vanishing_step_shows_the_factors(call, tmp_path):
    """As a table."""
    done = call("replay", saved_bundle(tmp_path, kind="vanishing"), "--module", "my_module:Deep")
    assert "activation: each of 9 sigmoids" in done.output
    assert "gradient norm" in done.output
    assert "layers.17" in done.output


def test_replay_of_a_step_that_is_in_order_says_so(call, tmp_path):
    """For instance on a module that has been mended."""
    done = call("replay", saved_bundle(tmp_path), "--module", "my_module:Deep")
    assert "Nothing is wrong" in done.output


@pytest.mark.parametrize(
    ("module", "match"),
    [
        ("my_module", "must look like"),
        ("my_module:Nothing", "can't be found"),
        ("no_such_module:build", "can't be found"),
        ("torch.nn:Identity", "training_step"),
    ],
)
def test_replay_says_what_is_wrong_with_the_module(call, tmp_path, module, match):
    """With exit code 2."""
    done = call("replay", saved_bundle(tmp_path), "--module", module)
    assert done.exit_code == 2
    assert match in done.output.replace("\n", " ")


@pytest.mark.parametrize("option", [("--arg", "width=3"), ("--checkpoint", "last.ckpt")])
def test_replay_refuses_arguments_without_a_module(call, tmp_path, option):
    """They would be for nothing."""
    (tmp_path / "last.ckpt").touch()
    done = call("replay", saved_bundle(tmp_path), *option)
    assert done.exit_code == 2
    assert "`--arg` and `--checkpoint` are for `--module`" in done.output


def test_output_is_made_safe_also_where_it_is_no_file(monkeypatch):
    """A notebook has a stream of its own, which takes any character."""
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    make_output_safe()
    sys.stdout.write("\u00e9")
    sys.stderr.write("\u00e9")
    assert (sys.stdout.getvalue(), sys.stderr.errors) == ("\u00e9", "backslashreplace")


def test_replay_of_another_file_is_refused(call, tmp_path):
    """With exit code 2."""
    torch.save({"state_dict": {}}, tmp_path / "x.pt")
    done = call("replay", tmp_path / "x.pt")
    assert (done.exit_code, "can't be read" in done.output) == (2, True)


@pytest.mark.smoke
def test_doctor_tells_healthy_from_sick_by_exit_code(call, tmp_path):
    """0, 1, and 2 where the file can't be read."""
    layer = nn.Linear(2, 2)
    torch.save({"state_dict": layer.state_dict()}, tmp_path / "good.ckpt")
    layer.weight.data[0, 0] = torch.nan
    torch.save({"state_dict": layer.state_dict()}, tmp_path / "bad.ckpt")
    torch.save(layer, tmp_path / "objects.ckpt")
    good, bad, objects = (call("doctor", f"{name}.ckpt") for name in ("good", "bad", "objects"))
    assert (good.exit_code, bad.exit_code, objects.exit_code) == (0, 1, 2)
    assert "Healthy: 2 tensors" in good.output
    assert "state_dict['weight']" in bad.output
    assert "1 NaN of 4 elements" in bad.output
    assert "--trust" in objects.output


@pytest.mark.smoke
def test_command_runs_in_a_process_of_its_own(tmp_path):
    """As the entry point calls it."""
    written(tmp_path / "run", ALERT)
    code = "import sys; sys.argv[0] = 'gradguard'; from lightning_gradguard.cli import main; main()"
    environment = {**os.environ, "COLUMNS": "200"}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-W", "ignore::DeprecationWarning", "-c", code, "alerts", str(tmp_path)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "1 alert." in done.stdout


def test_command_without_its_extra_says_which(monkeypatch):
    """What is missing, and how to get it."""
    monkeypatch.setattr("lightning_gradguard.cli.find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r'pip install "lightning-gradguard\[cli\]"'):
        main()


def test_doctor_explain_and_replay_print_json_for_scripts(call, tmp_path):
    """One object, and nothing else."""
    torch.save({"w": torch.tensor([1.0, torch.nan])}, tmp_path / "bad.ckpt")
    sick = json.loads(call("doctor", "bad.ckpt", "--json").stdout)
    assert (sick["is_healthy"], sick["findings"][0]["name"]) == (False, "w")
    told = json.loads(call("explain", "NonFinite", "--json").stdout)
    assert told["name"] == "nonfinite"
    path = saved_bundle(tmp_path)
    assert json.loads(call("replay", path, "--json").stdout)["alert"]["value"] == "NaN"
    again = json.loads(call("replay", path, "--json", "--module", "my_module:Divides").stdout)["replay"]
    assert (again["losses"], again["culprit"]["op"]) == (["Infinity"], "div")


def test_listing_needs_no_torch():
    """It is there at once."""
    code = "import sys, lightning_gradguard.cli.commands; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
