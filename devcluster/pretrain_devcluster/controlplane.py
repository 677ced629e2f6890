"""A Kubernetes control plane alone: database, API server, and the controllers that are asked for.

The same programs as the cluster's, but without nodes, on the loopback, and apart from it: an
operator installed there watches all namespaces and would take part in what is tried here. By
default garbage collection and the end of namespaces are the only controllers, so that nothing else
has an opinion about pods.
"""

import contextlib
import json
import random
import shutil
import signal
import socket
import ssl
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from pretrain_devcluster import binaries, preflight
from pretrain_devcluster.cluster import locked
from pretrain_devcluster.layout import Layout
from pretrain_devcluster.shell import DevclusterError, Progress

ADMIN_TOKEN = "admin-of-this-session"
CONTROLLERS = ("garbage-collector-controller", "namespace-controller")
CLIENTS = ("kube-controller-manager", "kube-scheduler")  # programs, and the names of their users
GROUP = "administrators"  # of the users; nothing that is said of system:masters holds for them
START_SECONDS = 120  # on two cores that others use as well
STOP_SECONDS = 20

Started = dict[str, subprocess.Popen[bytes]]  # processes by program


@dataclass(frozen=True)
class ControlPlane:
    """Where the API server is, and how to be let in as administrator."""

    url: str
    authority: Path
    token: str = ADMIN_TOKEN
    pids: dict[str, int] = field(default_factory=dict)  # process ids by program

    def tls(self) -> ssl.SSLContext:
        """Trusts this API server alone."""
        return ssl.create_default_context(cafile=str(self.authority))


@contextmanager
def control_plane(
    controllers: Sequence[str] = CONTROLLERS,
    *,
    users: Sequence[str] = (),
    requests_per_second: int = 20,
    scheduler: bool = False,
) -> Iterator[ControlPlane]:
    """A control plane for as long as the context lasts. Builds its programs if there are none.

    Args:
        controllers: those of the controller manager that run.
        users: names of more administrators; each one's token is its name.
        requests_per_second: what controllers and scheduler may ask of the API server.
        scheduler: whether one runs.

    Raises:
        DevclusterError: it does not start, or can't be built.
    """
    layout, progress = Layout.default(), Progress()
    with locked(layout, progress):
        preflight.install_packages(progress)
        programs = binaries.ensure(layout, progress)
    folder = Path(tempfile.mkdtemp(prefix="pretrain-apiserver-"))
    started: Started = {}
    try:
        plane = _start(programs, folder, [*users, *CLIENTS], started)
        for user in CLIENTS:
            (folder / user).write_text(kubeconfig(plane.url, user, plane.authority))
        manager = (f"--controllers={','.join(controllers)}",)
        for program, flags in {"kube-controller-manager": manager, "kube-scheduler": ()}.items():
            if scheduler or program != "kube-scheduler":
                asking = _client_flags(folder / program, requests_per_second)
                _spawn(programs, folder, started, program, *asking, *flags)
        plane.pids.update((program, process.pid) for program, process in started.items())
        yield plane
    finally:
        for program, process in reversed(started.items()):  # the database last
            process.send_signal(signal.SIGKILL if program == "etcd" else signal.SIGTERM)
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        shutil.rmtree(folder)


def _spawn(
    programs: binaries.Binaries,
    folder: Path,
    started: Started,
    program: str,
    *flags: str,
) -> None:
    with (folder / f"{program}.log").open("wb") as log:
        # The kernel ends them with this process, however that ends.
        argv = ["setpriv", "--pdeathsig", "KILL", programs.kube(program), *flags]
        started[program] = subprocess.Popen(argv, stdout=log, stderr=log, cwd=folder)


