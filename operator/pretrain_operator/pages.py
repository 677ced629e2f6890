"""What the operator answers over HTTP: /metrics, /healthz and /readyz.

Healthy is who makes rounds or could, and hears what happens; ready is who also knows the pods. A
standby is both. A process whose event loop is blocked answers nothing, which is the right answer.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from pretrain_operator.metrics import Metrics
from pretrain_operator.settings import Settings


@dataclass(frozen=True, slots=True)
class Pages:
    """The pages of one operator. ``troubles`` are asked for a sentence that says what is wrong."""

    metrics: Metrics
    ready: Callable[[], bool]
    troubles: Iterable[Callable[[], str | None]]

    async def show_metrics(self, _: web.Request) -> web.Response:
        """All metrics in Prometheus' text format."""
        text = generate_latest(self.metrics.registry)
        return web.Response(body=text, headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def show_health(self, _: web.Request) -> web.Response:
        """200, or 503 with what is wrong."""
        said = [sentence for trouble in self.troubles if (sentence := trouble())]
        return web.Response(text="\n".join(said or ["ok"]) + "\n", status=503 if said else 200)

    async def show_ready(self, request: web.Request) -> web.Response:
        """As :meth:`show_health`, once the watches have begun."""
        if not self.ready():
            return web.Response(text="the watches have not begun\n", status=503)
        return await self.show_health(request)


async def serve(settings: Settings, pages: Pages) -> list[web.AppRunner]:
    """Start to answer on the ports of ``settings``; the returned runners are to be cleaned up."""
    runners: list[web.AppRunner] = []
    sites = (
        (settings.metrics_port, {"/metrics": pages.show_metrics}),
        (settings.health_port, {"/healthz": pages.show_health, "/readyz": pages.show_ready}),
    )
    for port, routes in sites:
        if port:
            app = web.Application()
            app.add_routes([web.get(path, page) for path, page in routes.items()])
            runner = web.AppRunner(app, access_log=None)
            await runner.setup()
            await web.TCPSite(runner, port=port).start()
            runners.append(runner)
    return runners
