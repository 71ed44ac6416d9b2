"""Running a step of a Trainer again, and what is learnt from it."""
