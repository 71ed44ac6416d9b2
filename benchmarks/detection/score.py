"""From flagged steps to recall, false alarms and delay."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from benchmarks.detection.recording import Recording
from benchmarks.detection.rules import LOGGED, Rule

WITHIN = 100
"""Steps after the onset within which a fault has to be found."""


_ALSO = {"explosion": "update_ratio"}
"""What may find a fault beside the detectors that its label names: too large a step is how most explosions begin."""


@dataclass
class Score:
    """How one rule did on some recordings.

    Attributes:
        delays: by fault, for each sick run the steps from onset to alarm; None where it was not found.
        false_alarms: flagged steps that were healthy.
        healthy_steps: of healthy runs, and of sick ones before their onset.
        alarmed: healthy runs with a false alarm, and how many steps were flagged.
        healthy_runs: how many.
        missed: sick runs that were not found.
        noted: sick runs that were found by a note in the log alone.
    """

    delays: dict[str, list[int | None]] = field(default_factory=dict)
    false_alarms: int = 0
    healthy_steps: int = 0
    alarmed: dict[str, int] = field(default_factory=dict)
    healthy_runs: int = 0
    missed: list[str] = field(default_factory=list)
    noted: list[str] = field(default_factory=list)

    @property
    def recall(self) -> float:
        """Share of the sick runs that were found."""
        found = [delay is not None for delays in self.delays.values() for delay in delays]
        return sum(found) / len(found) if found else float("nan")

    @property
    def alarms_per_10_000(self) -> float:
        """False alarms in 10,000 healthy steps."""
        return 1e4 * self.false_alarms / self.healthy_steps if self.healthy_steps else 0.0

    def recall_of(self, fault: str) -> float:
        """Share of the runs with this fault that were found."""
        delays = self.delays[fault]
        return sum(delay is not None for delay in delays) / len(delays)

    def delay_of(self, fault: str) -> float | None:
        """Median delay of those that were found, in steps."""
        found = [delay for delay in self.delays[fault] if delay is not None]
        return statistics.median(found) if found else None


def score(
    rule: Rule, recordings: Iterable[Recording], *, kinds: Sequence[str] | None = None, any_kind: bool = False
) -> Score:
    """Run a rule over recordings.

    Args:
        rule: what flags steps.
        recordings: healthy and sick.
        kinds: only these of what fires count; None: all.
        any_kind: whether anything that fires counts as finding a fault; else only what the training's label asks for.
    """
    result = Score()
    for recording in recordings:
        fired = rule(recording)
        if kinds is not None:
            fired = [names & {*kinds, *(LOGGED + kind for kind in kinds)} for names in fired]
        kind = recording.kind
        name = f"{kind.name} (seed {recording.seed})"
        healthy = fired if kind.is_healthy else fired[: kind.onset]
        result.healthy_steps += len(healthy)
        number = sum(not all(name.startswith(LOGGED) for name in names) for names in healthy)
        result.false_alarms += number
        result.healthy_runs += kind.is_healthy
        if number:
            result.alarmed[name] = number
        if kind.is_healthy:
            continue
        wanted = None if any_kind else frozenset(kind.must_find) | {_ALSO[name] for name in kind.must_find if name in _ALSO}
        if wanted is not None:
            wanted |= {LOGGED + name for name in wanted}
        after = fired[kind.onset : kind.onset + WITHIN + 1]
        hits = (step for step, names in enumerate(after) if (names if wanted is None else names & wanted))
        delay = next(hits, None)
        result.delays.setdefault(kind.fault, []).append(delay)
        if delay is None:
            result.missed.append(name)
        elif all(one.startswith(LOGGED) for names in after for one in names):
            result.noted.append(name)
    return result
