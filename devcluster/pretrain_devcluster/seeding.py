"""Give nodes the layers of a freshly built image without copying a byte.

Pulling an image of several gigabytes means, for each node, to fetch it, to unpack it and to store
it once more, all on the one disk that already holds its files. But a layer's files never change: a
container that writes to one gets a copy. So build storage and nodes can share them, as hard links.
For each layer that a node lacks we ask its containerd for an empty snapshot, link the files into it
and commit it under the name by which containerd would have stored the unpacked layer. When a pod
then asks for the image, the node fetches its manifest from the registry, finds that it has all
layers, and starts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pretrain_devcluster.layout import Layout
from pretrain_devcluster.node import Node
from pretrain_devcluster.shell import DevclusterError, run


@dataclass(frozen=True)
class Layer:
    """One unpacked layer in the build storage.

    Attributes:
        chain: containerd's name of it: a digest over it and all layers below.
        parent: the chain below, empty for the lowest layer.
        folder: its files.
    """

    chain: str
    parent: str
    folder: Path


def layers_of(layout: Layout, image: str) -> list[Layer]:
    """Lists the layers of an image in the build storage, lowest first."""
    storage = layout.buildah / "images"
    images = json.loads((storage / "overlay-images" / "images.json").read_text())
    layers = json.loads((storage / "overlay-layers" / "layers.json").read_text())
    return chained(images, layers, image, storage / "overlay")


def chained(
    images: Sequence[Mapping[str, Any]],
    layers: Sequence[Mapping[str, Any]],
    image: str,
    folder: Path,
) -> list[Layer]:
    """Follows an image's layers down to the lowest and names them from there upwards.

    Args:
        images: records of the build storage, with `names` and the uppermost `layer`.
        layers: records of the build storage, with `id`, `parent` and `diff-digest`.
        image: one of the names.
        folder: holds the files of each layer in `<id>/diff`.

    Raises:
        DevclusterError: there is no such image.
    """
    tops = [each["layer"] for each in images if image in (each.get("names") or ())]
    if not tops:
        raise DevclusterError(f"{image} was not built here: build it first")
    records = {record["id"]: record for record in layers}
    downwards = []
    below: str | None = tops[0]
    while below:
        downwards.append(records[below])
        below = records[below].get("parent")
    result: list[Layer] = []
    for record in reversed(downwards):
        parent = result[-1].chain if result else ""
        chain = _chain(parent, record["diff-digest"])
        result.append(Layer(chain, parent, folder / record["id"] / "diff"))
    return result


def _chain(parent: str, layer: str) -> str:
    """The image specification's chain id of a layer on top of another chain."""
    if not parent:
        return layer
    return "sha256:" + hashlib.sha256(f"{parent} {layer}".encode()).hexdigest()


def seed(node: Node, layers: Sequence[Layer]) -> int:
    """Gives a running node the layers it lacks and returns how many these were."""
    present = {line.split()[0] for line in node.ctr("snapshots", "list").splitlines() if line}
    missing = [layer for layer in layers if layer.chain not in present]
    for layer in missing:
        _link(node, layer)
    return len(missing)


def _link(node: Node, layer: Layer) -> None:
    """An unfinished snapshot of an earlier, broken attempt may be in the way."""
    key = f"seed-{layer.chain}"
    if key in node.ctr("snapshots", "list"):
        node.ctr("snapshots", "remove", key)
    parent = [layer.parent] if layer.parent else []
    mounts = json.loads(node.ctr("snapshots", "prepare", "--mounts", key, *parent))
    target = node.on_machine(writable_folder(mounts[0]))
    run("cp", "--archive", "--link", f"{layer.folder}/.", target)
    node.ctr("snapshots", "commit", layer.chain, key)


def writable_folder(mount: Mapping[str, Any]) -> str:
    """Finds where a prepared snapshot is written to: an overlay's upper folder, or a plain one."""
    for option in mount["Options"]:
        if option.startswith("upperdir="):
            return option.removeprefix("upperdir=")
    return mount["Source"]
