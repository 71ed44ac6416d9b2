"""What the guard costs. Each module runs alone: `python -m benchmarks.step`, from the root of the repository."""
