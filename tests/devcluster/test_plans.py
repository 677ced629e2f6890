"""What the cluster decides without touching the machine: names, addresses, configuration files."""

from __future__ import annotations

import hashlib
import ipaddress
import json
import re
from pathlib import Path
from typing import Any

import pytest

from pretrain_devcluster import (
    addons,
    cgroups,
    configs,
    layout,
    network,
    node,
    pki,
    preflight,
    seeding,
)
from pretrain_devcluster.binaries import (
    HYPERKUBE_PROGRAMS,
    SOURCES,
    Binaries,
    kubernetes_version,
    module_version,
    source_key,
)
from pretrain_devcluster.layout import ALL_NODE_HOSTS, Layout, node_host
from pretrain_devcluster.shell import DevclusterError

GIB = 2**30


@pytest.fixture
def folders(tmp_path: Path) -> Layout:
    return Layout(tmp_path)


# Addresses


def test_no_two_hosts_share_an_address_or_a_pod_range() -> None:
    hosts = (layout.CONTROL, layout.REGISTRY, *ALL_NODE_HOSTS)
    addresses = {host.address for host in hosts} | {layout.MACHINE_ADDRESS}
    assert len(addresses) == len(hosts) + 1
    ranges = [ipaddress.IPv4Network(host.pod_range) for host in ALL_NODE_HOSTS]
    assert len(set(ranges)) == len(ranges)
    assert all(each.subnet_of(ipaddress.IPv4Network(layout.POD_RANGE)) for each in ranges)
    subnet = ipaddress.ip_network(layout.SUBNET)
    assert all(ipaddress.ip_address(address) in subnet for address in addresses)


def test_interface_names_fit_the_kernel() -> None:
    names = [layout.MACHINE_INTERFACE, layout.BRIDGE, "machine"]
    names += [host.name for host in (layout.CONTROL, layout.REGISTRY, *ALL_NODE_HOSTS)]
    assert max(map(len, names)) <= 15


@pytest.mark.parametrize("index", [0, layout.MAX_NODES + 1, -1])
def test_node_numbers_out_of_range_are_refused(index: int) -> None:
    with pytest.raises(ValueError, match=str(index)):
        node_host(index)


def test_a_node_routes_to_all_others_but_not_to_itself() -> None:
    commands = network.host_commands(node_host(2))
    routed = re.findall(r"route replace (\S+) via", commands)
    assert routed == [host.pod_range for host in ALL_NODE_HOSTS if host.index != 2]


def test_the_control_plane_routes_to_every_node() -> None:
    assert network.host_commands(layout.CONTROL).count("route replace") == layout.MAX_NODES


# Folders


def test_the_cache_folder_follows_the_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert Layout.default().root == tmp_path / "pretrain-operator"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert Layout.default().root == Path.home() / ".cache" / "pretrain-operator"


# Binaries


def test_the_pinned_kubernetes_accepts_cgroup_v1() -> None:
    """From 1.35 on the kubelet wants `failCgroupV1: false`, which configs.kubelet does not say."""
    assert kubernetes_version().startswith("v1.34.")


def test_staging_modules_are_pinned_to_the_same_release() -> None:
    text = (SOURCES / "hyperkube" / "go.mod").read_text()
    staging = kubernetes_version().replace("v1.", "v0.")
    versions = re.findall(r"^\tk8s\.io/\S+ => k8s\.io/\S+ (\S+)$", text, re.MULTILINE)
    assert len(versions) > 20
    assert set(versions) == {staging}


def test_every_linked_program_is_one_that_the_binary_knows() -> None:
    known = re.findall(r'^\t"([a-z-]+)":', (SOURCES / "hyperkube" / "main.go").read_text(), re.M)
    assert sorted(HYPERKUBE_PROGRAMS) == sorted(known)


@pytest.mark.parametrize(
    "go_mod", ["require example.org/x v1.2.3\n", "require (\n\texample.org/x v1.2.3\n)\n"]
)
def test_module_versions_are_found_in_both_spellings(go_mod: str) -> None:
    assert module_version(go_mod, "example.org/x") == "v1.2.3"


def test_a_module_that_is_not_required_is_named() -> None:
    with pytest.raises(DevclusterError, match=r"example\.org/y"):
        module_version("require example.org/xy v1.0.0", "example.org/y")


def test_the_build_key_follows_sources_and_compiler(tmp_path: Path) -> None:
    for name in ("go.mod", "go.sum", "main.go"):
        (tmp_path / name).write_text(name)
    first = source_key(tmp_path, "go1.26.0")
    assert first == source_key(tmp_path, "go1.26.0")
    assert first != source_key(tmp_path, "go1.26.1")
    (tmp_path / "README.md").write_text("says nothing about the build")
    assert first == source_key(tmp_path, "go1.26.0")
    (tmp_path / "go.sum").write_text("changed")
    assert first != source_key(tmp_path, "go1.26.0")


