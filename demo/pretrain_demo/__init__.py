"""`make demo`: the promise of this project, shown on a real cluster in a few minutes."""
