"""A decision to the alerts that people read, and a run to its totals."""
