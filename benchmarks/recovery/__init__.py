"""How many diverging trainings come back by themselves."""
