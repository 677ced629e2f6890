"""`python -m pretrain_demo`: what `make demo` and `make up` run."""

import argparse
import os
import sys

from pretrain_demo.console import Console
from pretrain_demo.install import install
from pretrain_demo.story import play
from pretrain_demo.target import DemoError, choose


def main() -> int:
    """Run the demo; a failure is one line on stderr and exit status 1."""
    parser = argparse.ArgumentParser(prog="pretrain_demo", description=__doc__)
    parser.add_argument("--up", action="store_true", help="stop when the operator is installed")
    options = parser.parse_args()
    try:
        target, console = choose(os.environ), Console()
        install(target, console)
        if not options.up:
            play(target, console)
    except DemoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
