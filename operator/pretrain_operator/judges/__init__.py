"""The judges of :data:`pretrain_operator.plan.CHECKLIST`: each looks at one side of a job.

A judge answers with a plan if the matter is its own, else with None. It changes nothing.
"""
