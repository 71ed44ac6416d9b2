"""The module of `gradguard replay`: how it is made, and what is said when it can't be."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

pytest.importorskip("typer")

import typer

from lightning_gradguard.cli.building import build

SOURCE = """
from torch import nn
import sys

class Net(nn.Module):
    def __init__(self, width, depth=1, name="n"):
        super().__init__()
        self.seen = (width, depth, name)

class Configured(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.seen = config

class Takes(nn.Module):
    def __init__(self, **settings):
        super().__init__()
        self.seen = settings

class Outer:
    class Inner(nn.Module): pass

ready = nn.Linear(1, 1)
number = 5
def boom(): raise KeyError("x")
def leave(): sys.exit(3)
def text(): return "net"
"""


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    """A folder with a module of its own."""
    (tmp_path / "some_nets.py").write_text(SOURCE, encoding="utf-8")
    (tmp_path / "broken_net.py").write_text("def (", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield
    sys.modules.pop("some_nets", None)


def test_class_is_called_with_the_arguments():
    """JSON, or else a text."""
    assert build("some_nets:Net", ["width=3", "name=a=b"], None).seen == (3, 1, "a=b")
    assert build("some_nets:Takes", ['x=["a", 1]', "y=[oh"], None).seen == {"x": ["a", 1], "y": "[oh"}


def test_module_that_is_ready_and_nested_names_are_taken():
    """Nothing to call; a class in a class."""
    assert isinstance(build("some_nets:ready", [], None), nn.Linear)
    assert type(build("some_nets:Outer.Inner", [], None)).__name__ == "Inner"


def test_checkpoint_gives_its_hyper_parameters(tmp_path):
    """As Lightning passes them: those that are taken, all, or as one; an argument comes before them."""
    path = tmp_path / "a.ckpt"
    torch.save({"hyper_parameters": {"width": 3, "depth": 2, "rate": 0.1}, "hparams_name": "kwargs"}, path)
    assert build("some_nets:Net", ["depth=7"], path).seen == (3, 7, "n")
    assert build("some_nets:Takes", [], path).seen == {"width": 3, "depth": 2, "rate": 0.1}
    torch.save({"hyper_parameters": {"width": 3}, "hparams_name": "config"}, path)
    assert build("some_nets:Configured", [], path).seen == {"width": 3}


@pytest.mark.parametrize(
    ("path", "arguments", "said"),
    [
        ("some_nets", (), "must look like package.module:function"),
        ("some_nets:Nothing", (), "can't be found: AttributeError"),
        ("no_such_nets:Net", (), "can't be found: ModuleNotFoundError"),
        ("broken_net:Net", (), "can't be imported: SyntaxError"),
        ("some_nets:number", (), "is of type int"),
        ("some_nets:boom", (), "could not be made: KeyError: 'x'"),
        ("some_nets:leave", (), "could not be made: SystemExit: 3"),
        ("some_nets:text", (), "gave an object of type str"),
        ("some_nets:Net", (), "takes (width, depth=1, name='n')"),
        ("some_nets:Net", ("width",), "`--arg` must look like name=value, got 'width'"),
        ("builtins:dict", ("a=1",), "gave an object of type dict"),
        ("builtins:type", ("a=1",), "takes (...)"),
    ],
)
def test_module_that_can_not_be_made_is_said(path, arguments, said, capsys):
    """What is wrong, in a sentence, with exit code 2."""
    with pytest.raises(typer.Exit) as ended:
        build(path, arguments, None)
    assert ended.value.exit_code == 2
    assert said in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"state_dict": {}}, "has no `hyper_parameters`"),
        ([1], "has no `hyper_parameters`"),
        (nn.Linear(1, 1), "can't be used"),
    ],
)
def test_checkpoint_without_hyper_parameters_is_said(content, said, tmp_path, capsys):
    """And how to do without."""
    torch.save(content, tmp_path / "a.ckpt")
    with pytest.raises(typer.Exit):
        build("some_nets:Net", [], tmp_path / "a.ckpt")
    err = " ".join(capsys.readouterr().err.split())
    assert said in err
    assert "--arg" in err
