"""`make bench-operator`: many jobs at once on pretended nodes, beside the Job controller.

A real control plane, KWOK for its nodes, and workers that answer as trainers do (:mod:`workers`).
Nothing is trained; what is measured is how fast pods come, what that asks of the API server, and
what it costs. The Job controller makes as many pods of the same shape in the same run, so that the
ratio says something on a busy machine too.
"""
