"""How far low precision is from the truth."""

import math

import numpy as np

from ..core.watched import Array


def decibels(truth: dict[str, Array], found: dict[str, Array]) -> float:
    """Signal to noise of the gradients of all blocks together: 20 dB is a tenth of the norm."""
    assert truth.keys() == found.keys()
    blocks = [(value, found[name]) for name, value in truth.items() if name.startswith("layers.")]
    signal = sum(float(np.square(value).sum()) for value, _ in blocks)
    noise = sum(float(np.square(other - value).sum()) for value, other in blocks)
    return 10 * math.log10(signal / noise) if noise else math.inf
