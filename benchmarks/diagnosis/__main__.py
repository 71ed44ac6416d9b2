"""python -m benchmarks.diagnosis: which causes are named, which are missed, and which are false."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from benchmarks.diagnosis.labels import HEALTHY, TUNED_ON
from benchmarks.diagnosis.run import SYMPTOMS, Outcome, diagnose, diagnose_healthy
from benchmarks.diagnosis.trainings import CHECKED, FURTHER, FURTHER_HEALTHY, MISTAKEN

PARTS = {
    "tuned": tuple(TUNED_ON),
    "checked": tuple(CHECKED),
    "mistaken": tuple(MISTAKEN),
    "further": tuple(FURTHER),
    "healthy": HEALTHY,
    "further_healthy": tuple(FURTHER_HEALTHY),
}


def main() -> None:
    """Run, and print a line each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="trainings to run; all of a part if none is given")
    parser.add_argument("--part", choices=[*PARTS, "all"], default="all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    arguments = parser.parse_args()
    parts = PARTS if arguments.part == "all" else {arguments.part: PARTS[arguments.part]}
    if arguments.names:
        parts = {part: tuple(name for name in names if name in arguments.names) for part, names in PARTS.items()}
    for part, names in parts.items():
        outcomes = []
        for name in names:
            for outcome in _outcomes(name, arguments.seeds):
                outcomes.append(outcome)
                _print(outcome, in_full=bool(arguments.names))
        if outcomes:
            print(f"{part}: {score(outcomes)}\n")


def _outcomes(name: str, seeds: Sequence[int]) -> list[Outcome]:
    if name in HEALTHY or name in FURTHER_HEALTHY:
        return [diagnose_healthy(name, symptom, seed) for symptom in SYMPTOMS for seed in seeds]
    return [diagnose(name, seed) for seed in seeds]


def _print(it: Outcome, *, in_full: bool) -> None:
    mark = "  " if it.is_right else "✗ " if it.is_false else "? "
    how = "" if it.alerted else ", no alert"
    named = ", ".join(cause.name for cause in it.causes) or "nothing"
    print(
        f"{mark}{it.name}/{it.seed} ({it.symptom}, step {it.step}{how}): {it.label or 'nothing'}; named {named}", flush=True
    )
    if in_full:
        for cause in it.causes:
            print(f"    {cause.name}: {cause.message}. {cause.remedy}")


def score(outcomes: Sequence[Outcome]) -> str:
    """How many are right, missed and false."""
    right, false = sum(it.is_right for it in outcomes), sum(it.is_false for it in outcomes)
    missed = len(outcomes) - right - false
    alerted = [it for it in outcomes if it.alerted]
    return (
        f"{right} of {len(outcomes)} right ({right / len(outcomes):.0%}), {false} false, {missed} missed; "
        f"of those with an alert {sum(it.is_right for it in alerted)} of {len(alerted)} right"
    )


if __name__ == "__main__":
    main()
