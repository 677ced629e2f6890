"""Random numbers by name.

A random number in this trainer depends on what it is for, never on how many were drawn before or on
which rank draws it. So there is no generator state to save, and the same run on another layout
draws the same numbers. The price is one generator seeding per use, a few microseconds.
"""

import hashlib

import torch


def seed_of(*key: object) -> int:
    """A 63-bit seed from a key of printable parts, such as (run seed, parameter name, block)."""
    text = "\0".join(str(part) for part in key)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def generator(device: torch.device, *key: object) -> torch.Generator:
    """A generator on ``device`` for this key alone.

    torch's CPU generator uses 32 bits of the seed, CUDA's all of it, so equal keys give equal
    numbers only on devices of the same kind.
    """
    return torch.Generator(device=device).manual_seed(seed_of(*key))
