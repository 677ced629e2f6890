"""First import of the fork server, and of no other process: make it die with the launcher.

A fork server ends by itself only when everybody who might ask it for a process is gone, and ranks
count as such, so a killed launcher would leave both behind. The server runs none of our code except
the modules it preloads; this is the one module here whose import has an effect, and it looks where
it is first.
"""

import sys

from pretrain_agent.process import die_with_parent

if "multiprocessing.forkserver" in sys.modules and sys.argv[0] == "-c":
    die_with_parent()
