"""Command line: `python3 -m pretrain_devcluster VERB`."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path

from pretrain_devcluster import cluster as clusters
from pretrain_devcluster import images
from pretrain_devcluster.binaries import SOURCES
from pretrain_devcluster.cluster import Cluster
from pretrain_devcluster.layout import MAX_NODES, Layout
from pretrain_devcluster.shell import DevclusterError, Progress


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pretrain_devcluster", description="A real Kubernetes cluster on this machine."
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    up = verbs.add_parser("up", help="bring the cluster up, over whatever is there")
    up.add_argument("--nodes", type=int, default=2, choices=range(1, MAX_NODES + 1), metavar="N")
    down = verbs.add_parser("down", help="remove everything but images and binaries")
    down.add_argument("--purge", action="store_true", help="remove images and binaries too")
    verbs.add_parser("status", help="show processes and nodes")
    verbs.add_parser("env", help="print shell exports: KUBECONFIG, REGISTRY, PATH")
    build = verbs.add_parser("build", help="build and push images, print them by digest")
    build.add_argument("--target", choices=(*images.TARGETS, "all"), default="all")
    build.add_argument("--source", type=Path, default=SOURCES.parent, help="the repository")
    node = verbs.add_parser("node", help="list nodes, take one's power or network away")
    actions = node.add_subparsers(dest="action", required=True)
    actions.add_parser("list", help="print name and state of every node")
    for action, text in {
        "kill": "take its power away: silent loss of the whole node",
        "start": "boot it again",
        "cut": "pull its network cable: everything on it runs on",
        "heal": "plug the cable in again",
    }.items():
        actions.add_parser(action, help=text).add_argument("name")
    return parser


def _node(action: str, name: str | None) -> None:
    cluster = Cluster.current()
    if name is None:
        for node in cluster.nodes:
            print(f"{node.name}\t{node.state}\t{node.host.address}")
        return
    node = cluster.node(name)
    {"kill": node.kill, "start": node.start, "cut": node.cut, "heal": node.heal}[action]()


def _environment() -> str:
    variables = Cluster.current().environment
    folder = shlex.quote(variables.pop("PATH"))
    lines = [f"export {name}={shlex.quote(value)}" for name, value in variables.items()]
    return "\n".join([*lines, f'export PATH={folder}:"$PATH"'])


def _dispatch(arguments: argparse.Namespace) -> None:
    layout = Layout.default()
    match arguments.verb:
        case "up":
            Cluster.up(arguments.nodes)
        case "down":
            clusters.down(layout, arguments.purge, Progress())
        case "status":
            print(json.dumps(clusters.status(layout), indent=2))
        case "env":
            print(_environment())
        case "build":
            targets = images.TARGETS if arguments.target == "all" else (arguments.target,)
            for reference in Cluster.current().build(arguments.source, targets).values():
                print(reference)
        case "node":
            _node(arguments.action, getattr(arguments, "name", None))


def main() -> int:
    """Runs one verb; a failure is one line on stderr and exit status 1."""
    try:
        _dispatch(_parser().parse_args())
    except DevclusterError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
