"""A Kubernetes control plane of this test session's own: database, API server, two controllers.

The same programs as the devcluster's, but without nodes, and apart from it: an operator installed
there watches all namespaces and would take part in what is tested here. Garbage collection and the
end of namespaces are the only controllers, so that nothing else has an opinion about pods.
"""

import json
import shutil
import signal
import socket
import ssl
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pretrain_devcluster import binaries, preflight
from pretrain_devcluster.cluster import locked
from pretrain_devcluster.layout import Layout
from pretrain_devcluster.shell import Progress

ADMIN_TOKEN = "admin-of-this-test-session"
START_SECONDS = 120  # on two cores that others use as well
STOP_SECONDS = 20


@dataclass(frozen=True)
class ControlPlane:
    """Where the API server is, and how to be let in as administrator."""

    url: str
    authority: Path
    token: str = ADMIN_TOKEN

    def tls(self) -> ssl.SSLContext:
        """Trusts this API server alone."""
        return ssl.create_default_context(cafile=str(self.authority))


@contextmanager
def control_plane() -> Iterator[ControlPlane]:
    """A control plane for as long as the context lasts. Builds its programs if there are none."""
    layout, progress = Layout.default(), Progress()
    with locked(layout, progress):
        preflight.install_packages(progress)
        programs = binaries.ensure(layout, progress)
    folder = Path(tempfile.mkdtemp(prefix="pretrain-apiserver-"))
    started: list[subprocess.Popen[bytes]] = []
    try:
        yield _start(programs, folder, started)
    finally:
        for process in reversed(started):  # the database last
            process.send_signal(signal.SIGKILL if process is started[0] else signal.SIGTERM)
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        shutil.rmtree(folder)


def _start(
    programs: binaries.Binaries, folder: Path, started: list[subprocess.Popen[bytes]]
) -> ControlPlane:
    database, peers, port = free_port(), free_port(), free_port()
    plane = ControlPlane(f"https://127.0.0.1:{port}", folder / "certificates" / "apiserver.crt")
    key, tokens, config = folder / "sa.key", folder / "tokens.csv", folder / "kubeconfig"
    subprocess.run(
        ["openssl", "genrsa", "-out", key, "2048"], check=True, stderr=subprocess.DEVNULL
    )
    tokens.write_text(f"{ADMIN_TOKEN},admin,admin,system:masters\n")

    def start(program: str, *flags: str) -> None:
        with (folder / f"{program}.log").open("wb") as log:
            # The kernel ends them with the test session, however that ends.
            argv = ["setpriv", "--pdeathsig", "KILL", programs.kube(program), *flags]
            started.append(subprocess.Popen(argv, stdout=log, stderr=log, cwd=folder))

    start(
        "etcd", f"--data-dir={folder}/etcd", "--unsafe-no-fsync", "--log-level=warn",
        f"--listen-client-urls=http://127.0.0.1:{database}",
        f"--advertise-client-urls=http://127.0.0.1:{database}",
        f"--listen-peer-urls=http://127.0.0.1:{peers}",
    )  # fmt: skip
    start(
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
    config.write_text(kubeconfig(plane.url, ADMIN_TOKEN, plane.authority))
    start(
        "kube-controller-manager", f"--kubeconfig={config}", "--leader-elect=false",
        "--controllers=garbage-collector-controller,namespace-controller", "--secure-port=0",
    )  # fmt: skip
    return plane


def _wait_ready(plane: ControlPlane, started: list[subprocess.Popen[bytes]], folder: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    request = f"{plane.url}/readyz"
    while time.monotonic() < deadline:
        if any(process.poll() is not None for process in started):
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
    raise AssertionError("the control plane did not start:\n" + "\n---\n".join(tails))


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


def free_port() -> int:
    """A port of the loopback that nobody uses now."""
    with socket.create_server(("127.0.0.1", 0)) as found:
        return found.getsockname()[1]
