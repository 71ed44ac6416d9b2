"""Every command that README and the pages name can be run."""

from __future__ import annotations

import importlib
import importlib.util
import re
import shlex
import sys
from pathlib import Path

import pytest

pytest.importorskip("typer")
pytest.importorskip("tomllib")  # from Python 3.11 on

import tomllib
import torch
from typer.testing import CliRunner

from lightning_gradguard import GradientWarning
from lightning_gradguard.cli.commands import app

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "lightning_gradguard/cli/explanations.md",
    *ROOT.glob("docs/*.md"),
]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
COMMANDS = ("gradguard", "python", "nox", "tensorboard", "pytest", "pip")


def commands():
    """Those in blocks, and those in the text that have arguments; each once."""
    found = set()
    for path in PAGES:
        page = path.read_text(encoding="utf-8")
        for block in re.findall(r"^```bash\n(.*?)^```", page, flags=re.DOTALL | re.MULTILINE):
            lines = (line.partition(" #")[0] for line in block.splitlines())
            found |= {part.strip() for line in lines for part in line.split("&&")}
        text = re.sub(r"^```.*?^```", "", page, flags=re.DOTALL | re.MULTILINE)
        found |= {code for code in re.findall(r"`([^`\n]+)`", text) if code.split()[0] in COMMANDS and " " in code}
    return sorted(each.replace(".venv/bin/", "") for each in found)


ALL = commands()
OWN = [each for each in ALL if each.startswith("gradguard ") and len(each.split()) > 2 and "..." not in each]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of the tutorial's run, with a checkpoint and a module to replay it on."""
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(str(ROOT / "examples"))
        patch.syspath_prepend(str(ROOT))
        first_alert = importlib.import_module("first_alert")
        with pytest.warns(GradientWarning, match="Nonfinite"):
            first_alert.main(first_alert.Head())
        build = "import first_alert\n\n\ndef build():\n    return first_alert.Model(first_alert.Head())\n"
        (folder / "my_pkg.py").write_text(build, encoding="utf-8")
        torch.save({"state_dict": first_alert.Model(first_alert.Head()).state_dict()}, folder / "last.ckpt")
        yield folder
        sys.modules.pop("my_pkg", None)


@pytest.mark.parametrize("command", OWN)
def test_command_of_the_package_runs(command, run):
    """With and without what stands in brackets; placeholders are a real run's files."""
    names = {
        "LOGDIR": str(run),
        "BUNDLE": str(run / "gradguard" / "nonfinite-step3.bundle.pt"),
        "CHECKPOINT": str(run / "last.ckpt"),
        "NAME": "saturation",
        "KIND": "explosion",
        "package.module:function": "my_pkg:build",
    }
    page = " ".join((ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8").split())
    for text in {re.sub(r"\[.*?\]", "", command), re.sub(r"[\[\]]", "", command)}:
        _, *arguments = shlex.split(text)
        result = CliRunner(env={"COLUMNS": "80"}).invoke(app, [names.get(each, each) for each in arguments])
        assert result.exit_code == 0, f"{text}: {result.output}"
        if ":cured" in text:  # the tutorial shows what it says in the end
            assert " ".join(result.output.partition("Replayed:")[2].split()) in page


def is_known(command):
    """Whether a command is one that something else runs, or names things that are there."""
    program, *arguments = shlex.split(command)
    if program == "python" and arguments[0] == "-m":
        return arguments[1] in ("venv", "sphinx") or importlib.util.find_spec(arguments[1]) is not None
    if program == "python":
        script = ROOT / arguments[0]
        in_ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
        return script.exists() and (script.parent.name == "docs" or re.search(rf"\b{script.stem}\b", in_ci))
    if program == "nox":
        noxfile = (ROOT / "noxfile.py").read_text(encoding="utf-8")
        sessions = [re.match(r"\w+", each).group() for each in arguments if each != "-s"]
        return all(f"\ndef {session}(" in noxfile for session in sessions)
    if program == "pip":
        extras = [extra for each in arguments for part in re.findall(r"\[(.*?)\]", each) for extra in part.split(",")]
        return set(extras) <= PROJECT["project"]["optional-dependencies"].keys()
    if program == "python3":
        return arguments[:2] == ["-m", "venv"]
    return program in ("pytest", "ruff", "mypy", "tensorboard", "gradguard", "export")


def test_commands_of_the_documentation_are_all_known():
    """A new one is run, or what it names is there."""
    assert OWN
    assert [command for command in ALL if not is_known(command)] == []
