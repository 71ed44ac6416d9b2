"""The examples do what they claim, and so does the README."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_gradguard.sinks.console import in_short

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CONTRACT = {
    "scalars": {
        "gradguard/global_norm",
        "gradguard/clipped_norm",
        "gradguard/clip_coef",
        "gradguard/explosion_limit",
        "gradguard/num_skipped",
        "gradguard/num_clipped",
        "gradguard/num_alerts",
        "gradguard/norm/lstm",
        "gradguard/norm/head",
    },
    "histograms": {"gradguard/log10_norms", "gradients/lstm.weight_ih_l0", "gradients/head.bias"},
    "tensors": {"gradguard/alerts", "custom_scalars__config__"},
}


def run_example(name, *arguments, cwd):
    """Run an example as a user would; its output. One thread, since several workers share few cores."""
    command = [sys.executable, str(ROOT / "examples" / name), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_quickstart_is_stopped_before_the_bad_step(tmp_path, monkeypatch, capsys):
    """It ends by itself, with every tag of the contract, the alert, and the weights from before."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import quickstart  # noqa: PLC0415

    before = {}

    class Remembering(quickstart.CharacterModel):
        """Keeps the weights that each step begins with."""

        def on_train_batch_start(self, batch, batch_idx):
            before["weights"] = [parameter.detach().clone() for parameter in self.parameters()]

    monkeypatch.setattr(quickstart, "CharacterModel", Remembering)
    with pytest.warns(UserWarning, match="Explosion at step 130"):
        trainer = quickstart.main(str(tmp_path), max_steps=180, hidden_size=16)
    guard = next(callback for callback in trainer.callbacks if isinstance(callback, quickstart.GradGuard))
    assert guard.stopped_by.kind == "explosion"
    assert (guard.num_steps, guard.num_skipped) == (131, 1)
    assert all(torch.equal(*pair) for pair in zip(trainer.model.parameters(), before["weights"], strict=True))
    lines = (Path(trainer.log_dir) / "gradguard" / "alerts.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["kind"] for line in lines] == ["explosion"]
    events = EventAccumulator(trainer.log_dir).Reload().Tags()
    assert {kind: tags - set(events[kind]) for kind, tags in CONTRACT.items()} == {kind: set() for kind in CONTRACT}
    assert "tensorboard --logdir" in capsys.readouterr().out


@pytest.mark.slow
def test_vanishing_sigmoid_names_where_the_gradient_dies(tmp_path):
    """An alert for the sigmoid network, none for the same with ReLU, which learns."""
    output = run_example("vanishing_sigmoid.py", cwd=tmp_path)
    assert "it is lost at `layers." in output
    assert re.search(r"ReLU: \d\d\.\d% of the test images right, alerts in \d+ steps: 0", output)


@pytest.mark.slow
def test_exploding_rnn_compares_three_runs(tmp_path):
    """Watched it breaks, clipped it trains, skipped it is stopped with the weights it began with."""
    output = run_example("exploding_rnn.py", cwd=tmp_path)
    assert "watched: test loss nan" in output
    assert re.search(r"watched: .* 360 steps, 0 clipped, 0 skipped", output)
    assert re.search(r"clipped: .* 360 clipped, 0 skipped, alerts: 0", output)
    assert re.search(r"skipped: .* 10 steps, 0 clipped, 10 skipped", output)


def test_raw_loop_skips_one_step(tmp_path):
    """The NaN batch is the third micro-batch of its step."""
    output = run_example("raw_loop.py", cwd=tmp_path)
    assert "1 skipped" in output
    assert "micro-batch 2" in output


@pytest.mark.slow
def test_cli_reads_the_configuration(tmp_path):
    """300 steps, clipped as configured."""
    run_example("cli.py", "fit", "--config", str(ROOT / "examples" / "config.yaml"), cwd=tmp_path)
    assert (tmp_path / "logs" / "cli").is_dir()


def imported(name, monkeypatch, folder):
    """An example as a module, run in a folder of the test's."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    monkeypatch.chdir(folder)
    return importlib.import_module(name)


@pytest.mark.filterwarnings("ignore::lightning_gradguard.GradientWarning")
def test_transformer_empty_text_is_named(tmp_path, monkeypatch):
    """Text 101 is row 5 of batch 6, and its softmax has nothing to sum over."""
    guard = imported("transformer_finetuning", monkeypatch, tmp_path).main(pretraining_epochs=1)
    (alert,) = guard.alerts
    assert (alert.step, guard.num_skipped, alert.culprit.op, alert.culprit.samples) == (6, 1, "_softmax", (5,))
    assert alert.culprit.module == "blocks.0.attention"


@pytest.mark.filterwarnings("ignore::lightning_gradguard.GradientWarning")
def test_gan_alert_names_optimizer_and_loss(tmp_path, monkeypatch):
    """The generator's gradient vanishes with one loss, and not with the other."""
    gan = imported("gan", monkeypatch, tmp_path)
    alert = gan.main(saturating=True, num_steps=60).alerts[0]
    assert (alert.kind, alert.optimizer, alert.culprit.cause) == ("vanishing", 0, "loss")
    assert 0 not in [alert.optimizer for alert in gan.main(saturating=False, num_steps=60).alerts]


@pytest.mark.filterwarnings("ignore::lightning_gradguard.GradientWarning")
def test_diffusion_rows_of_the_first_level_are_named(tmp_path, monkeypatch):
    """A division by zero at some rows; the cured schedule has none."""
    diffusion = imported("diffusion", monkeypatch, tmp_path)
    guard = diffusion.main(num_steps=10)
    assert {alert.culprit.op for alert in guard.alerts} == {"div"}
    assert all(alert.culprit.samples for alert in guard.alerts)
    assert diffusion.main(least_noise=1e-3, num_steps=10).alerts == []


@pytest.mark.filterwarnings("ignore::lightning_gradguard.GradientWarning")
def test_hugging_face_trainer_skips_one_step(tmp_path, monkeypatch):
    """And trains to the end, clipped by the guard alone."""
    pytest.importorskip("accelerate")
    guard = imported("hugging_face", monkeypatch, tmp_path).main(num_steps=25)
    assert (guard.num_steps, guard.totals.num_skipped, guard.totals.num_clipped) == (25, 1, 24)
    assert [alert.step for alert in guard.alerts] == [20]


@pytest.mark.filterwarnings("ignore::lightning_gradguard.GradientWarning")
def test_notebook_cells_run_one_after_another(tmp_path, monkeypatch):
    """And the row that its text names is the one that the alert names."""
    monkeypatch.chdir(tmp_path)
    cells = json.loads((ROOT / "examples" / "first_alert.ipynb").read_text(encoding="utf-8"))["cells"]
    names = {"__name__": "notebook"}
    for cell in cells:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            exec("".join(cell["source"]), names)
    (first, second) = names["guard"].alerts
    assert (first.batch_idx, second.batch_idx, first.culprit.samples) == (33, 33, (7,))
    assert any("Row 7 of batch 33 is row 271" in "".join(cell["source"]) for cell in cells)


def test_readme_is_read_in_two_minutes():
    """All else has a page in docs/."""
    assert len(README.splitlines()) <= 90


def test_readme_links_lead_to_files():
    """Each relative link of README."""
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if not link.startswith("http")]
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


