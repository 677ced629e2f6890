"""Checkpoints that are there or are not: :mod:`.manager` saves, loads and prunes them."""
