"""Robust running statistics; the only place that decides which values enter a baseline."""
