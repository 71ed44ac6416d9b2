"""python -m benchmarks.forensics: how often the culprit is right, and what was said that is not true."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from rich.console import Console

from benchmarks._report import table
from benchmarks.forensics import (  # noqa: F401 - register their cases
    architectures,
    dropped,
    layouts,
    mechanisms,
    objectives,
    places,
    probabilities,
)
from benchmarks.forensics.labels import CASES, Case
from benchmarks.forensics.run import Outcome, judge

TESTED = "labelled cases of the tests"


def tested() -> list[Case]:
    """Those of `tests/forensics/nonfinite`, which the code has been tuned on."""
    sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "forensics" / "nonfinite"))
    import cases
    import more_cases  # noqa: F401 - registers its cases
    import own_cases  # noqa: F401

    def of(it: cases.Case) -> Case:
        samples = None if it.rows is None else tuple(it.rows)
        return Case(
            it.make,
            it.phase,
            it.module,
            "" if it.ops == "any" else it.ops,
            samples,
            at=it.at,
            has_open_samples=it.rows is None,
        )

    return [of(it) for it in cases.CASES]


def main() -> None:
    """Run, print a line for what is not right, and a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="of cases; none: all")
    chosen = parser.parse_args()
    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    console = Console(width=125)
    groups = {TESTED: tested(), **{part: [case for case in CASES if case.make.__module__.endswith(part)] for part in PARTS}}
    rows = []
    for group, cases in groups.items():
        outcomes = [judge(case) for case in cases if not chosen.names or case.name in chosen.names]
        for outcome in outcomes:
            tell(console, outcome, everything=bool(chosen.names))
        if outcomes:
            rows.append(row_of(group, outcomes))
    console.print(
        table(
            "Culprits",
            [
                "cases",
                "number",
                "exact",
                "samples",
                "wrong samples",
                "wrong guesses",
                "false",
                "remedies that work",
                "missing",
            ],
            rows,
        )
    )


PARTS = ("dropped", "layouts", "places", "architectures", "objectives", "probabilities", "mechanisms")


def tell(console: Console, outcome: Outcome, *, everything: bool) -> None:
    """What is not as the label has it."""
    said = [*outcome.wrong, *(f"FALSE: {part}" for part in outcome.false)]
    culprit = outcome.culprit
    if culprit is not None and not outcome.case.has_open_samples and culprit.samples != outcome.case.samples:
        said.append(f"samples {culprit.samples}, probably {culprit.probable_samples}, truth {outcome.case.samples}")
    if outcome.remedy not in ("", "works"):
        said.append(f"the remedy {outcome.remedy}: {culprit.remedy if culprit else None}")
    if outcome.lacks_remedy:
        said.append("no remedy")
    if said or everything:
        console.print(f"{outcome.case.name}: {'; '.join(said) or 'as labelled'}", markup=False, soft_wrap=True)
        console.print(f"    {culprit.message if culprit else None}", markup=False, soft_wrap=True)


def row_of(group: str, outcomes: list[Outcome]) -> list[str]:
    """How many are right."""
    single = [it for it in outcomes if it.case.samples is not None]
    found = sum(it.culprit is not None and it.culprit.samples == it.case.samples for it in single)
    return [
        group,
        str(len(outcomes)),
        str(sum(it.is_exact for it in outcomes)),
        f"{found} of {len(single)}",
        str(sum(it.has_wrong_samples for it in outcomes)),
        str(sum(it.has_wrong_guess for it in outcomes)),
        str(sum(len(it.false) for it in outcomes)),
        f"{sum(it.remedy == 'works' for it in outcomes)} of {sum(bool(it.remedy) for it in outcomes)}",
        str(sum(it.lacks_remedy for it in outcomes)),
    ]


if __name__ == "__main__":
    main()
