"""Imports between the package's modules go one way, and the heavy ones stay where they belong."""

from __future__ import annotations

import ast
import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import lightning_gradguard

PACKAGE = Path(lightning_gradguard.__file__).parent
NAME = PACKAGE.name
SOURCES = {
    ".".join((NAME, *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): path.read_text("utf-8")
    for path in sorted(PACKAGE.rglob("*.py"))
}
# Loaded only when a name is used; imports nothing when it is imported itself.
SOURCES.pop(NAME)

LAYERS = (
    # plain words, without torch
    *("wording", "policy", "layout", "alert", "record", "errors", "files", "tensorboard_plugin"),
    # gradients -> measure -> judge -> act -> report
    *("measure", "statistics", "detectors", "judge", "clippers", "act", "sinks", "report"),
    # looking into a bad step, and going back
    *("forensics", "recovery"),
    # the pipeline, and Lightning around it
    *("settings", "environment", "saved_state", "fast_path", "pipeline", "guard", "trainer", "callback"),
    # tools
    *("testing", "cli"),
)
"""The package from the bottom up: each may import those before it. `docs/architecture.md` draws the same list."""

WITHOUT_TORCH = ("wording", "policy", "layout", "alert", "record", "errors", "files.json_lines", "tensorboard_plugin")
"""Are loaded where torch is not wanted, or not there."""

NEVER = {
    "detectors": ("measure",),
    "judge": ("measure",),
    "report": ("measure", "statistics", "clippers", "act"),
    "sinks": (
        *("measure", "statistics", "detectors", "judge", "clippers", "act"),
        *(f"tensorboard_plugin.{name}" for name in ("data", "plugin", "tree", "views")),
    ),
    "clippers": ("detectors", "judge"),
    "tensorboard_plugin": ("alert", "record", "errors"),
    "forensics": ("detectors", "judge", "clippers", "act", "sinks", "report"),
}
"""What a layer must not import although it stands below: between measuring and acting there are plain numbers only."""

ALONE = {
    "lightning": ("trainer.packages",),
    "pytorch_lightning": ("trainer.packages",),
    "lightning_fabric": ("trainer.packages",),
    "tensorboard": ("sinks.event_files", "sinks.summaries", "sinks.tab", "sinks.tensorboard", "tensorboard_plugin"),
    "torch.utils.tensorboard": ("sinks.event_files", "sinks.tensorboard"),
    "apprise": ("sinks.notify",),
    "typer": ("cli",),
    "rich": ("cli",),
}
"""Who alone imports a foreign package. Of Lightning's two there may be either, so one place knows their classes."""


def imports(source):
    """All modules that a source imports at run time, wherever in it, by name too; not those for type checkers only."""
    tree = ast.parse(source)
    typing_only = {id(node) for block in typing_blocks(tree) for statement in block.body for node in ast.walk(statement)}
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            yield from (name.value for name in node.args[:1] if isinstance(name, ast.Constant))
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide what they reach"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def typing_blocks(tree):
    """What is for type checkers only."""
    for block in ast.walk(tree):
        if isinstance(block, ast.If) and isinstance(block.test, ast.Name) and block.test.id == "TYPE_CHECKING":
            yield block


def compared_with_one_package(source):
    """Checks of a class that was imported from one of Lightning's packages for type checkers: the other's are others."""
    tree = ast.parse(source)
    of_lightning = {
        alias.asname or alias.name
        for block in typing_blocks(tree)
        for node in ast.walk(block)
        if isinstance(node, (ast.Import, ast.ImportFrom)) and "lightning." in ast.unparse(node)
        for alias in node.names
    }
    checks = (node for node in ast.walk(tree) if isinstance(node, (ast.Call, ast.Try)))
    for check in checks:
        named = (
            check.args[1:] if isinstance(check, ast.Call) else [handler.type for handler in check.handlers if handler.type]
        )
        if isinstance(check, ast.Try) or ast.unparse(check.func) in ("isinstance", "issubclass"):
            used = {node.id for part in named for node in ast.walk(part) if isinstance(node, ast.Name)}
            yield from sorted(used & of_lightning)


def inside(module, place):
    """Whether a module is this place in the package, or below it."""
    return module == f"{NAME}.{place}" or module.startswith(f"{NAME}.{place}.")


def layer_of(module):
    """Where in `LAYERS` a module stands."""
    return LAYERS.index(module.split(".")[1])


def own_imports(sources):
    """The modules of the package that each of them imports."""
    return {module: {name for name in imports(text) if name in sources} - {module} for module, text in sources.items()}


def violations(sources):
    """Every import that goes the wrong way, as a sentence."""
    found = []
    for module, text in sources.items():
        for imported in sorted(set(imports(text))):
            top = imported.partition(".")[0]
            for foreign, places in ALONE.items():
                if f"{imported}.".startswith(f"{foreign}.") and not any(inside(module, place) for place in places):
                    found.append(f"{module} imports {imported}")
            for place, forbidden in NEVER.items():
                if inside(module, place) and any(inside(imported, other) for other in forbidden):
                    found.append(f"{module} imports {imported}")
            if top == NAME and imported in SOURCES and layer_of(imported) > layer_of(module):
                found.append(f"{module} imports {imported}")
            if top == "torch" and any(inside(module, place) for place in WITHOUT_TORCH):
                found.append(f"{module} imports {imported}")
    return found


def test_imports_of_the_package_go_one_way():
    """No module imports what stands above it."""
    assert violations(SOURCES) == []


def test_layers_are_the_whole_package():
    """Whoever adds a file or folder says where it stands."""
    assert {module.split(".")[1] for module in SOURCES} == set(LAYERS)


def test_imports_of_the_package_have_no_cycle():
    """There is an order in which each module comes after all that it imports."""
    assert len(list(TopologicalSorter(own_imports(SOURCES)).static_order())) == len(SOURCES)


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("detectors.explosion", "from lightning_gradguard.guard import Guard"),
        ("detectors.own", "import lightning_gradguard.callback"),
        ("clippers.norm", "from lightning_gradguard import guard"),
        ("guard", "def later():\n    from lightning.pytorch import Trainer"),
        ("guard", "import lightning"),
        ("callback", "from lightning.pytorch import Callback"),
        ("trainer.progress", "import pytorch_lightning"),
        ("trainer.progress", "importlib.import_module('lightning.pytorch')"),
        ("trainer.progress", "from lightning_fabric import Fabric"),
        ("sinks.console", "import apprise"),
        ("sinks.jsonl", "from tensorboard.compat import proto"),
        ("sinks.tags", "from torch.utils.tensorboard import SummaryWriter"),
        ("tensorboard_plugin.data", "from lightning_gradguard.sinks import Sink"),
        ("tensorboard_plugin.views", "import torch"),
        ("policy", "from lightning_gradguard.measure.measurement import Gradients"),
        ("record", "import torch"),
    ],
)
def test_imports_wrong_way_are_found(module, line):
    """The test above can fail: each of these is one violation, or two."""
    assert violations(SOURCES | {f"{NAME}.{module}": line})


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("trainer.packages", "import lightning.pytorch"),
        ("callback", "if TYPE_CHECKING:\n    from lightning.pytorch import Trainer"),
        ("detectors.own", "if TYPE_CHECKING:\n    from lightning_gradguard.guard import Guard"),
        ("guard", "from lightning_gradguard.detectors import Detector"),
    ],
)
def test_imports_right_way_are_allowed(module, line):
    """And it does not fail for what is in order."""
    assert violations({f"{NAME}.{module}": line}) == []


