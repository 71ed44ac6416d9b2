"""Verdicts to a decision: patience, cooldown, streaks. Pure, without torch."""
