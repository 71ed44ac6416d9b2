"""Trainings of packages that are built on Lightning, with a guard among their callbacks."""
