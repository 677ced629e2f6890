"""The control plane: turns a PretrainJob into worker pods and keeps them training.

Read it in this order: :mod:`observe` gathers everything a decision needs into one frozen value,
:mod:`plan` decides (a pure function), :mod:`apply` acts. :mod:`queue` calls the three for one job
at a time, :mod:`handlers` tells it which job may have changed. All state is in the cluster: the
operator may be killed between any two writes, or be gone for a week, and goes on where things are.
"""
