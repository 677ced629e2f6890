"""What a GPU makes of a training step, beside what it could: ``make bench-gpu``."""
