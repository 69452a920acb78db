"""What every request passes before anything looks at it: whose it is, and how large it may grow."""

from __future__ import annotations

import asyncio
import hmac
import logging
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from glip_deploy.serve.bodies import dumped
from glip_deploy.serve.errors import PROBLEM_TYPE, RequestError, problem
from glip_deploy.serve.settings import Settings, is_local

if TYPE_CHECKING:
    from collections.abc import Mapping

    from starlette.datastructures import Headers

__all__ = ["PROTECTED", "Guard", "answer_problem"]

log = logging.getLogger(__name__)
PROTECTED = ("/v1", "/metrics")
"""Paths that want the token, where the server has one."""
_SELF_PROTECTED = "/v1/live"
"""Browsers send no header of ours with a websocket: the live page says its token in its first message."""
_PATIENCE_S = 5.0
"""How long the rest of a refused body is read and forgotten: its sender may not read the answer before all is sent."""


class Guard:
    """Middleware that refuses requests of others: by name, by origin, by token and by size.

    Args:
        app: what comes after it.
        settings: of the server.
    """

    def __init__(self, app: Any, settings: Settings) -> None:
        self._app, self._settings = app, settings

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Serve a request, a websocket or the application's life, as ASGI calls it."""
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        from starlette.datastructures import Headers

        headers = Headers(scope=scope)
        try:
            self._check(scope, headers)
        except RequestError as error:
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008})
            else:
                await self._limited(_refused(error), scope, headers, receive, send)
            return
        if scope["type"] == "websocket":
            await self._app(scope, receive, send)
            return
        await self._limited(self._app, scope, headers, receive, send)

    def _check(self, scope: Any, headers: Headers) -> None:
        host = headers.get("host", "")
        if self._settings.local_only and not is_local(_name(host)):
            # With a name of its own that leads here, any web page could ask this server.
            raise RequestError(
                421, "this server answers on this machine alone; ask it as 127.0.0.1, or start it with --token"
            )
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc.lower() != host.lower():
            raise RequestError(403, "the request comes from a page of another server, which may not ask this one")
        path: str = scope["path"]
        if self._settings.token is not None and path != _SELF_PROTECTED and path.startswith(PROTECTED):
            kind, _, token = headers.get("authorization", "").partition(" ")
            right = hmac.compare_digest(token.strip().encode(), self._settings.token.encode())
            if kind.lower() != "bearer" or not right:
                what = "the token is wrong" if token else "this server wants a token"
                raise RequestError(
                    401,
                    f"{what}; send Authorization: Bearer TOKEN, with the one that glip-serve was started with",
                    {"WWW-Authenticate": "Bearer"},
                )

    async def _limited(self, app: Any, scope: Any, headers: Headers, receive: Any, send: Any) -> None:
        limit = self._settings.max_body
        size, whole, begun = 0, False, False

        async def counted() -> Any:
            nonlocal size, whole
            message = await receive()
            size += len(message.get("body", b""))
            whole = not message.get("more_body", False)
            if size > limit:
                raise _too_large(limit)
            return message

        async def polite(message: Any) -> None:
            """Send the answer once its receiver, which may send all before it reads, has a chance to get it."""
            nonlocal begun
            if not begun and not whole and _has_body(headers):
                # With "expect" nothing may be on its way yet.
                gone = ("expect" not in headers or size) and await _forget(receive)
                if not gone:
                    message["headers"] = [*message["headers"], (b"connection", b"close")]
            begun = True
            await send(message)

        try:
            announced = headers.get("content-length", "0")
            if announced.isdecimal() and int(announced) > limit:
                raise _too_large(limit)
            await app(scope, counted, polite)
        except Exception as error:
            if begun:  # nothing can be said any more; the connection is closed
                raise
            if not isinstance(error, RequestError):
                log.exception("%s %s failed", scope["method"], scope["path"])
                error = RequestError(500, "the server failed, which is a fault of its own; its log says how")
            await answer_problem(polite, error)


def _refused(error: RequestError) -> Any:
    """Return an application that answers with an error."""

    async def refuse(scope: Any, receive: Any, send: Any) -> None:
        raise error

    return refuse


def _has_body(headers: Headers) -> bool:
    return "transfer-encoding" in headers or headers.get("content-length", "0") != "0"


async def answer_problem(send: Any, error: RequestError) -> None:
    """Answer a request with an error, below all that FastAPI does."""
    body = dumped(problem(error.status, str(error)))
    headers: Mapping[str, str] = {
        "content-type": PROBLEM_TYPE,
        "content-length": str(len(body)),
        **{name.lower(): value for name, value in error.headers.items()},
    }
    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": raw})
    await send({"type": "http.response.body", "body": body})


async def _forget(receive: Any) -> bool:
    """Read the rest of a body and keep nothing; tell whether it came to its end in time."""
    try:
        async with asyncio.timeout(_PATIENCE_S):
            while (await receive()).get("more_body"):
                pass
    except TimeoutError:
        return False
    return True


def _too_large(limit: int) -> RequestError:
    return RequestError(
        413,
        f"the request is larger than {limit} bytes; shrink or compress the picture, or start glip-serve with"
        " another --max-bytes",
    )


def _name(host: str) -> str:
    """Return a Host header without its port."""
    name, colon, port = host.rpartition(":")
    return (name if colon and port.isdecimal() else host).lower()