def test_classes_of_one_lightning_package_are_never_compared_with():
    """They are there for annotations."""
    assert [module for module, text in SOURCES.items() if list(compared_with_one_package(text))] == []


@pytest.mark.parametrize(
    "line",
    [
        "isinstance(part, LightningModule)",
        "issubclass(type(part), (dict, LightningModule))",
        "isinstance(part, pl.LightningModule)",
        "try:\n    fit()\nexcept LightningModule:\n    pass",
    ],
)
def test_classes_of_one_lightning_package_are_found_where_compared_with(line):
    """The test above can fail."""
    imported = "if TYPE_CHECKING:\n    import lightning.pytorch as pl\n    from lightning.pytorch import LightningModule\n"
    assert list(compared_with_one_package(imported + line))


def test_imports_in_a_circle_are_found():
    """The cycle test can fail as well."""
    circle = {f"{NAME}.a": f"import {NAME}.b", f"{NAME}.b": f"from {NAME} import a"}
    with pytest.raises(CycleError):
        list(TopologicalSorter(own_imports(circle)).static_order())


def test_code_that_is_left_out_of_coverage_says_why():
    """In its line, after a dash."""
    lines = [line for path in PACKAGE.rglob("*.py") for line in path.read_text(encoding="utf-8").splitlines()]
    marked = [line for line in lines if "pragma:" in line]
    assert marked
    assert [line for line in marked if not re.search(r"  # pragma: no (cover|branch) - \S+", line)] == []
