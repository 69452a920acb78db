"""The application that a web server runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from glip_deploy import __version__

if TYPE_CHECKING:
    from fastapi import FastAPI

    from glip_deploy.serve.models import Model
    from glip_deploy.serve.settings import Settings

__all__ = ["create_app"]


def create_app(settings: Settings, models: Mapping[str, Model]) -> FastAPI:
    """Return the application; it leaves the models open when it ends.

    Args:
        settings: of the server.
        models: by name; the first is the one that is asked where none is named.

    Raises:
        ImportError: the packages of the extra `serve` are not installed.
    """
    from fastapi_offline import FastAPIOffline

    from glip_deploy.serve.guard import Guard
    from glip_deploy.serve.http import Counted, add_problems, describe, service
    from glip_deploy.serve.metrics import Metrics
    from glip_deploy.serve.models import Places

    app = FastAPIOffline(title="glip-serve", version=__version__, redoc_url=None)  # its /docs fetches nothing
    places = Places(settings.queue_size, models.values())
    metrics = Metrics(models, places)
    routes = service(settings, models, places, metrics)
    app.include_router(routes)
    describe(app, settings)
    add_problems(app)
    app.add_middleware(Guard, settings=settings)
    paths = frozenset(str(getattr(route, "path", "")) for route in routes.routes)
    app.add_middleware(Counted, metrics=metrics, paths=paths)  # the outermost: it counts what the guard refuses
    return app
