"""What `gradguard report` does."""

from __future__ import annotations

from pathlib import Path

from lightning_gradguard.cli.report.content import read
from lightning_gradguard.cli.report.render import at_length, to_html, to_json, to_markdown
from lightning_gradguard.cli.terminal import run_folder
from lightning_gradguard.wording import counted


def write_report(log_dir: Path, output: Path | None = None, format_: str = "html") -> str:
    """Write a report of the runs in and below a folder.

    Args:
        log_dir: the folder.
        output: the file; `-`: none, the report is what is returned. None: `report.html` or `report.md` in the working
            directory; JSON is returned.
        format_: "html", "md" or "json".

    Returns:
        What is to be printed: the report, or where it is.

    Raises:
        ValueError: if there is no run with data of GradGuard.
        OSError: if the file can't be written.
    """
    log_dir = run_folder(log_dir)
    reports = read(log_dir)
    if not reports:
        raise ValueError(
            f"There is no run with data of GradGuard in or below {log_dir}. A run has event files of TensorBoard, or "
            "gradguard/alerts.jsonl, in its folder."
        )
    title = f"GradGuard report of {log_dir.resolve().name}"
    text = to_json(reports) + "\n" if format_ == "json" else (to_html if format_ == "html" else to_markdown)(reports, title)
    if output == Path("-") or (output is None and format_ == "json"):
        return text
    path = Path(f"report.{format_}") if output is None else output
    content = text.encode(errors="backslashreplace")  # half a surrogate pair in a message of an alert is no UTF-8
    path.write_bytes(content)
    left_out = len(reports) - len(at_length(reports))
    some = f", {len(reports) - left_out} of them at length" if left_out and format_ != "json" else ""
    size = len(content) / 1e6
    return f"{path}: {counted(len(reports), 'run')}{some}, {size:.1f} MB.\n"