def _start(
    programs: binaries.Binaries,
    folder: Path,
    users: Sequence[str],
    started: Started,
) -> ControlPlane:
    database, peers, port = free_port(), free_port(), free_port()
    plane = ControlPlane(f"https://127.0.0.1:{port}", folder / "certificates" / "apiserver.crt")
    key, tokens = folder / "sa.key", folder / "tokens.csv"
    subprocess.run(
        ["openssl", "genrsa", "-out", key, "2048"], check=True, stderr=subprocess.DEVNULL
    )
    tokens.write_text(f"{ADMIN_TOKEN},admin,admin,system:masters\n")
    with tokens.open("a") as file:
        file.writelines(f"{user},{user},{user},{GROUP}\n" for user in users)
    _spawn(
        programs, folder, started,
        "etcd", f"--data-dir={folder}/etcd", "--unsafe-no-fsync", "--log-level=warn",
        f"--listen-client-urls=http://127.0.0.1:{database}",
        f"--advertise-client-urls=http://127.0.0.1:{database}",
        f"--listen-peer-urls=http://127.0.0.1:{peers}",
    )  # fmt: skip
    _spawn(
        programs, folder, started,
        "kube-apiserver", f"--etcd-servers=http://127.0.0.1:{database}",
        "--bind-address=127.0.0.1", "--advertise-address=127.0.0.1", f"--secure-port={port}",
        f"--cert-dir={plane.authority.parent}", "--service-cluster-ip-range=10.250.0.0/24",
        f"--token-auth-file={tokens}", "--authorization-mode=RBAC",
        # Nobody here makes default service accounts or lets go of protected claims.
        "--disable-admission-plugins=ServiceAccount,StorageObjectInUseProtection",
        "--service-account-issuer=https://kubernetes.default.svc",
        f"--service-account-key-file={key}", f"--service-account-signing-key-file={key}",
    )  # fmt: skip
    _wait_ready(plane, started, folder)
    _let_in(plane)
    return plane


def _let_in(plane: ControlPlane) -> None:
    """Make administrators of the users' group."""
    rules = "rbac.authorization.k8s.io"
    binding = {
        "metadata": {"name": GROUP},
        "roleRef": {"apiGroup": rules, "kind": "ClusterRole", "name": "cluster-admin"},
        "subjects": [{"apiGroup": rules, "kind": "Group", "name": GROUP}],
    }
    asked = urllib.request.Request(
        f"{plane.url}/apis/{rules}/v1/clusterrolebindings",
        json.dumps(binding).encode(),
        {"Authorization": f"Bearer {plane.token}", "Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(asked, timeout=20, context=plane.tls()):
            return
    except OSError as error:
        raise DevclusterError(f"the users get no rights: {error}") from error


def _client_flags(config: Path, requests_per_second: int) -> list[str]:
    return [
        f"--kubeconfig={config}",
        "--leader-elect=false",
        "--secure-port=0",
        f"--kube-api-qps={requests_per_second}",
        f"--kube-api-burst={2 * requests_per_second}",
    ]


def _wait_ready(plane: ControlPlane, started: Started, folder: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    request = f"{plane.url}/readyz"
    while time.monotonic() < deadline:
        if any(process.poll() is not None for process in started.values()):
            break
        try:
            token = {"Authorization": f"Bearer {plane.token}"}
            asked = urllib.request.Request(request, headers=token)
            # The certificate is made by the server as it starts.
            with urllib.request.urlopen(asked, timeout=2, context=plane.tls()):
                return
        except (OSError, urllib.error.URLError):
            time.sleep(0.1)
    tails = [log.read_text(errors="replace")[-1500:] for log in sorted(folder.glob("*.log"))]
    raise DevclusterError("the control plane did not start:\n" + "\n---\n".join(tails))


def kubeconfig(url: str, token: str, authority: Path | None = None) -> str:
    """A kubeconfig; JSON is YAML."""
    cluster = {"server": url} | ({"certificate-authority": str(authority)} if authority else {})
    body = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "test",
        "clusters": [{"name": "test", "cluster": cluster}],
        "users": [{"name": "test", "user": {"token": token}}],
        "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
    }
    return json.dumps(body)


_given: set[int] = set()


def free_port() -> int:
    """A port that nobody uses now, and that this process gives out only once.

    It is below those that the kernel gives to connections, so that none takes it before it is used.
    """
    lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    while True:
        port = random.randrange(10_000, min(lowest, 32_768))
        if port in _given:
            continue
        with contextlib.suppress(OSError), socket.create_server(("", port)):
            _given.add(port)
            return port
