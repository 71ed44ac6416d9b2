"""GradGuard with `lightning`, with `pytorch-lightning`, with both and with neither."""

from __future__ import annotations

import copy
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import pytorch_lightning
import torch

from lightning_gradguard import ClipNorm, GradGuard
from lightning_gradguard.trainer.conflicts import ConflictError
from lightning_gradguard.trainer.packages import is_lightning_module

lightning = pytest.importorskip("lightning", reason="says what happens with both installed")

BOTH = pytest.mark.parametrize("package", [lightning.pytorch, pytorch_lightning], ids=lambda package: package.__name__)

FIT = """
import tempfile
import warnings
import torch
from torch.utils.data import DataLoader

class Model(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.line = torch.nn.Linear(4, 1)
    def training_step(self, batch, batch_idx):
        loss = self.line(batch).square().mean()
        return loss * torch.nan if batch_idx == 2 else loss
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

warnings.simplefilter("ignore")
guard = GradGuard()
quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
where = dict(accelerator="cpu", default_root_dir=tempfile.mkdtemp())
pl.Trainer(max_epochs=1, callbacks=[guard], **quiet, **where).fit(Model(), DataLoader(torch.ones(6, 4)))
print(guard.num_steps, guard.num_skipped, isinstance(guard, pl.Callback))
"""


def run(code):
    """What a script prints last, in an interpreter of its own."""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


def without(*packages):
    """Code after which these can't be imported, as where they are not installed."""
    return "import sys\n" + "".join(f"sys.modules[{package!r}] = None\n" for package in packages)


@pytest.mark.parametrize(
    ("there", "missing"),
    [pytest.param("lightning.pytorch", "pytorch_lightning", marks=pytest.mark.slow), ("pytorch_lightning", "lightning")],
)
def test_guard_with_one_package_installed_works(there, missing):
    """Whichever it is."""
    code = without(missing) + f"from lightning_gradguard import GradGuard\nimport {there} as pl\n" + FIT
    assert run(code) == "6 1 True"


def test_guard_with_both_installed_works_in_the_one_imported_later():
    """Imports are mostly sorted, so `lightning_gradguard` is loaded before anything tells which package is used."""
    assert run("from lightning_gradguard import GradGuard\nimport pytorch_lightning as pl\n" + FIT) == "6 1 True"


def test_guard_loads_no_second_package():
    """One that is there, but not used, would cost seconds."""
    code = "import sys, pytorch_lightning\nfrom lightning_gradguard import GradGuard\nGradGuard()\n"
    assert run(f"{code}print('lightning.pytorch' in sys.modules)") == "False"


def test_guard_without_any_package_says_what_to_install():
    """At the import of its name."""
    code = without("lightning", "pytorch_lightning")
    code += "try:\n    from lightning_gradguard import GradGuard\nexcept ImportError as error:\n    print(error)"
    assert run(code).startswith(
        "GradGuard needs `lightning` or `pytorch-lightning`, got neither; extras of these names bring one"
    )


@pytest.mark.slow
def test_guard_with_a_broken_package_shows_what_it_lacks():
    """And does not pretend that it is not installed."""
    code = without("torchmetrics")
    code += "try:\n    from lightning_gradguard import GradGuard\nexcept ImportError as error:\n    print(error.name)"
    assert run(code) == "torchmetrics"


def test_loop_without_any_package_is_guarded():
    """`Guard` needs torch alone."""
    code = without("lightning", "pytorch_lightning") + (
        "import torch\nfrom lightning_gradguard import Guard\n"
        "line = torch.nn.Linear(2, 1)\nguard = Guard(line.named_parameters(), clip=1.0)\n"
        "line(torch.ones(1, 2)).sum().backward()\nguard.step()\nprint(guard.num_steps)"
    )
    assert run(code) == "1"


@BOTH
@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda guard: pickle.loads(pickle.dumps(guard))])
def test_guard_copied_is_a_callback_of_either_package(package, copied):
    """As it was made."""
    assert isinstance(copied(GradGuard(clip=1.0)), package.Callback)


@BOTH
def test_subclass_of_guard_is_a_callback_of_either_package(package):
    """Of a user's own, with another base."""

    class Mine(GradGuard, pytorch_lightning.Callback):
        pass

    assert isinstance(Mine(), package.Callback)


@BOTH
def test_conflict_is_an_error_of_either_package(package):
    """Whoever catches Lightning's MisconfigurationException catches it."""
    with pytest.raises(package.utilities.exceptions.MisconfigurationException):
        raise ConflictError("excluded")
    assert str(pickle.loads(pickle.dumps(ConflictError("excluded")))) == "excluded"


@BOTH
def test_conflict_is_raised_in_a_trainer_of_either_package(tmp_path, package):
    """In `setup`."""
    trainer = package.Trainer(
        accelerator="cpu", callbacks=[GradGuard(clip=ClipNorm(1.0))], gradient_clip_val=1.0, logger=False
    )
    module = package.LightningModule()
    with pytest.raises(ConflictError, match="`gradient_clip_val` must be unset"):
        trainer.callbacks[0].setup(trainer, module, "fit")


@pytest.mark.slow
def test_guard_whose_subclass_leaves_no_room_is_made_all_the_same():
    """A class between the two packages' may ask for an order of bases that excludes the other's."""
    code = (
        "import lightning.pytorch\nfrom lightning_gradguard import GradGuard\nimport pytorch_lightning as pl\n"
        "class Mine(pl.Callback, GradGuard):\n    pass\n"
        "print(isinstance(Mine(), pl.Callback), isinstance(GradGuard(), lightning.pytorch.Callback))"
    )
    assert run(code) == "True True"


def test_tests_of_the_trainer_and_of_ranks_take_lightning_from_one_place():
    """And those of several ranks: so that all of them run with either package."""
    own = {"test_packages.py", "test_pytorch_lightning.py"}
    folders = [Path(__file__).parent, Path(__file__).parents[1] / "distributed"]
    paths = [path for folder in folders for path in folder.rglob("*.py") if path.name not in own]
    imports = re.compile(r"^\s*(?:import|from) (?:pytorch_lightning|lightning)\b", re.MULTILINE)
    assert [path.name for path in paths if imports.search(path.read_text(encoding="utf-8"))] == []


@BOTH
def test_torch_module_is_no_lightning_module(package):
    """And its subclasses are, of either package."""
    assert is_lightning_module(package.LightningModule())
    assert not is_lightning_module(torch.nn.Linear(1, 1))
