"""The files of the live page, with headers that let it load nothing from elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastapi import FastAPI

    from glip_deploy.serve.live import Live

__all__ = ["HEADERS", "add_page"]

_FOLDER = Path(__file__).with_name("page")
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
}
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; media-src 'self' blob:;"
        " connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Permissions-Policy": "camera=(self), microphone=(), geolocation=()",
    "Cache-Control": "no-cache",
}


def add_page(app: FastAPI, live: Live) -> None:
    """Add the page at `/`, its files beside it, and its websocket at `/v1/live`."""
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.routing import Route, WebSocketRoute

    files = {file.name: file.read_bytes() for file in sorted(_FOLDER.iterdir()) if file.suffix in _TYPES}

    async def page(request: Request) -> Response:
        name = request.url.path.rpartition("/")[2] or "index.html"
        return Response(files[name], media_type=_TYPES[Path(name).suffix], headers=HEADERS)

    for name in ("", *files):
        app.router.routes.append(Route(f"/{name}", page, include_in_schema=False))
    app.router.routes.append(WebSocketRoute("/v1/live", live.visit))
