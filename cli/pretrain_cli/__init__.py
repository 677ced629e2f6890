"""The command line: check, convert and run training jobs on one machine, without a cluster."""
