"""Shapes of every model family, one table per family, without torch."""
