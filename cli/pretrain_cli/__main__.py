"""Entry point of ``pretrain`` and of the plugin ``kubectl pretrain``."""

import argparse
import sys
from pathlib import Path

from pretrain_cli import importer, local, planner, validate
from pretrain_cli.options import describe, split_options


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    arguments, overrides = split_options(sys.argv[1:] if argv is None else argv)
    options = _parser().parse_args(arguments)
    if overrides and options.command != "run":
        print(f"{overrides[0][0]}: only pretrain run takes options of this form", file=sys.stderr)
        return 2
    if options.command == "run":
        return local.run(options, overrides)
    return options.run(options)


def _parser() -> argparse.ArgumentParser:
    name = Path(sys.argv[0]).name
    prog = "kubectl pretrain" if name.startswith("kubectl") else "pretrain"
    parser = argparse.ArgumentParser(prog=prog, description="Pretrain language models.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    check = commands.add_parser("validate", help="tell everything that is wrong with a file")
    check.add_argument("files", nargs="+", type=Path, metavar="FILE", help="YAML or TOML")
    check.set_defaults(run=validate.run)

    convert = commands.add_parser("import", help="turn torchtitan's TOML into a PretrainJob")
    importer.add_arguments(convert)
    convert.set_defaults(run=importer.run)

    plan = commands.add_parser("plan", help="rank layouts by estimated memory and speed")
    planner.add_arguments(plan)
    plan.set_defaults(run=planner.run)

    train = commands.add_parser(
        "run",
        help="train on this machine, without a cluster",
        usage="%(prog)s [FILE] [--nproc N] [--SECTION.KEY VALUE ...]",
        description="Train on this machine with the same agent and trainer as in a cluster.\n"
        "Options win over the file, the file over defaults.",
        epilog=describe(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    local.add_arguments(train)
    return parser


if __name__ == "__main__":
    sys.exit(main())
