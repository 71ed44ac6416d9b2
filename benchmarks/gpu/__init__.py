"""Checks and measurements on a CUDA device, in one command of at most ten minutes."""
