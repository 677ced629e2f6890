"""One file per parallelism, and parallelize.py, which composes them.

Only this package uses torch.distributed's parallel APIs.
"""
