"""States of a Trainer's run: kept, gone back to, and kept from being saved damaged."""
