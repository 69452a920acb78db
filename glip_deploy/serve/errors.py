"""What a server answers when it cannot do what was asked: the command line's words, and a status of HTTP."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from glip_deploy.errors import (
    BackendError,
    BundleError,
    ClosedError,
    EngineError,
    FrameError,
    GlipError,
    MissingPackage,
    OptionError,
    PromptError,
)

__all__ = ["PROBLEM_TYPE", "QueueFull", "RequestError", "problem", "status_of"]

PROBLEM_TYPE = "application/problem+json"
_STATUS: Mapping[type[GlipError], int] = {
    PromptError: 422,
    OptionError: 422,
    FrameError: 422,
    ClosedError: 503,
    MissingPackage: 501,
    BackendError: 500,
    EngineError: 500,
    BundleError: 500,
}
_TITLES = {
    400: "The request cannot be read",
    401: "A token is needed",
    403: "Other pages may not ask",
    404: "There is nothing here",
    405: "The method is not allowed",
    408: "The request came too slowly",
    413: "The request is too large",
    415: "The kind of content is unknown",
    421: "The request is for another server",
    422: "The request cannot be carried out",
    429: "Too many requests are under way",
    499: "The client left",
    500: "The server failed",
    501: "The server lacks a package",
    503: "The server cannot answer now",
}


class RequestError(GlipError):
    """A request that is refused, for a reason that only HTTP knows.

    Args:
        status: of the answer.
        message: one line, as for any `GlipError`.
        headers: of the answer.
    """

    def __init__(self, status: int, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.headers = status, dict(headers or {})


class QueueFull(RequestError):
    """As many requests are under way as the server takes; asking again later may help.

    Args:
        under_way: how many there are.
        seconds: after which a place is likely to be free.
    """

    def __init__(self, under_way: int, seconds: int) -> None:
        super().__init__(
            429,
            f"as many requests are under way as this server takes ({under_way}); ask again in {seconds} s",
            {"Retry-After": str(seconds)},
        )


def status_of(error: GlipError) -> int:
    """Return the status of an answer for an error."""
    if isinstance(error, RequestError):
        return error.status
    return next((status for kind, status in _STATUS.items() if isinstance(error, kind)), 500)


def problem(status: int, detail: str, name: str = "RequestError") -> dict[str, Any]:
    """Return the body of an answer as RFC 9457 has it.

    Args:
        status: of the answer.
        detail: the message.
        name: of the error's class, for programs.
    """
    title = _TITLES.get(status, "The request failed")
    return {"type": f"urn:glip-deploy:{name}", "title": title, "status": status, "detail": detail}
