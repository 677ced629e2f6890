"""The operator as it runs in a pod: a process of its own, behind a proxy of its own."""

import asyncio
import json
import os
import select
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from pretrain_devcluster.controlplane import free_port, kubeconfig

from .proxy import Proxy

PREFIX = "PRETRAIN_OPERATOR_"
STOP_SECONDS = 30.0
POLL_SECONDS = 0.05


class Process:
    """A process that need not be a child of this one."""

    def __init__(self, pid: int) -> None:
        self._descriptor: int | None = os.pidfd_open(pid)

    @property
    def running(self) -> bool:
        """Whether it has not ended yet."""
        if self._descriptor is not None and select.select([self._descriptor], [], [], 0)[0]:
            os.close(self._descriptor)
            self._descriptor = None
        return self._descriptor is not None

    def send(self, number: signal.Signals) -> None:
        """Send a signal, unless it has ended."""
        if self.running and self._descriptor is not None:
            signal.pidfd_send_signal(self._descriptor, number)

    def kill(self) -> None:
        """SIGKILL, and wait until it is dead."""
        self.send(signal.SIGKILL)
        if self._descriptor is not None:
            select.select([self._descriptor], [], [])


class ForkServer:
    """Starts operators, see forkserver.py; a context manager."""

    def __enter__(self) -> Self:
        program = Path(__file__).with_name("forkserver.py")
        self._process = subprocess.Popen(
            [sys.executable, program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.communicate()

    def start(self, environment: Mapping[str, str], log: Path) -> Process:
        """An operator with this environment, which writes to this log."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        order = {"environment": dict(environment), "log": str(log)}
        print(json.dumps(order), file=self._process.stdin, flush=True)
        return Process(int(self._process.stdout.readline()))


class Operator:
    """One operator behind a proxy; a process that ends is started again, as a kubelet does it."""

    def __init__(
        self, servers: ForkServer, proxy: Proxy, namespace: str, folder: Path, identity: str
    ) -> None:
        self.proxy = proxy
        self.starts = 0
        self.wanted = False
        self.log = folder / f"operator-{identity}.log"
        config = folder / f"kubeconfig-{identity}"
        config.write_text(kubeconfig(proxy.url, "unused"))
        self._servers = servers
        self._process: Process | None = None
        self._port, self._health_port = free_port(), free_port()
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(PREFIX)}
        self._environment = {
            **inherited,
            "KUBECONFIG": str(config),
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
            f"{PREFIX}NAMESPACES": namespace,
            f"{PREFIX}HEALTH_PORT": str(self._health_port),
            f"{PREFIX}LEASE_NAMESPACE": namespace,
            f"{PREFIX}LEASE_IDENTITY": identity,
            f"{PREFIX}METRICS_PORT": str(self._port),
        }

    @property
    def running(self) -> bool:
        """Whether there is a process."""
        return self._process is not None and self._process.running

    def start(self) -> None:
        """Start it, now and whenever it has ended, until it is stopped."""
        self.wanted = True
        self._start()

    def _start(self) -> None:
        self.starts += 1
        self._process = self._servers.start(self._environment, self.log)

    async def keep(self) -> None:
        """Start it again when it has ended, until cancelled."""
        while True:
            if self.wanted and not self.running:
                self._start()
            await asyncio.sleep(POLL_SECONDS)

    def kill(self) -> None:
        """SIGKILL: it has no time for anything, and nothing it has under way gets through.

        It is started again if it is still wanted.
        """
        assert self._process is not None
        self.proxy.new_life()
        self._process.kill()

    def freeze(self) -> None:
        """SIGSTOP."""
        assert self._process is not None
        self._process.send(signal.SIGSTOP)

    def thaw(self) -> None:
        """SIGCONT."""
        assert self._process is not None
        self._process.send(signal.SIGCONT)

    async def stop(self) -> None:
        """SIGTERM, and wait for the end."""
        assert self._process is not None
        self.wanted = False
        self._process.send(signal.SIGTERM)
        async with asyncio.timeout(STOP_SECONDS):
            while self.running:  # noqa: ASYNC110 - another process ends
                await asyncio.sleep(POLL_SECONDS)

    def end(self) -> None:
        """Leave nothing behind."""
        self.wanted = False
        if self.running:
            self.kill()

    async def rounds(self) -> int:
        """Rounds that this process has ended well; 0 while it starts."""
        text = await self._page(self._port, "metrics")
        for line in (text or "").splitlines():
            if line.startswith('pretrain_operator_reconciles_total{result="ok"}'):
                return int(float(line.split()[1]))
        return 0

    async def complaint(self) -> str | None:
        """What it says of its own health if that is bad; None if all is well, or nobody answers."""
        try:
            await self._page(self._health_port, "healthz")
        except urllib.error.HTTPError as error:
            return error.read().decode()
        return None

    async def ready(self) -> bool:
        """Whether it is ready, by its own word."""
        try:
            return await self._page(self._health_port, "readyz") is not None
        except urllib.error.HTTPError:
            return False

    async def _page(self, port: int, path: str) -> str | None:
        return await asyncio.to_thread(_read, f"http://127.0.0.1:{port}/{path}")


def _read(url: str) -> str | None:
    try:
        with urllib.request.urlopen(url, timeout=2) as page:
            return page.read().decode()
    except urllib.error.HTTPError:
        raise
    except OSError:
        return None
