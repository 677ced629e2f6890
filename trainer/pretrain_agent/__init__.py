"""The process tree around the training ranks of one worker pod.

``python -m pretrain_agent`` is the first process of the pod. It starts a launcher (torch's elastic
agent with a fork server), meets the agents of the other pods, restarts ranks in place, and leaves
a termination message behind. Only :mod:`pretrain_agent.board` is imported by the trainer.
"""
