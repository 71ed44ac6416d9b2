"""What earlier replays of a run have found, for the alert that ends it."""

from __future__ import annotations

from dataclasses import replace

from lightning_gradguard.alert import Culprit


class EarlierCulprits:
    """Remembers the last culprit of each kind of finding, and has the one that ends a run agree with it."""

    def __init__(self) -> None:
        self._found: dict[tuple[int, str], tuple[int, Culprit]] = {}

    def note(self, optimizer: int, kind: str, step: int, culprit: Culprit | None) -> None:
        """What a replay has found."""
        if culprit is not None:
            self._found[optimizer, kind] = (step, culprit)

    def final(self, optimizer: int, kind: str, culprit: Culprit | None) -> Culprit | None:
        """The culprit of the alert that ends a run.

        Where the last step's replay has found nothing, it is the one before it, and says so; where it has found another,
        both are named, since what follows from a fault often shows elsewhere.
        """
        if (optimizer, kind) not in self._found:
            return culprit
        step, earlier = self._found[optimizer, kind]
        if culprit is None:
            message = f"the replay of this step shows nothing; at step {step} it was: {earlier.message}"
            return replace(earlier, message=message, samples=None, reproduced=False, error=None)
        if _place(culprit) == _place(earlier):
            return culprit
        return replace(culprit, message=f"{culprit.message} (at step {step} it was: {earlier.message})")


def _place(culprit: Culprit) -> tuple[object, ...]:
    # Rows and modules of the data differ from batch to batch.
    module = "" if culprit.phase == "data" else culprit.module
    return culprit.phase, module, culprit.op, culprit.line, culprit.cause
