"""Trainings that diverge: with rollback at its default settings, and without a guard. How many end as if nothing was?"""

from __future__ import annotations

import logging

from benchmarks._report import begin, parser, table
from benchmarks.recovery.outcome import TOLERANCE, play
from benchmarks.recovery.trainings import FAULTS, NETWORKS

NUM_SEEDS = 3


def main() -> None:
    """All networks, faults and seeds."""
    chosen = parser(__doc__).parse_args()
    console = begin(chosen)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    networks = list(NETWORKS)[:1] if chosen.quick else list(NETWORKS)
    seeds = range(1 if chosen.quick else NUM_SEEDS)
    rows, outcomes = [], []
    for fault, spoiled in FAULTS.items():
        for network in networks:
            played = [play(network, fault, seed) for seed in seeds]
            outcomes.extend(played)
            ratio = max(outcome.guarded / outcome.healthy for outcome in played)
            worse = min(outcome.unguarded / outcome.healthy for outcome in played)
            rows.append(
                [
                    spoiled.title,
                    network,
                    f"{sum(outcome.came_back for outcome in played)} of {len(played)}",
                    f"{sum(outcome.needed_no_guard for outcome in played)} of {len(played)}",
                    f"{ratio:.3f}",
                    f"{worse:.3g}",
                    " ".join(str(outcome.num_rollbacks) for outcome in played),
                ]
            )
    columns = ["fault", "training", "back", "unguarded", "loss, worst", "unguarded, best", "rollbacks"]
    console.print(table("Loss over that of the same training without the fault", columns, rows))
    back, without = sum(o.came_back for o in outcomes), sum(o.needed_no_guard for o in outcomes)
    console.print(f"Within {TOLERANCE:.0%}: {back} of {len(outcomes)} with rollback, {without} without a guard.")


if __name__ == "__main__":
    main()
