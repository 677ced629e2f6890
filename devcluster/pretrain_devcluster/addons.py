"""Objects that every fresh cluster gets: cluster DNS, the default StorageClass, their rights."""

from __future__ import annotations

from typing import Any

from pretrain_devcluster import pki
from pretrain_devcluster.layout import CONTROL, DNS_ADDRESS, PROVISIONER

_RBAC = "rbac.authorization.k8s.io"
_DNS_LABELS = {"kubernetes.io/service-name": "kube-dns"}
_DNS_PORTS = [{"name": protocol.lower(), "port": 53, "protocol": protocol}
              for protocol in ("UDP", "TCP")]  # fmt: skip


def manifests() -> dict[str, Any]:
    """Returns the objects as one List, fit for `kubectl apply`."""
    return {
        "apiVersion": "v1",
        "kind": "List",
        "items": [
            _dns_service(),
            _dns_endpoints(),
            _dns_role(),
            _binding("system:coredns", "system:coredns", pki.DNS.user),
            _binding(
                "system:local-provisioner",
                "system:persistent-volume-provisioner",
                pki.VOLUMES.user,
            ),
            _storage_class(),
        ],
    }


def _dns_service() -> dict[str, Any]:
    """No selector: the DNS server is a process of the control plane, not a pod."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "kube-dns", "namespace": "kube-system"},
        "spec": {"clusterIP": DNS_ADDRESS, "ports": _DNS_PORTS},
    }


def _dns_endpoints() -> dict[str, Any]:
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {"name": "kube-dns", "namespace": "kube-system", "labels": _DNS_LABELS},
        "addressType": "IPv4",
        "endpoints": [{"addresses": [CONTROL.address]}],
        "ports": _DNS_PORTS,
    }


def _dns_role() -> dict[str, Any]:
    watch = ["list", "watch"]
    core = {"apiGroups": [""], "resources": ["namespaces", "pods", "services"], "verbs": watch}
    slices = {
        "apiGroups": ["discovery.k8s.io"],
        "resources": ["endpointslices"],
        "verbs": watch,
    }
    return {
        "apiVersion": f"{_RBAC}/v1",
        "kind": "ClusterRole",
        "metadata": {"name": "system:coredns"},
        "rules": [core, slices],
    }


def _binding(name: str, role: str, user: str) -> dict[str, Any]:
    return {
        "apiVersion": f"{_RBAC}/v1",
        "kind": "ClusterRoleBinding",
        "metadata": {"name": name},
        "roleRef": {"apiGroup": _RBAC, "kind": "ClusterRole", "name": role},
        "subjects": [{"apiGroup": _RBAC, "kind": "User", "name": user}],
    }


def _storage_class() -> dict[str, Any]:
    return {
        "apiVersion": "storage.k8s.io/v1",
        "kind": "StorageClass",
        "metadata": {
            "name": "folders",
            "annotations": {"storageclass.kubernetes.io/is-default-class": "true"},
        },
        "provisioner": PROVISIONER,
        "reclaimPolicy": "Delete",
        "volumeBindingMode": "Immediate",
    }
