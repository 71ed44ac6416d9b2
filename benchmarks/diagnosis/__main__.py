"""python -m benchmarks.diagnosis: which causes are named, and which are not."""

from __future__ import annotations

import argparse

from benchmarks.diagnosis.labels import TUNED_ON
from benchmarks.diagnosis.run import diagnose
from benchmarks.diagnosis.trainings import CHECKED


def main() -> None:
    """Run, and print a line each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--part", choices=["tuned", "checked", "all"], default="all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    arguments = parser.parse_args()
    parts = {"tuned": list(TUNED_ON), "checked": list(CHECKED)}
    if arguments.part != "all":
        parts = {arguments.part: parts[arguments.part]}
    if arguments.names:
        parts = {"chosen": arguments.names}
    for part, names in parts.items():
        outcomes = [diagnose(name, seed) for name in names for seed in arguments.seeds]
        for it in outcomes:
            mark = "  " if it.is_right else "✗ "
            how = "" if it.alerted else ", no alert"
            named = ", ".join(cause.name for cause in it.causes) or "nothing"
            print(f"{mark}{it.name}/{it.seed} (step {it.step}{how}): {it.label}; named {named}", flush=True)
            if arguments.names:
                for cause in it.causes:
                    print(f"    {cause.name}: {cause.message}. {cause.remedy}")
        right = sum(it.is_right for it in outcomes)
        alerted = [it for it in outcomes if it.alerted]
        print(
            f"{part}: {right} of {len(outcomes)} named first ({right / len(outcomes):.0%}); of those with an alert "
            f"{sum(it.is_right for it in alerted)} of {len(alerted)}\n"
        )


if __name__ == "__main__":
    main()
