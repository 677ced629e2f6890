"""A real Kubernetes cluster on one Linux machine, without a container engine.

    from pretrain_devcluster import Cluster

    cluster = Cluster.up()
    cluster.kubectl("get", "nodes")
    cluster.node("node2").kill()

Each module does one thing: `layout` knows names and addresses, `configs`, `addons` and `pki` what
programs are told, `network`, `cgroups`, `sysctls` and `daemons` change the machine, `control` and
`node` put these together, `images` builds, `cluster` is the whole, and `controlplane` is a part of
it for those who need no nodes. The package needs nothing but Python, Go and Debian, so that it can
run before anything of the project is installed.
"""

from pretrain_devcluster.cluster import Cluster
from pretrain_devcluster.node import Node
from pretrain_devcluster.shell import CommandError, DevclusterError

__all__ = ["Cluster", "CommandError", "DevclusterError", "Node"]
