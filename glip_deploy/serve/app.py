"""The application that a web server runs."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Mapping
from typing import TYPE_CHECKING

from glip_deploy import __version__

if TYPE_CHECKING:
    from fastapi import FastAPI

    from glip_deploy.serve.models import Model
    from glip_deploy.serve.settings import Settings
    from glip_deploy.serve.sources import SharedSource

__all__ = ["create_app"]


def create_app(settings: Settings, models: Mapping[str, Model], source: SharedSource | None = None) -> FastAPI:
    """Return the application: the HTTP service and the live page; it leaves the models open when it ends.

    Args:
        settings: of the server.
        models: by name; the first is the one that is asked where none is named.
        source: what the server itself shows on the page, already checked; closed when the application ends.

    Raises:
        MissingPackage: objects are to be followed, and the packages of the extra `track` are not installed.
        ImportError: the packages of the extra `serve` are not installed.
    """
    from fastapi_offline import FastAPIOffline

    from glip_deploy.serve.files import add_page
    from glip_deploy.serve.guard import Guard
    from glip_deploy.serve.http import Counted, add_problems, describe, service
    from glip_deploy.serve.live import Live
    from glip_deploy.serve.metrics import Metrics
    from glip_deploy.serve.models import Places

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        if source is not None:
            source.close()

    # Its /docs fetches nothing.
    app = FastAPIOffline(title="glip-serve", version=__version__, redoc_url=None, lifespan=lifespan)
    places = Places(settings.queue_size, models.values())
    metrics = Metrics(models, places)
    routes = service(settings, models, places, metrics)
    app.include_router(routes)
    add_page(app, Live(settings, models, source))
    describe(app, settings)
    add_problems(app)
    app.add_middleware(Guard, settings=settings)
    paths = frozenset(str(getattr(route, "path", "")) for route in routes.routes)
    app.add_middleware(Counted, metrics=metrics, paths=paths)  # the outermost: it counts what the guard refuses
    return app