@pytest.mark.filterwarnings("ignore::lightning_gradguard.GradientWarning")
def test_alert_in_readme_and_tutorial_is_what_the_example_says(tmp_path, monkeypatch):
    """Word for word, as a terminal shows it; and the cure raises none."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    monkeypatch.chdir(tmp_path)
    import first_alert  # noqa: PLC0415

    (alert,) = first_alert.main(first_alert.Head()).alerts
    text = " ".join(in_short(alert, coloured=False).split())
    for page in (README, (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")):
        assert text in " ".join(page.split())
    assert first_alert.main(first_alert.CuredHead()).alerts == []


def test_readme_test_command_is_the_one_that_ci_runs():
    """One command between the markers that .ci/run reads."""
    block = re.search(r"<!-- test-command -->\n```bash\n(.*)\n```\n<!-- end -->", README)
    assert block is not None
    assert block.group(1).endswith(".venv/bin/pytest")


def test_readme_pictures_are_there():
    """And none stands in the folder that nobody shows."""
    pages = [README, *(path.read_text(encoding="utf-8") for path in (ROOT / "docs").glob("*.md"))]
    shown = {name for page in pages for name in re.findall(r"\]\((?:docs/)?images/(.*?)\)", page)}
    assert shown == {path.name for path in (ROOT / "docs" / "images").iterdir()}
