"""Tests with other versions of Python, torch, Lightning, TensorBoard and NumPy; and of the package as it is published.

`nox` runs the matrix, a test or two of each feature in every environment, and writes its rows of docs/versions.md. `nox -s
smoke` does so with the oldest versions and the newest, and writes nothing. `nox -s suite` runs all tests of what depends on
versions, for hours. A Python that is not there is left out, and nox says so. `uv` makes the environments, as it can take the
lowest versions that are allowed. `nox -s build wheel` makes sdist and wheel in `dist/`, and tries the wheel.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

import nox

nox.options.default_venv_backend = "uv"
nox.options.download_python = "never"
nox.options.error_on_missing_interpreters = False
nox.options.sessions = ["matrix"]

if shutil.which("pyenv") and "PYENV_VERSION" not in os.environ:
    # It shows one version of Python unless it is told to show more.
    versions = subprocess.run(["pyenv", "versions", "--bare"], capture_output=True, text=True, check=True)  # noqa: S607
    os.environ["PYENV_VERSION"] = ":".join(reversed(versions.stdout.split()))

OLDEST, NEWEST = "lowest-direct", "highest"

ENVIRONMENTS = [
    nox.param("3.10", "lightning", OLDEST, id="oldest"),
    nox.param("3.10", "pytorch-lightning", OLDEST, id="oldest-pytorch-lightning"),
    nox.param("3.10", "lightning", NEWEST, id="python-3.10"),
    nox.param("3.11", "lightning", NEWEST, id="python-3.11"),
    nox.param("3.12", "lightning", NEWEST, id="python-3.12"),
    nox.param("3.13", "lightning", NEWEST, id="newest"),
    nox.param("3.13", "pytorch-lightning", NEWEST, id="newest-pytorch-lightning"),
]
"""Python, the package that brings Lightning, and which of the allowed versions are taken. `lightning` brings both."""

ROOT = Path(__file__).parent
DIST = ROOT / "dist"
IN_BOTH = ("/LICENSE", "/py.typed", "/static/index.js", "/__init__.py")
"""Ends of the names of files without which a wheel or an sdist is not right."""

FOR_OLD_TENSORBOARD = "setuptools>=80,<81"
"""TensorBoard before 2.21 imports `pkg_resources`, which was taken out of setuptools."""

SUITE = ("trainer", "cli", "sinks", "act", "clippers", "measure", "test_guard.py", "test_guard_skip.py")
"""Below `tests`: what depends most on the versions of Lightning and torch, and runs with either of Lightning's packages."""

SMOKE = (
    *SUITE,
    "distributed",
    "forensics/test_bundle.py",
    "forensics/test_raw_loop.py",
    "tensorboard_plugin/test_tab_data.py",
)
"""The same, for where the tests are that are marked `smoke`."""


@nox.session
@nox.parametrize("python,package,resolution", ENVIRONMENTS)
def matrix(session: nox.Session, package: str, resolution: str) -> None:
    """A test or two of each feature, and a row of docs/versions.md."""
    _install(session, package, resolution)
    report = f"{session.create_tmp()}/report.xml"
    try:
        _test(session, package, SMOKE, "-m", "smoke", f"--junitxml={report}")
    finally:  # failures are for the table, too
        session.run("python", "docs/versions_table.py", session.name.removeprefix("matrix(").removesuffix(")"), report)


@nox.session
@nox.parametrize("python,package,resolution", [ENVIRONMENTS[0], ENVIRONMENTS[-1]])
def smoke(session: nox.Session, package: str, resolution: str) -> None:
    """The same with the oldest versions and with the newest, without the row."""
    _install(session, package, resolution)
    _test(session, package, SMOKE, "-m", "smoke")


@nox.session
@nox.parametrize("python,package,resolution", ENVIRONMENTS)
def suite(session: nox.Session, package: str, resolution: str) -> None:
    """All tests of what depends on versions, but for slow ones."""
    _install(session, package, resolution)
    _test(session, package, SUITE)


@nox.session
def build(session: nox.Session) -> None:
    """The sdist, the wheel built from it, and what has to be in them."""
    session.install("build", "twine")
    shutil.rmtree(DIST, ignore_errors=True)
    session.run("python", "-m", "build", "--outdir", str(DIST))
    session.run("twine", "check", "--strict", *(str(path) for path in DIST.iterdir()))
    (wheel,), (sdist,) = DIST.glob("*.whl"), DIST.glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as opened, tarfile.open(sdist) as unpacked:
        names = {"wheel": opened.namelist(), "sdist": unpacked.getnames()}
    for kind, found in names.items():
        missing = [name for name in IN_BOTH if not any(path.endswith(name) for path in found)]
        if missing:
            session.error(f"the {kind} lacks {', '.join(missing)}")


@nox.session(venv_backend="venv")
def wheel(session: nox.Session) -> None:
    """The quickstart with the wheel in an empty environment, as a user begins. pip, since most do."""
    (built,) = DIST.glob("*.whl")
    session.install("-q", "-c", "constraints.txt", f"{built}[lightning]")
    session.chdir(session.create_tmp())  # away from the sources, which would be imported instead
    session.run("python", str(ROOT / "examples" / "quickstart.py"))


@nox.session
def docs(session: nox.Session) -> None:
    """The site in docs/_build; a warning is an error, and so is a link to a page or heading that is not there."""
    session.install("-c", "constraints.txt", ".[all,docs,lightning]")
    session.run("python", "-m", "sphinx", "-W", "--keep-going", "docs", "docs/_build")


def _install(session: nox.Session, package: str, resolution: str) -> None:
    """The package with the versions that are asked for, and what tests need besides."""
    extras = [f"--extra={extra}" for extra in (package, "all", "examples")]
    pins = [FOR_OLD_TENSORBOARD] if resolution == OLDEST else []
    session.install(f"--resolution={resolution}", "-r", "pyproject.toml", *extras, *pins)
    session.install("--no-deps", "-e", ".")  # tests import `benchmarks` as well; the wheel has a session of its own
    session.install("-r", "pyproject.toml", "--extra=test-tools", "--extra=docs", *pins)


def _test(session: nox.Session, package: str, paths: Sequence[str], *arguments: str) -> None:
    name = {"lightning": "lightning.pytorch", "pytorch-lightning": "pytorch_lightning"}[package]
    below = [f"tests/{path}" for path in paths]
    session.run("pytest", *below, *arguments, *session.posargs, env={"GRADGUARD_TEST_PACKAGE": name})