# Configuration files


def test_a_kubeconfig_needs_no_other_file() -> None:
    document = json.loads(configs.kubeconfig(b"authority", b"certificate", b"key"))
    assert document["clusters"][0]["cluster"]["server"] == "https://172.30.0.2:6443"
    assert set(document["users"][0]["user"]) == {"client-certificate-data", "client-key-data"}
    assert document["current-context"] == document["contexts"][0]["name"]


def test_nodes_divide_the_memory_but_not_the_processors(folders: Layout) -> None:
    document = json.loads(configs.kubelet(folders, node_host(1), 24 * GIB, nodes=2))
    reserved = document["systemReserved"]
    assert set(reserved) == {"memory"}
    assert 24 * GIB - int(reserved["memory"]) == 11 * GIB


def test_a_machine_smaller_than_the_control_plane_offers_no_memory(folders: Layout) -> None:
    document = json.loads(configs.kubelet(folders, node_host(1), GIB, nodes=2))
    assert int(document["systemReserved"]["memory"]) == GIB


def test_the_kubelet_lets_nobody_in_without_a_certificate(folders: Layout) -> None:
    document = json.loads(configs.kubelet(folders, node_host(1), 24 * GIB, nodes=2))
    assert document["authentication"]["anonymous"] == {"enabled": False}
    assert document["authorization"] == {"mode": "Webhook"}


def test_flags_are_spelled_as_go_reads_them(folders: Layout) -> None:
    flags = configs.scheduler_flags(folders.pki / "x")
    assert "--leader-elect=false" in flags
    assert f"--kubeconfig={folders.pki}/x" in flags


def test_pods_are_routed_and_not_bridged() -> None:
    document = json.loads(configs.cni(node_host(3)))
    first = document["plugins"][0]
    assert first["type"] == "ptp"
    assert first["ipam"]["ranges"] == [[{"subnet": "10.88.3.0/24"}]]


def test_containerd_reads_its_configuration() -> None:
    tomllib = pytest.importorskip("tomllib")
    text = configs.containerd("registry/pause:1", Path("/certs"), Path("/cni"))
    cri = tomllib.loads(text)["plugins"]["io.containerd.grpc.v1.cri"]
    assert cri["sandbox_image"] == "registry/pause:1"
    assert cri["restrict_oom_score_adj"] is True
    assert cri["registry"]["config_path"] == "/certs"
    assert tomllib.loads(configs.registry_mirror())["host"]["http://172.30.0.3:5000"]


def test_unknown_names_are_answered_at_once(folders: Layout) -> None:
    text = configs.corefile(folders.pki / "x")
    assert text.count("{") == text.count("}")
    assert "rcode NXDOMAIN" in text
    assert "forward" not in text


def test_every_plugin_of_the_corefile_is_linked(folders: Layout) -> None:
    linked = re.findall(r"plugin/(\w+)", (SOURCES / "tools" / "coredns" / "main.go").read_text())
    used = re.findall(r"^    (\w+)", configs.corefile(folders.pki / "x"), re.MULTILINE)
    assert set(used) == set(linked)


def test_dns_answers_where_pods_ask() -> None:
    items = {item["kind"]: item for item in addons.manifests()["items"]}
    assert items["Service"]["spec"]["clusterIP"] == layout.DNS_ADDRESS
    assert items["EndpointSlice"]["endpoints"] == [{"addresses": [layout.CONTROL.address]}]
    assert items["EndpointSlice"]["ports"] == items["Service"]["spec"]["ports"]
    assert items["StorageClass"]["provisioner"] == layout.PROVISIONER


# Certificates


def test_a_node_is_who_the_node_authorizer_expects() -> None:
    identity = pki.kubelet(node_host(1))
    assert identity.subject == "/O=system:nodes/CN=system:node:node1"
    assert "IP:172.30.0.11" in identity.names


def test_only_components_that_serve_have_names() -> None:
    assert pki.ADMIN.names == ()
    assert f"IP:{layout.CONTROL.address}" in pki.API_SERVER.names


# The machine


@pytest.mark.parametrize(
    ("mounts", "roots"),
    [
        pytest.param("cgroup2 /sys/fs/cgroup cgroup2 rw 0 0\n", ["/sys/fs/cgroup"], id="v2"),
        pytest.param(
            "tmpfs /sys/fs/cgroup tmpfs rw 0 0\n"
            "cgroup /sys/fs/cgroup/cpu cgroup rw,cpu 0 0\n"
            "cgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\n",
            ["/sys/fs/cgroup/cpu", "/sys/fs/cgroup/unified"],
            id="hybrid",
        ),
    ],
)
def test_all_control_group_hierarchies_are_found(mounts: str, roots: list[str]) -> None:
    assert cgroups.hierarchies(mounts) == [Path(root) for root in roots]


