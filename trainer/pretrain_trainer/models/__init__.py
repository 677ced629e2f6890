"""Model families, one file each, with no parallelism inside."""
