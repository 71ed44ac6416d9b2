"""What `gradguard` can do: list a run's alerts, replay a bundle, examine a checkpoint."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer
from rich.console import Console
from rich.markdown import Markdown
from rich.table import Table

if TYPE_CHECKING:
    from torch import nn

app = typer.Typer(
    help="Look at what GradGuard has found.", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False
)

_LogDir = Annotated[Path, typer.Argument(help="A run's folder, or one above several.", exists=True, file_okay=False)]
_Output = Annotated[
    Path | None,
    typer.Option("--output", "-o", help="The file; `-` for standard output. Without it, report.html or report.md."),
]
_Format = Annotated[Literal["html", "md"], typer.Option("--format", help="html: with plots; md: words and tables.")]
_AsJson = Annotated[bool, typer.Option("--json", help="Everything but the curves, for scripts; to standard output.")]
_Kind = Annotated[
    list[str] | None, typer.Option("--kind", "-k", help="Only alerts of this kind, as `nonfinite`; can be repeated.")
]
_BundleFile = Annotated[Path, typer.Argument(help="`<log_dir>/gradguard/*.bundle.pt`", exists=True, dir_okay=False)]
_Build = Annotated[
    str | None,
    typer.Option("--module", "-m", help="`package.module:function` that makes the module; looked for here first."),
]
_Checkpoint = Annotated[Path, typer.Argument(help="A file that `torch.save` has written.", exists=True, dir_okay=False)]
_Trust = Annotated[bool, typer.Option("--trust", help="Let code from the file run, if it can't be read otherwise.")]


@app.command()
def alerts(log_dir: _LogDir, kind: _Kind = None) -> None:
    """List the alerts of all runs below a folder."""
    console = Console()
    table = Table("run", "step", "epoch", "batch", "kind", "action", "value", "limit", "what", title_justify="left")
    number = 0
    for path in sorted(log_dir.rglob("gradguard/alerts.jsonl")):
        run = path.parent.parent.relative_to(log_dir)
        for alert in _read_alerts(path):
            if kind and alert["kind"] not in kind:
                continue
            number += 1
            table.add_row(
                str(run), str(alert["step"]), _text(alert["epoch"]), _text(alert["batch_idx"]), alert["kind"],
                alert["action"], f"{float(alert['value']):.4g}", f"{float(alert['limit']):.4g}", _what(alert),
            )  # fmt: skip
    if not number:
        console.print(f"No alerts below {log_dir}.")
        return
    console.print(table)
    console.print(f"{number} alert{'s' * (number != 1)}.")


def _read_alerts(path: Path) -> Iterator[dict[str, Any]]:
    lines = path.read_text(encoding="utf-8").splitlines()
    try:
        yield from map(json.loads, lines)
    except json.JSONDecodeError:  # a run that is being written, or was killed while it wrote
        Console(stderr=True).print(f"{path}: a line is not complete; what follows it is left out.", markup=False)


def _text(value: object) -> str:
    return "" if value is None else str(value)


def _what(alert: dict[str, Any]) -> str:
    culprit = alert["culprit"]
    if culprit is None:
        return str(alert["message"].partition(": ")[2])
    cause = f"{culprit['cause']}: " if culprit.get("cause") else f"{culprit['phase']}: "
    return cause + str(culprit["message"])


@app.command()
def replay(bundle_file: _BundleFile, module: _Build = None) -> None:
    """Print a bundle's report; with a module, run the step again and say anew who is to blame."""
    from lightning_gradguard.forensics.bundle import Bundle  # noqa: PLC0415 - torch takes seconds

    console = Console()
    try:
        bundle = Bundle.load(bundle_file)
    except Exception as error:  # noqa: BLE001 - whatever is wrong with the file
        _fail(f"{bundle_file} can't be read: {str(error).splitlines()[0]}")
    alert = bundle.alert
    console.print(f"[bold]{alert['kind']}[/bold] ({alert['action']}): ", end="")
    console.print(alert["message"], markup=False)
    console.print(alert["remedy"], markup=False)
    console.print(f"Written by {', '.join(f'{name} {version}' for name, version in bundle.versions.items())}.", markup=False)
    for part in bundle.left_out:
        console.print(f"Left out: {part}", markup=False)
    if module is None:
        console.print("To run the step again: --module package.module:function")
        return
    _run_again(console, bundle, _build(module))


def _run_again(console: Console, bundle: Any, module: nn.Module) -> None:
    from lightning_gradguard.forensics.rerun import rerun  # noqa: PLC0415 - torch takes seconds

    try:
        again = rerun(module, bundle)
    except (ValueError, RuntimeError) as error:
        _fail(str(error))
    losses = ", ".join(f"{loss:.6g}" for loss in again.losses)
    console.print(f"\n[bold]Replayed[/bold]: loss {losses}; gradient norm {again.norm:.6g}.")
    if bundle.model is None:
        console.print("The bundle has no weights, so those that the module was made with were used.")
    if again.culprit is None:
        console.print("Nothing is wrong with the step here: neither in its values, nor with its gradients.")
        return
    console.print(f"{again.culprit.cause or again.culprit.phase}: {again.culprit.message}", markup=False)
    if again.culprit.source:
        console.print(f"{again.culprit.file}:{again.culprit.line}: {again.culprit.source}", markup=False)
    console.print(again.culprit.remedy, markup=False)
    if again.culprit.factors:
        console.print(Markdown("\n".join(again.culprit.factors)))


def _build(path: str) -> nn.Module:
    where, _, name = path.partition(":")
    if not where or not name:
        _fail(f"`--module` must look like package.module:function, got {path!r}.")
    sys.path.insert(0, "")
    try:
        function = getattr(importlib.import_module(where), name)
    except (ImportError, AttributeError) as error:
        _fail(f"`--module {path}` can't be found: {error}.")
    built: nn.Module = function()
    return built


@app.command()
def doctor(checkpoint: _Checkpoint, trust: _Trust = False) -> None:  # noqa: FBT002 - typer's way to a flag
    """Say whether a checkpoint is healthy; the exit code is 1 if not, 2 if it can't be read."""
    from lightning_gradguard.cli.health import UnreadableError, examine, read  # noqa: PLC0415 - torch takes seconds

    console = Console()
    try:
        health = examine(read(checkpoint, trust=trust))
    except UnreadableError as error:
        _fail(str(error))
    looked_at = f"{health.num_tensors:,} tensors with {health.num_elements:,} elements"
    if not health.findings:
        console.print(f"Healthy: {looked_at}, all finite and of ordinary size.")
        return
    table = Table("where", "shape", "what")
    for finding in health.findings:
        table.add_row(finding.name.replace("[", r"\["), finding.shape.replace("[", r"\["), finding.problem)
    console.print(table)
    console.print(f"Not healthy: {len(health.findings)} of {looked_at}.")
    raise typer.Exit(1)


@app.command()
def report(log_dir: _LogDir, output: _Output = None, format_: _Format = "html", as_json: _AsJson = False) -> None:  # noqa: FBT002
    """Write what was found in one file, to read without a server: of one run, or of all below a folder."""
    from lightning_gradguard.cli.report.command import write_report  # noqa: PLC0415 - reads event files

    try:
        print(write_report(log_dir, output, "json" if as_json else format_), end="")  # noqa: T201
    except (ValueError, OSError) as error:
        _fail(str(error))


def _fail(message: str) -> NoReturn:
    Console(stderr=True).print(message, markup=False)
    raise typer.Exit(2)