def test_a_new_cpuset_gets_the_processors_of_its_parent(tmp_path: Path) -> None:
    cpuset, memory = tmp_path / "cpuset", tmp_path / "memory"
    for root in (cpuset, memory):
        root.mkdir()
    (cpuset / "cpuset.cpus").write_text("0-1\n")
    group = cpuset / "pretrain" / "node1"
    group.mkdir(parents=True)
    for folder in (group.parent, group):  # the kernel makes these files, empty
        (folder / "cpuset.cpus").touch()
    cgroups.ensure("/pretrain/node1", [cpuset, memory])
    assert (group / "cpuset.cpus").read_text() == "0-1\n"
    assert (memory / "pretrain" / "node1").is_dir()


def test_on_v2_every_group_hands_its_controllers_down(tmp_path: Path) -> None:
    groups = [tmp_path, tmp_path / "pretrain", tmp_path / "pretrain" / "node1"]
    groups[-1].mkdir(parents=True)
    for folder in groups:
        (folder / "cgroup.controllers").write_text("cpu memory\n")
    cgroups.ensure("/pretrain/node1", [tmp_path])
    handed = {(folder / "cgroup.subtree_control").read_text() for folder in groups}
    assert handed == {"+cpu +memory"}


def test_too_little_disk_is_one_sentence_with_numbers_and_a_remedy(folders: Layout) -> None:
    with pytest.raises(DevclusterError, match=r"the image needs \d+ GiB .* XDG_CACHE_HOME"):
        preflight.require_disk(folders, 2**60, "the image")


def test_changes_name_everything_that_is_made(folders: Layout) -> None:
    text = "\n".join(preflight.changes(folders, ["node1", "node2"]))
    for made in ("pretrain0", "pretrain-lan", "pretrain-node2", "/pretrain/", str(folders.root)):
        assert made in text


# Nodes


def test_ready_nodes_are_those_whose_condition_is_true() -> None:
    def item(name: str, status: str) -> dict[str, object]:
        conditions = [
            {"type": "MemoryPressure", "status": "True"},
            {"type": "Ready", "status": status},
        ]
        return {"metadata": {"name": name}, "status": {"conditions": conditions}}

    fresh = {"metadata": {"name": "fresh"}, "status": {}}
    items = [item("good", "True"), item("lost", "Unknown"), item("bad", "False"), fresh]
    assert node.ready_nodes(json.dumps({"items": items})) == {"good"}


def test_a_new_build_brings_a_new_pause_image() -> None:
    first = Binaries(Path("/bin/hyperkube-aaa"), Path("/bin/tools-bbb"))
    assert node.pause_image(first) == "172.30.0.3:5000/pause:aaa"


# Seeding


def test_layers_are_named_by_all_that_is_below_them() -> None:
    """Chain ids are defined by the OCI image specification; the digest here is worked by hand."""
    images = [{"names": ["other"], "layer": "c"}, {"names": ["mine", "alias"], "layer": "b"}]
    layers = [
        {"id": "c", "parent": "b", "diff-digest": "sha256:3"},
        {"id": "b", "parent": "a", "diff-digest": "sha256:2"},
        {"id": "a", "diff-digest": "sha256:1"},
    ]
    lower, upper = seeding.chained(images, layers, "mine", Path("/storage"))
    assert lower == seeding.Layer("sha256:1", "", Path("/storage/a/diff"))
    assert upper.parent == "sha256:1"
    assert upper.folder == Path("/storage/b/diff")
    assert upper.chain == "sha256:" + hashlib.sha256(b"sha256:1 sha256:2").hexdigest()


def test_an_image_that_was_not_built_is_named() -> None:
    with pytest.raises(DevclusterError, match="nowhere:dev was not built here"):
        seeding.chained([{"layer": "a"}], [], "nowhere:dev", Path("/storage"))


@pytest.mark.parametrize(
    ("mount", "folder"),
    [
        ({"Type": "bind", "Source": "/s/1/fs", "Options": ["rw", "rbind"]}, "/s/1/fs"),
        (
            {"Type": "overlay", "Source": "overlay", "Options": ["workdir=/w", "upperdir=/s/2/fs"]},
            "/s/2/fs",
        ),
    ],
)
def test_a_snapshot_is_filled_where_it_is_written_to(mount: dict[str, Any], folder: str) -> None:
    assert seeding.writable_folder(mount) == folder
