"""The cluster's certificate authority, made with openssl.

Real certificates, and not tokens or an open kubelet, because then every component is authorised as
it would be elsewhere: an operator whose role lacks a verb fails here too.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pretrain_devcluster.layout import (
    API_SERVICE_ADDRESS,
    CONTROL,
    DOMAIN,
    Layout,
    NodeHost,
)
from pretrain_devcluster.shell import run

_DAYS = "3650"


@dataclass(frozen=True)
class Identity:
    """The subject of a certificate.

    Attributes:
        file: base name of the certificate and key files.
        user: common name, which Kubernetes takes as the user.
        group: organisation, which Kubernetes takes as the group; may be empty.
        names: subject alternative names, as openssl writes them, for those that serve.
    """

    file: str
    user: str
    group: str = ""
    names: tuple[str, ...] = ()

    @property
    def subject(self) -> str:
        """The subject in openssl's slash notation."""
        return (f"/O={self.group}" if self.group else "") + f"/CN={self.user}"

    def certificate(self, layout: Layout) -> Path:
        """File of the certificate."""
        return layout.pki / f"{self.file}.crt"

    def key(self, layout: Layout) -> Path:
        """File of the private key."""
        return layout.pki / f"{self.file}.key"


AUTHORITY = Identity("ca", "pretrain-devcluster")
API_SERVER = Identity(
    "kube-apiserver",
    "kube-apiserver",
    names=(
        "DNS:kubernetes",
        "DNS:kubernetes.default",
        "DNS:kubernetes.default.svc",
        f"DNS:kubernetes.default.svc.{DOMAIN}",
        f"IP:{API_SERVICE_ADDRESS}",
        f"IP:{CONTROL.address}",
        "IP:127.0.0.1",
    ),
)
# The API server as a client of the kubelets, for logs and exec.
KUBELET_CLIENT = Identity("kubelet-client", "kube-apiserver-kubelet-client", "system:masters")
ADMIN = Identity("admin", "admin", "system:masters")
CONTROLLERS = Identity("kube-controller-manager", "system:kube-controller-manager")
SCHEDULER = Identity("kube-scheduler", "system:kube-scheduler")
PROXY = Identity("kube-proxy", "system:kube-proxy")
DNS = Identity("coredns", "system:coredns")
VOLUMES = Identity("local-provisioner", "system:local-provisioner")
_CLIENTS = (KUBELET_CLIENT, ADMIN, CONTROLLERS, SCHEDULER, PROXY, DNS, VOLUMES)


def kubelet(host: NodeHost) -> Identity:
    """The identity of a node, as client and as server."""
    return Identity(
        f"kubelet-{host.name}",
        f"system:node:{host.name}",
        "system:nodes",
        (f"DNS:{host.name}", f"IP:{host.address}"),
    )


def service_account_key(layout: Layout) -> Path:
    """The key that signs service account tokens."""
    return layout.pki / "service-accounts.key"


def ensure(layout: Layout, hosts: list[NodeHost]) -> None:
    """Makes the certificates that are missing; those that are there stay valid for ten years."""
    layout.pki.mkdir(parents=True, exist_ok=True, mode=0o700)
    if not AUTHORITY.certificate(layout).exists():
        _openssl(layout, AUTHORITY, "-addext", "keyUsage=critical,keyCertSign,cRLSign")
    if not service_account_key(layout).exists():
        run("openssl", "genrsa", "-out", service_account_key(layout), "2048")
    for identity in (API_SERVER, *_CLIENTS, *map(kubelet, hosts)):
        if not identity.certificate(layout).exists():
            _sign(layout, identity)


def _sign(layout: Layout, identity: Identity) -> None:
    extensions = ["basicConstraints=critical,CA:FALSE"]
    extensions.append("extendedKeyUsage=clientAuth" + (",serverAuth" if identity.names else ""))
    if identity.names:
        extensions.append("subjectAltName=" + ",".join(identity.names))
    options = [word for extension in extensions for word in ("-addext", extension)]
    authority = ["-CA", AUTHORITY.certificate(layout), "-CAkey", AUTHORITY.key(layout)]
    _openssl(layout, identity, *authority, *options)


def _openssl(layout: Layout, identity: Identity, *options: str | Path) -> None:
    run(
        "openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256",
        "-nodes", "-days", _DAYS, "-subj", identity.subject, *options,
        "-keyout", identity.key(layout), "-out", identity.certificate(layout),
    )  # fmt: skip
