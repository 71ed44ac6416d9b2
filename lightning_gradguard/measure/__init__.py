"""Gradients to norms, in one pass: a Measurement. The only reader of `.grad`, and where ranks agree on numbers."""
