"""Real faults on a real cluster: how long recovery takes, and whether it loses anything.

`faults` breaks things and mends them again, `recorder` notes what the cluster shows and when,
`stages` splits a recovery into its parts, `report` renders them; `recovery` measures every fault
again and again, `soak` throws hundreds of random ones at one job. Everything is judged against a
run that nothing happened to.
"""
