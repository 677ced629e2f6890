"""Network namespaces, the bridge between them, and the one cable to the machine.

Every function is idempotent: what is there and whole is kept, what is half there is made anew.
"""

from __future__ import annotations

import ipaddress
import json

from pretrain_devcluster import daemons
from pretrain_devcluster.layout import (
    ALL_NODE_HOSTS,
    BRIDGE,
    LAN,
    MACHINE_ADDRESS,
    MACHINE_INTERFACE,
    PREFIX,
    SUBNET,
    Host,
)
from pretrain_devcluster.shell import DevclusterError, run, succeeds

_PREFIX_LENGTH = SUBNET.partition("/")[2]


def namespaces() -> list[str]:
    """Names of the namespaces that belong to the cluster, leftovers included."""
    folder = daemons.NETNS_FOLDER
    return sorted(path.name for path in folder.glob(f"{PREFIX}*")) if folder.exists() else []


def machine_connected() -> bool:
    """Tells whether the machine's end of the cable is there."""
    return succeeds("ip", "link", "show", MACHINE_INTERFACE)


def check_subnet_free() -> None:
    """Raises DevclusterError when the machine already uses the cluster's addresses."""
    ours = ipaddress.ip_network(SUBNET)
    for interface in json.loads(run("ip", "-json", "-4", "address")):
        for entry in interface["addr_info"]:
            taken = ipaddress.ip_interface(f"{entry['local']}/{entry['prefixlen']}").network
            if interface["ifname"] != MACHINE_INTERFACE and taken.overlaps(ours):
                raise DevclusterError(
                    f"interface {interface['ifname']} uses {taken}, which the cluster needs "
                    f"({SUBNET}): take that interface down first"
                )


def ensure_lan() -> None:
    """Makes the bridge and plugs the machine into it."""
    _ensure_namespace(LAN)
    if not succeeds("ip", "-n", LAN, "link", "show", BRIDGE):
        run("ip", "-n", LAN, "link", "add", BRIDGE, "type", "bridge")
    run("ip", "-n", LAN, "link", "set", BRIDGE, "up")
    if not (machine_connected() and succeeds("ip", "-n", LAN, "link", "show", "machine")):
        remove_machine_cable()
        run("ip", "link", "add", MACHINE_INTERFACE, "type", "veth",
            "peer", "name", "machine", "netns", LAN)  # fmt: skip
    run("ip", "-n", LAN, "link", "set", "machine", "master", BRIDGE, "up")
    address = f"{MACHINE_ADDRESS}/{_PREFIX_LENGTH}"
    run("ip", "address", "replace", address, "dev", MACHINE_INTERFACE)
    run("ip", "link", "set", MACHINE_INTERFACE, "up")


def ensure_host(host: Host) -> None:
    """Makes the host's namespace, its cable to the bridge, its address and its pod routes."""
    _ensure_namespace(host.netns)
    whole = succeeds("ip", "-n", host.netns, "link", "show", "eth0") and succeeds(
        "ip", "-n", LAN, "link", "show", host.name
    )
    if not whole:
        remove_host(host)
        _ensure_namespace(host.netns)
        run("ip", "link", "add", "eth0", "netns", host.netns, "type", "veth",
            "peer", "name", host.name, "netns", LAN)  # fmt: skip
    run("ip", "-n", LAN, "link", "set", host.name, "master", BRIDGE, "up")
    run("ip", "-n", host.netns, "-batch", "-", text=host_commands(host))


def host_commands(host: Host) -> str:
    """Renders the `ip -batch` commands that configure a host from inside its namespace."""
    lines = [
        "link set lo up",
        f"address replace {host.address}/{_PREFIX_LENGTH} dev eth0",
        "link set eth0 up",
    ]
    lines += [
        f"route replace {node.pod_range} via {node.address}"
        for node in ALL_NODE_HOSTS
        if node.name != host.name
    ]
    return "\n".join(lines) + "\n"


def connect(host: Host, connected: bool) -> None:
    """Plugs a host's cable in or out at the bridge."""
    run("ip", "-n", LAN, "link", "set", host.name, "up" if connected else "down")


def connected(host: Host) -> bool:
    """Tells whether a host's cable is there and plugged in."""
    if not succeeds("ip", "-n", LAN, "link", "show", host.name):
        return False
    return "UP" in json.loads(run("ip", "-n", LAN, "-json", "link", "show", host.name))[0]["flags"]


def remove_host(host: Host) -> None:
    """Removes a host's cable and namespace; its processes must be gone."""
    if succeeds("ip", "-n", LAN, "link", "show", host.name):
        run("ip", "-n", LAN, "link", "delete", host.name)
    if host.netns in namespaces():
        run("ip", "netns", "delete", host.netns)


def remove_machine_cable() -> None:
    """Removes the machine's cable from whichever end is left."""
    if machine_connected():
        run("ip", "link", "delete", MACHINE_INTERFACE)
    elif succeeds("ip", "-n", LAN, "link", "show", "machine"):
        run("ip", "-n", LAN, "link", "delete", "machine")


def remove_all() -> None:
    """Kills every process in the cluster's namespaces and removes cables, bridge, namespaces."""
    remove_machine_cable()
    for name in namespaces():
        daemons.kill_members(name)
        run("ip", "netns", "delete", name)


def _ensure_namespace(name: str) -> None:
    """A name can be left without its namespace: then it is only an empty file in the way."""
    if name in namespaces() and not succeeds("ip", "-n", name, "link"):
        (daemons.NETNS_FOLDER / name).unlink()
    if name not in namespaces():
        run("ip", "netns", "add", name)
