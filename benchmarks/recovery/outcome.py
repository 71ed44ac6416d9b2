"""What came of one fault in one training."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.recovery.trainings import FAULTS, NETWORKS, final_loss
from lightning_gradguard import GradGuard

TOLERANCE = 0.05


@dataclass(frozen=True)
class Outcome:
    """Of one fault in one training.

    Attributes:
        healthy: final loss without the fault.
        guarded: with it, and rollback.
        unguarded: with it, and no guard.
        num_rollbacks: how often training went back.
    """

    healthy: float
    guarded: float
    unguarded: float
    num_rollbacks: int

    @property
    def came_back(self) -> bool:
        """Whether the guarded one is as good as if nothing had been."""
        return self.guarded <= (1 + TOLERANCE) * self.healthy

    @property
    def needed_no_guard(self) -> bool:
        """Whether the other one is too."""
        return self.unguarded <= (1 + TOLERANCE) * self.healthy


def play(network: str, fault: str, seed: int) -> Outcome:
    """Train three times."""
    chosen, spoiled = NETWORKS[network], FAULTS[fault]
    guard = GradGuard(nonfinite="rollback", explosion="rollback", overflow="rollback")
    healthy = final_loss(chosen, None, [], seed=seed, in_half=spoiled.in_half)
    guarded = final_loss(chosen, spoiled, [guard], seed=seed, in_half=spoiled.in_half)
    unguarded = final_loss(chosen, spoiled, [], seed=seed, in_half=spoiled.in_half)
    return Outcome(healthy, guarded, unguarded, sum(alert.kind == "rollback" for alert in guard.alerts))
