"""The control plane and the registry: processes of two network namespaces, no containers."""

from __future__ import annotations

import http.client
from pathlib import Path

from pretrain_devcluster import addons, configs, daemons, network, pki
from pretrain_devcluster.binaries import Binaries
from pretrain_devcluster.daemons import Daemon
from pretrain_devcluster.layout import (
    CONTROL,
    REGISTRY,
    REGISTRY_PORT,
    Layout,
)
from pretrain_devcluster.shell import DevclusterError, run, succeeds, wait_until

_USERS = (pki.ADMIN, pki.CONTROLLERS, pki.SCHEDULER, pki.PROXY, pki.DNS, pki.VOLUMES)


def kubeconfig_file(layout: Layout, identity: pki.Identity) -> Path:
    """File of a component's kubeconfig."""
    return layout.pki / f"{identity.file}.kubeconfig"


def write_kubeconfig(layout: Layout, identity: pki.Identity) -> None:
    """Renders a component's kubeconfig, private key included."""
    authority = pki.AUTHORITY.certificate(layout).read_bytes()
    certificate = identity.certificate(layout).read_bytes()
    text = configs.kubeconfig(authority, certificate, identity.key(layout).read_bytes())
    file = kubeconfig_file(layout, identity)
    file.touch(mode=0o600)
    file.write_text(text)


def write_configs(layout: Layout) -> None:
    """Renders the files that the control plane's programs read."""
    for identity in _USERS:
        write_kubeconfig(layout, identity)
    layout.kubeconfig.unlink(missing_ok=True)
    layout.kubeconfig.symlink_to(kubeconfig_file(layout, pki.ADMIN))
    for folder in (layout.config, layout.volumes, layout.registry):
        folder.mkdir(parents=True, exist_ok=True)
    (layout.config / "registry.yml").write_text(configs.registry(layout))
    corefile = configs.corefile(kubeconfig_file(layout, pki.DNS))
    (layout.config / "Corefile").write_text(corefile)


def storage_daemons(layout: Layout, binaries: Binaries) -> list[Daemon]:
    """The programs everything else waits for."""
    registry = ("docker-registry", "serve", str(layout.config / "registry.yml"))
    return [
        Daemon("etcd", CONTROL, (binaries.kube("etcd"), *configs.etcd_flags(layout))),
        Daemon(
            "kube-apiserver",
            CONTROL,
            (binaries.kube("kube-apiserver"), *configs.api_server_flags(layout)),
        ),
        Daemon("registry", REGISTRY, registry),
    ]


def client_daemons(layout: Layout, binaries: Binaries) -> list[Daemon]:
    """The programs that are clients of the API server."""
    commands = {
        "kube-controller-manager": (
            binaries.kube("kube-controller-manager"),
            *configs.controller_manager_flags(layout, kubeconfig_file(layout, pki.CONTROLLERS)),
        ),
        "kube-scheduler": (
            binaries.kube("kube-scheduler"),
            *configs.scheduler_flags(kubeconfig_file(layout, pki.SCHEDULER)),
        ),
        "local-provisioner": (
            binaries.kube("local-provisioner"),
            *configs.provisioner_flags(layout, kubeconfig_file(layout, pki.VOLUMES)),
        ),
        "coredns": (str(binaries.tools / "coredns"), "-conf", str(layout.config / "Corefile")),
    }
    return [Daemon(name, CONTROL, argv) for name, argv in commands.items()]


def daemon_names(layout: Layout, binaries: Binaries) -> list[str]:
    """Names of all programs of the control plane and the registry."""
    every = storage_daemons(layout, binaries) + client_daemons(layout, binaries)
    return [daemon.name for daemon in every]


def start_storage(layout: Layout, binaries: Binaries) -> None:
    """Starts database, API server and registry, and returns when all of them answer."""
    ours = {daemons.running(layout, name) for name in daemons.recorded(layout)}
    for host in (CONTROL, REGISTRY):
        # Their records may have been deleted together with the cache: they would hold our ports.
        daemons.kill_members(host.netns, spared=ours)
        network.ensure_host(host)
    for daemon in storage_daemons(layout, binaries):
        daemons.ensure(layout, daemon)
    wait_until(lambda: _registry_answers(layout), "the registry answers", 20)
    wait_until(lambda: api_ready(layout, binaries), "the API server is ready", 60)


def start_clients(layout: Layout, binaries: Binaries) -> None:
    """Starts the controllers and applies the objects that every cluster has."""
    for daemon in client_daemons(layout, binaries):
        daemons.ensure(layout, daemon)
    kubectl(layout, binaries, "apply", "-f", "-", text=configs.as_json(addons.manifests()))


def kubectl(layout: Layout, binaries: Binaries, *words: str, text: str | None = None) -> str:
    """Runs kubectl as the administrator of this cluster and returns its stdout."""
    return run(binaries.kube("kubectl"), "--kubeconfig", layout.kubeconfig, *words, text=text)


def api_ready(layout: Layout, binaries: Binaries) -> bool:
    """Asks the API server whether it is ready.

    Raises:
        DevclusterError: it, or the database, has died: waiting on is useless.
    """
    for name in ("etcd", "kube-apiserver"):
        daemons.require_alive(layout, name)
    return succeeds(
        binaries.kube("kubectl"), "--kubeconfig", layout.kubeconfig, "get", "--raw", "/readyz"
    )


def _registry_answers(layout: Layout) -> bool:
    daemons.require_alive(layout, "registry")
    return registry_has("", "")


def registry_has(repository: str, tag: str) -> bool:
    """Tells whether the registry holds an image; with empty names, whether it answers at all."""
    path = f"/v2/{repository}/manifests/{tag}" if repository else "/v2/"
    connection = http.client.HTTPConnection(REGISTRY.address, REGISTRY_PORT, timeout=2)
    accepted = ", ".join(
        f"application/vnd.{kind}+json"
        for kind in ("oci.image.manifest.v1", "docker.distribution.manifest.v2")
    )
    try:
        connection.request("HEAD", path, headers={"Accept": accepted})
        return connection.getresponse().status == http.client.OK
    except OSError:
        return False
    finally:
        connection.close()


def stop(layout: Layout) -> None:
    """Ends every recorded process, clients before those they are clients of."""
    last = ("kube-apiserver", "etcd")
    first = [name for name in daemons.recorded(layout) if name not in last]
    for name in (*first, *last):
        daemons.stop(layout, name, sharply=True)


def collect_garbage(layout: Layout) -> None:
    """Removes images without a tag from the registry, which must be stopped: builds leave one each.

    The tag moves on with every build, and nothing else refers to an image once the cluster is down.
    """
    config = layout.config / "registry.yml"
    if config.exists() and (layout.registry / "docker").exists():
        run("docker-registry", "garbage-collect", "--delete-untagged", config)


def require_running(layout: Layout) -> None:
    """Raises DevclusterError when there is no cluster to talk to."""
    if daemons.running(layout, "kube-apiserver") is None:
        raise DevclusterError("the cluster is not running: bring it up with `up`")
