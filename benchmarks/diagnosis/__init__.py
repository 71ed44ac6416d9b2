"""Whether the cause of a vanishing or explosion alert is named: labelled trainings, run under a guard."""
