"""What `gradguard` can do: list a run's alerts, replay a bundle, examine a checkpoint, explain a finding."""

from __future__ import annotations

import contextlib
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Group
from rich.markdown import Markdown
from rich.table import Table

from lightning_gradguard.alert import Alert, jsonable
from lightning_gradguard.cli.alerts import follow_alerts, list_alerts
from lightning_gradguard.cli.explain import explain as explanation_of
from lightning_gradguard.cli.explain import explanations
from lightning_gradguard.cli.terminal import FOUND, cell, console, fail, make_output_safe, one_line, print_json, say, visible
from lightning_gradguard.wording import counted

if TYPE_CHECKING:
    from lightning_gradguard.forensics.bundle import Bundle
    from lightning_gradguard.forensics.rerun import Rerun

app = typer.Typer(
    help="Look at what GradGuard has found.",
    epilog="Exit codes: 0: done; 1: `doctor` has found something; 2: the command line, or the file, can't be used.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

_Json = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts: one object a line; `report`: a list of runs.")]
_LogDir = Annotated[
    Path,
    typer.Argument(
        metavar="LOGDIR",
        help="A run's log folder (it holds `gradguard/`), any folder above, or an alerts.jsonl.",
        exists=True,
    ),
]
_Output = Annotated[
    Path | None,
    typer.Option("--output", "-o", help="The file; `-` for standard output. Without it, report.html or report.md."),
]
_Format = Annotated[Literal["html", "md"], typer.Option("--format", help="html: with plots; md: words and tables.")]
_Kind = Annotated[
    list[str] | None, typer.Option("--kind", "-k", help="Only alerts of this kind, as `nonfinite`; can be repeated.")
]
_Last = Annotated[int, typer.Option("--last", "-n", min=0, help="How many of the last to show in the table; 0: all.")]
_Follow = Annotated[bool, typer.Option("--follow", "-f", help="Go on printing alerts as they come; Ctrl-C ends it.")]
_BundleFile = Annotated[
    Path, typer.Argument(metavar="BUNDLE", help="`<log_dir>/gradguard/*.bundle.pt`", exists=True, dir_okay=False)
]
_Build = Annotated[
    str | None,
    typer.Option("--module", "-m", help="`package.module:function` or class that makes the module; looked for here first."),
]
_Arguments = Annotated[
    list[str] | None, typer.Option("--arg", "-a", help="`name=value` for it, the value as JSON or text; can be repeated.")
]
_Of = Annotated[
    Path | None,
    typer.Option("--checkpoint", "-c", help="Its `hyper_parameters` are arguments, too.", exists=True, dir_okay=False),
]
_Checkpoint = Annotated[
    Path, typer.Argument(metavar="CHECKPOINT", help="A file that `torch.save` has written.", exists=True, dir_okay=False)
]
_Trust = Annotated[bool, typer.Option("--trust", help="Let code from the file run, if it can't be read otherwise.")]
_Name = Annotated[
    str | None, typer.Argument(metavar="[NAME]", help="An alert's kind, or its culprit's cause or phase; without it, all.")
]


@app.callback()
def _prepare() -> None:
    make_output_safe()


@app.command()
def alerts(
    log_dir: _LogDir,
    kind: _Kind = None,
    last: _Last = 1000,
    follow: _Follow = False,  # noqa: FBT002 - typer's way to a flag
    as_json: _Json = False,  # noqa: FBT002 - the same
) -> None:
    """List the alerts of all runs below a folder."""
    if follow:
        follow_alerts(log_dir, kind or (), as_json=as_json)
    else:
        list_alerts(log_dir, kind or (), last, as_json=as_json)


@app.command()
def replay(
    bundle_file: _BundleFile,
    module: _Build = None,
    arg: _Arguments = None,
    checkpoint: _Of = None,
    as_json: _Json = False,  # noqa: FBT002 - typer's way to a flag
) -> None:
    """Print a bundle's report; with a module, run the step again and say anew who is to blame."""
    from lightning_gradguard.files.torch_files import UnreadableError  # noqa: PLC0415 - the same
    from lightning_gradguard.forensics.bundle import Bundle  # noqa: PLC0415 - torch takes seconds

    if module is None and (arg or checkpoint):
        fail("`--arg` and `--checkpoint` are for `--module`, which says what they are the arguments of.")
    try:
        bundle = Bundle.load(bundle_file)
    except UnreadableError as error:
        fail(f"{bundle_file} can't be read as a bundle: {error}")
    again = None if module is None else _run_again(bundle, module, arg or [], checkpoint)
    if as_json:
        print_json(_as_dict(bundle, again))
    else:
        _print_report(bundle)
        _print_rerun(bundle, again)


def _run_again(bundle: Bundle, module: str, arguments: list[str], checkpoint: Path | None) -> Rerun:
    from lightning_gradguard.cli.building import build  # noqa: PLC0415 - torch takes seconds
    from lightning_gradguard.forensics.rerun import rerun  # noqa: PLC0415 - the same

    with contextlib.redirect_stdout(sys.stderr):  # what the user's code prints is not the result
        built = build(module, arguments, checkpoint)
        try:
            return rerun(built, bundle)
        except Exception as error:  # noqa: BLE001 - code of the user's, on a batch of a stranger's
            fail(f"The step can't be run again on {type(built).__name__}: {one_line(error)}")


def _as_dict(bundle: Bundle, again: Rerun | None) -> dict[str, Any]:
    alert = Alert.from_dict(bundle.alert)
    content: dict[str, Any] = {"alert": alert.to_dict(), "versions": bundle.versions, "left_out": bundle.left_out}
    if again is not None:
        content["replay"] = jsonable(asdict(again))
    return content


def _print_report(bundle: Bundle) -> None:
    alert = Alert.from_dict(bundle.alert)
    say(f"{alert.kind} ({alert.action}): {alert.message}")
    _say_remedy(alert.remedy)
    say(f"Written by {', '.join(f'{name} {version}' for name, version in bundle.versions.items())}.")
    for part in bundle.left_out:
        say(f"Left out: {part}")


def _say_remedy(remedy: str) -> None:
    if remedy:
        say(f"Try: {remedy}")


def _print_rerun(bundle: Bundle, again: Rerun | None) -> None:
    if again is None:
        say("To run the step again: --module package.module:function")
        return
    losses = ", ".join(f"{loss:.6g}" for loss in again.losses)
    say("")
    say(f"Replayed: loss {losses}; gradient norm {again.norm:.6g}.")
    if bundle.model is None:
        say("The bundle has no weights, so those that the module was made with were used.")
    culprit = again.culprit
    if culprit is None:
        say("Nothing is wrong with the step here: neither in its values, nor with its gradients.")
        return
    say(f"{culprit.cause or culprit.phase}: {culprit.message}")
    if culprit.source:
        say(f"{culprit.file}:{culprit.line}: {culprit.source}")
    _say_remedy(culprit.remedy)
    if culprit.factors:
        console().print(Markdown("\n".join(map(visible, culprit.factors)), hyperlinks=False))


@app.command()
def doctor(checkpoint: _Checkpoint, trust: _Trust = False, as_json: _Json = False) -> None:  # noqa: FBT002 - typer's way
    """Say whether a checkpoint is healthy; the exit code is 1 if not, 2 if it can't be read."""
    from lightning_gradguard.cli.health import examine, read  # noqa: PLC0415 - torch takes seconds
    from lightning_gradguard.files.torch_files import UnreadableError  # noqa: PLC0415 - the same

    try:
        health = examine(read(checkpoint, trust=trust))
    except UnreadableError as error:
        fail(error)
    looked_at = f"{counted(health.num_tensors, 'tensor')} with {counted(health.num_elements, 'element')}"
    if as_json:
        print_json({"is_healthy": not health.findings, **asdict(health)})
    elif not health.findings:
        say(f"Healthy: {looked_at}, all finite and of ordinary size.")
    else:
        table = Table("where", "shape", "what")
        for finding in health.findings:
            table.add_row(cell(finding.name), cell(finding.shape), cell(finding.problem))
        console().print(Group(table, cell(f"Not healthy: {len(health.findings)} of {looked_at}.")))
    if health.findings:
        raise typer.Exit(FOUND)


@app.command()
def explain(name: _Name = None, as_json: _Json = False) -> None:  # noqa: FBT002 - typer's way to a flag
    """Say what an alert's kind, cause or phase means, and what to do about it."""
    texts = explanations() if name is None else {name.lower(): explanation_of(name)}
    for title, text in texts.items():
        if as_json:
            print_json({"name": title, "text": text})
        else:
            console().print(Markdown(f"## {title}\n\n{text}"))


@app.command()
def report(log_dir: _LogDir, output: _Output = None, format_: _Format = "html", as_json: _Json = False) -> None:  # noqa: FBT002
    """Write what was found in one file, to read without a server: of one run, or of all below a folder."""
    from lightning_gradguard.cli.report.command import write_report  # noqa: PLC0415 - reads event files

    try:
        typer.echo(write_report(log_dir, output, "json" if as_json else format_), nl=False)
    except (ValueError, OSError) as error:
        fail(str(error))
