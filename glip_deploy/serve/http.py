"""The routes of the HTTP service: detect, encode, models, health, metrics."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.exceptions import HTTPException, RequestValidationError
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.requests import ClientDisconnect

from glip_deploy.errors import GlipError, reason_of, shown
from glip_deploy.serve.bodies import (
    DetectBody,
    EncodeBody,
    checked_prompts,
    dumped,
    encoded_answer,
    form_schema,
    json_schemas,
    label_of,
    limits_of,
    prompts_of,
    read_detect,
    read_encode,
)
from glip_deploy.serve.errors import PROBLEM_TYPE, RequestError, problem, status_of
from glip_deploy.serve.guard import PROTECTED
from glip_deploy.serve.metrics import CONTENT_TYPE
from glip_deploy.serve.pictures import Pictures

if TYPE_CHECKING:
    from glip_deploy.results.detections import Detections
    from glip_deploy.serve.metrics import Metrics
    from glip_deploy.serve.models import Model, Places
    from glip_deploy.serve.settings import Settings

__all__ = ["add_problems", "describe", "service"]

log = logging.getLogger(__name__)
Body = TypeVar("Body")
_ERRORS = (400, 401, 403, 404, 408, 413, 415, 421, 422, 429, 500, 501, 503)


def service(settings: Settings, models: Mapping[str, Model], places: Places, metrics: Metrics) -> APIRouter:
    """Return the routes.

    Args:
        settings: of the server.
        models: by name; the first is the one that is asked where none is named.
        places: for requests that are under way.
        metrics: of the application.
    """
    router = APIRouter()
    pictures = Pictures(settings)

    def chosen(name: str | None) -> Model:
        if name is None:
            return next(iter(models.values()))
        if name not in models:
            raise RequestError(404, f"there is no model {shown(name)} here; choose {', '.join(models)}")
        return models[name]

    async def detect(read: tuple[DetectBody, str]) -> Response:
        body, source = read
        texts = prompts_of(body, settings)
        model = chosen(body.model)
        encoded = [await model.encode(text, phrases=body.phrases) for text in texts]
        limits = limits_of(body, encoded)
        async with pictures.decoded(body.image) as image:
            height, width = image.shape[:2]
            found = await model.detect(image, encoded, limits, body.max_detections)

        def line(detections: Detections, prompt: dict[str, str]) -> dict[str, Any]:
            boxes = detections.to_dicts()
            return {"source": source, "frame": 0, "width": width, "height": height, **prompt, "detections": boxes}

        if body.prompts is None:
            answer = line(found.detections[0], {})
        else:
            lines = zip(found.detections, texts, strict=True)
            answer = {"results": [line(one, {"prompt": label_of(text)}) for one, text in lines]}
        stages = ", ".join(f"{name.replace(' ', '-')};dur={ms:.2f}" for name, ms in found.ms.items())
        return Response(dumped(answer), media_type="application/json", headers={"Server-Timing": stages})

    async def encode(body: EncodeBody) -> Response:
        model = chosen(body.model)
        encoded = await model.encode(checked_prompts([body.prompt], settings)[0], phrases=body.phrases)
        return Response(dumped(encoded_answer(model.name, encoded)), media_type="application/json")

    async def answered(
        request: Request, read: Coroutine[Any, Any, Body], work: Callable[[Body], Coroutine[Any, Any, Response]]
    ) -> Response:
        """Read a body and answer it: in a place, within the time of a request, and while its client is there."""
        until = time.monotonic() + settings.timeout
        try:
            with places.place():
                try:
                    async with asyncio.timeout(settings.timeout):
                        body = await read
                except TimeoutError:
                    raise RequestError(
                        408, f"the request was not complete after {settings.timeout:g} s; send it faster"
                    ) from None
                except ClientDisconnect:
                    raise _left() from None
                return await _within(until - time.monotonic(), request, work(body))
        finally:
            read.close()  # nothing if it was awaited

    @router.post(
        "/v1/detect",
        summary="Find what a prompt names in a picture",
        openapi_extra={
            "requestBody": {
                "required": True,
                "content": {
                    "application/json": {"schema": _reference("DetectBody")},
                    "multipart/form-data": {"schema": form_schema(), "encoding": {"prompt": {"explode": True}}},
                },
            }
        },
        responses=_responses({"anyOf": [_reference("Answer"), _reference("Answers")]}),
        response_class=Response,
    )
    async def detect_route(request: Request) -> Response:
        return await answered(request, read_detect(request, settings), detect)

    @router.post(
        "/v1/encode",
        summary="Encode a prompt, so that the first picture does not wait for it, and show its classes",
        openapi_extra={
            "requestBody": {"required": True, "content": {"application/json": {"schema": _reference("EncodeBody")}}}
        },
        responses=_responses(_reference("Encoded")),
        response_class=Response,
    )
    async def encode_route(request: Request) -> Response:
        return await answered(request, read_encode(request), encode)

    @router.get(
        "/v1/models",
        summary="The bundles that are open",
        responses=_responses(_reference("ModelsBody"), 401),
        response_class=Response,
    )
    async def models_route() -> Response:
        shown_models = [_model(model) for model in models.values()]
        return Response(dumped({"models": shown_models}), media_type="application/json")

    @router.get(
        "/healthz",
        summary="Whether the process answers",
        responses=_responses(_reference("StatusBody"), None),
        response_class=Response,
    )
    async def health() -> Response:
        return Response(dumped({"status": "ok"}), media_type="application/json")

    @router.get(
        "/readyz",
        summary="Whether models are open",
        responses=_responses(_reference("StatusBody"), 503),
        response_class=Response,
    )
    async def ready() -> Response:
        if not models or any(model.closed for model in models.values()):
            raise RequestError(503, "the server is ending; ask another, or ask again when it is back")
        return Response(dumped({"status": "ready", "models": list(models)}), media_type="application/json")

    @router.get(
        "/metrics",
        summary="Counters for Prometheus",
        responses={200: {"description": "Text", "content": {"text/plain": {"schema": {"type": "string"}}}}},
        response_class=Response,
    )
    async def metrics_route() -> Response:
        return Response(metrics.text(), headers={"Content-Type": CONTENT_TYPE})

    return router


async def _within(seconds: float, request: Request, work: Coroutine[Any, Any, Response]) -> Response:
    """Do some work while its client waits for it."""
    task, gone = asyncio.create_task(work), asyncio.create_task(_gone(request))
    try:
        await asyncio.wait((task, gone), timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        if gone.done():
            raise _left()
        raise RequestError(503, "it takes too long; ask again later, or for less at once", {"Retry-After": "5"})
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _left() -> RequestError:
    return RequestError(499, "the client left before it was answered")


def _model(model: Model) -> dict[str, Any]:
    detector = model.detector
    return {
        "name": model.name,
        "variant": detector.bundle.variant,
        "max_tokens": detector.bundle.max_tokens,
        "max_detections": detector.bundle.max_detections,
        "shortest_side": detector.shortest_side,
        "longest_side": detector.longest_side,
    }


def _reference(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{name}"}


def _responses(schema: Mapping[str, Any], *statuses: int | None) -> dict[int | str, dict[str, Any]]:
    errors = _ERRORS if not statuses else [status for status in statuses if status is not None]
    content = {PROBLEM_TYPE: {"schema": _reference("ProblemBody")}}
    answers: dict[int | str, dict[str, Any]] = {
        status: {"description": problem(status, "")["title"], "content": content} for status in errors
    }
    answers[200] = {"description": "The answer", "content": {"application/json": {"schema": dict(schema)}}}
    return answers


def describe(app: FastAPI, settings: Settings) -> None:
    """Let the OpenAPI description of an application know the bodies that this module reads and writes itself.

    Args:
        app: the application.
        settings: of the server; a token is part of the description.
    """
    plain = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            description = plain()
            components = description.setdefault("components", {})
            components.setdefault("schemas", {}).update(json_schemas())
            if settings.token is not None:
                components["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
                for path, methods in description["paths"].items():
                    if path.startswith(PROTECTED):
                        for operation in methods.values():
                            operation["security"] = [{"token": []}]
            app.openapi_schema = description
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def add_problems(app: FastAPI) -> None:
    """Answer every error of an application as problem+json."""

    def answer(status: int, detail: str, name: str, headers: Mapping[str, str] | None = None) -> Response:
        body = dumped(problem(status, detail, name))
        return Response(body, status, dict(headers or {}), media_type=PROBLEM_TYPE)

    @app.exception_handler(GlipError)
    async def refused(request: Request, error: GlipError) -> Response:
        status = status_of(error)
        if status >= 500:
            log.error("%s %s: %s", request.method, request.url.path, error)
        headers = error.headers if isinstance(error, RequestError) else None
        return answer(status, " ".join(str(error).splitlines()), type(error).__name__, headers)

    @app.exception_handler(StarletteHTTPException)
    async def unknown(request: Request, error: HTTPException) -> Response:
        path = shown(request.url.path)
        words = {404: f"there is nothing at {path}; /docs lists what is there", 405: f"{path} takes another method"}
        detail = words.get(error.status_code, " ".join(str(error.detail).splitlines()))
        return answer(error.status_code, detail, "RequestError", error.headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return answer(422, f"the request cannot be used ({reason_of(error)})", "RequestError")


class Counted:
    """Middleware that counts requests and their time.

    Args:
        app: what comes after it.
        metrics: where they are counted.
        paths: that are told apart; all others are counted as one.
    """

    def __init__(self, app: Any, metrics: Metrics, paths: frozenset[str]) -> None:
        self._app, self._metrics, self._paths = app, metrics, paths

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Serve a request, as ASGI calls it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status = time.perf_counter(), 500
        path = scope["path"] if scope["path"] in self._paths else "other"
        method = scope["method"] if scope["method"] in ("GET", "HEAD", "POST") else "other"

        async def noted(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, noted)
        finally:
            self._metrics.requests.labels(path, method, str(status)).inc()
            self._metrics.seconds.labels(path).observe(time.perf_counter() - began)
