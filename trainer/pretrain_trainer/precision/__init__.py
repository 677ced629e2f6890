"""Trades of memory, arithmetic and time that leave the model's mathematics alone."""
