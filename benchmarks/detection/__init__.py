"""How well the detectors tell a sick training from a healthy one, beside the rules that others use."""
