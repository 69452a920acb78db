"""The websocket of the live page: prompts and frames up, boxes down, and the frames of the server's own source.

A message is JSON with a `type`, as text; or such a header and a picture in one binary message: four bytes (big endian)
with the header's length, the header in UTF-8, the picture's bytes.

From a visitor:

    {"type": "hello", "token": "..."}                     first; the token where the server has one
    {"type": "model", "model": "name"}                    ask this model from now on; the prompt is to be sent again
    {"type": "prompt", "id": 3, "prompt": "dog. bus",     a text or a list of names; "" to look for nothing
     "threshold": 0.5, "thresholds": {"dog": 0.3}}
    {"type": "thresholds", "threshold": ..., "thresholds": ...}
    {"type": "source", "source": "server"}                watch the server's source; null to watch it no more
    {"type": "ack", "frame": 12}                          a frame of that source is drawn
    {"type": "frame", "frame": 7} and a picture           a frame of the visitor's own; of those that wait for the
                                                          detector only the newest stays. With "still": true it is asked
                                                          again for every prompt and threshold that follows.

To a visitor:

    {"type": "welcome", "models": [...], "model": ..., "source": {"name": ...} or null, "track": false,
     "max_bytes": ..., "shortest_side": ..., "longest_side": ...}
    {"type": "prompt", "id": 3, "prompt": ..., "phrases": [...], "colors": ["#ff385c", ...],
     "tokens": [{"text": "dog", "class": 0}, ...], "prompts": 1, "limit": 256}
    {"type": "result", "frame": 7, "prompt": 3, "width": ..., "height": ..., "detections": [...], "classes": [...],
     "ms": {"wait": ..., ...}, "dropped": 0}              with the frame behind it, if that is the server's
    {"type": "dropped", "frame": 6, "dropped": 1}         a newer frame took its place, or the server is busy
    {"type": "source", "message": "..."}                  what is wrong with the server's source; "" when it is back
    {"type": "error", "about": "prompt", "id": 4, "message": "..."}

`detections` are those of glip-detect, with `track` where the server follows objects; `classes` are their places in the
prompt. A new prompt is encoded while frames go on with the old one, and takes effect between two frames.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from glip_deploy.errors import GlipError, OptionError, PromptError, shown
from glip_deploy.prompts.syntax import fold
from glip_deploy.prompts.tokens import thresholds
from glip_deploy.results.drawing import class_color
from glip_deploy.serve.broadcast import Broadcast, Taken
from glip_deploy.serve.errors import QueueFull
from glip_deploy.serve.messages import pack, read_object, unpack, whole_number
from glip_deploy.serve.pictures import Pictures
from glip_deploy.serve.tracks import Tracks

if TYPE_CHECKING:
    from starlette.websockets import WebSocket
    from tokenizers import Tokenizer

    from glip_deploy.prompts.encoded import EncodedPrompt
    from glip_deploy.results.detections import Detections
    from glip_deploy.serve.models import Model
    from glip_deploy.serve.settings import Settings
    from glip_deploy.serve.sources import SharedFrame, SharedSource

__all__ = ["Live"]

log = logging.getLogger(__name__)
_HELLO_S = 10.0
"""Seconds after which a visitor who has not said hello is shown out."""
_MOST_VISITORS = 100
_IN_FLIGHT = 2
"""Frames of the server's source that travel to a visitor at once."""
_OUTBOX = 64
"""Messages that wait for a visitor's line; with more the connection is closed."""
_GRACE_S = 0.25
"""How long frames wait for a prompt that is being encoded, or as long as a frame takes, if that is longer."""
_TOKENS_SHOWN = 2000


@dataclass(eq=False)
class _Upload:
    """A frame of the visitor's own."""

    frame: int
    picture: bytes
    still: bool
    at: float
    stream: object
    """Stands for all frames of the visitor's own that follow each other."""


@dataclass(frozen=True)
class _Asked:
    """A prompt that is to be encoded."""

    id: int
    prompt: str | list[str]
    until: float
    """`time.monotonic` until which frames wait for it."""


class Live:
    """All visitors of the live page.

    Args:
        settings: of the server.
        models: by name; the first is the one a visitor begins with.
        source: what the server itself reads, already checked, if anything.
    """

    def __init__(self, settings: Settings, models: Mapping[str, Model], source: SharedSource | None) -> None:
        self.settings, self.models, self.source = settings, dict(models), source
        self._broadcasts: dict[str, Broadcast] = {}
        self.pictures = Pictures(settings)
        self._tokenizers: dict[str, Tokenizer] = {}
        self._visitors: set[_Visitor] = set()

    def broadcast(self, model: Model) -> Broadcast | None:
        """Return what looks at the server's source with a model; None without a source."""
        if self.source is None:
            return None
        if model.name not in self._broadcasts:
            self._broadcasts[model.name] = Broadcast(model, self.source)
        return self._broadcasts[model.name]

    def describe(self, prompt: str | list[str], encoded: EncodedPrompt, model: Model) -> dict[str, Any]:
        """Return what the page shows of a prompt: its phrases, their colors, and which tokens score for them."""
        if model.name not in self._tokenizers:
            self._tokenizers[model.name] = model.detector.bundle.tokenizer()
        tokens = _tokens(encoded, self._tokenizers[model.name])
        colors = map(class_color, range(len(encoded.phrases)))
        return {
            "prompt": prompt,
            "phrases": list(encoded.phrases),
            "colors": [f"#{red:02x}{green:02x}{blue:02x}" for red, green, blue in colors],
            "tokens": tokens[:_TOKENS_SHOWN],
            "token_count": len(tokens),
            "prompts": len(encoded.chunks),
            "limit": model.detector.bundle.max_tokens,
        }

    async def visit(self, websocket: WebSocket) -> None:
        """Serve a visitor while the connection lasts. Pages of other servers do not come here: `Guard` sees to that."""
        await websocket.accept()
        try:
            hello = await asyncio.wait_for(websocket.receive_text(), _HELLO_S)
            token = read_object(hello).get("token")
        except Exception:  # too late, binary, no JSON, or gone: no visitor
            await _goodbye(websocket, 1008, "say hello first")
            return
        wanted = self.settings.token
        if wanted and not (isinstance(token, str) and hmac.compare_digest(token.encode(), wanted.encode())):
            problem = "the token is wrong" if token else "this server wants a token"
            message = f"{problem}; give the one that glip-serve was started with"
            await websocket.send_json(
                {"type": "error", "about": "hello", "id": None, "message": message, "token": True}
            )
            await _goodbye(websocket, 1008, problem)
            return
        if len(self._visitors) >= _MOST_VISITORS:
            await _goodbye(websocket, 1013, f"{_MOST_VISITORS} visitors are here, as many as can be")
            return
        visitor = _Visitor(self, websocket)
        self._visitors.add(visitor)
        try:
            await visitor.serve()
        finally:
            self._visitors.discard(visitor)


async def _goodbye(websocket: WebSocket, code: int, reason: str) -> None:
    try:
        await websocket.close(code, reason)
    except Exception as error:  # it is closed already
        if not _left(error):
            raise
        log.debug("a visitor left before it was shown out")


class _Visitor:
    """One connection: what it sends is taken, looked at and answered, each in a task of its own."""

    def __init__(self, live: Live, websocket: WebSocket) -> None:
        self._live, self._websocket = live, websocket
        self._model = next(iter(live.models.values()))
        self._outbox: asyncio.Queue[str | bytes] = asyncio.Queue(_OUTBOX)
        self._full = asyncio.Event()
        self.taken: Taken | None = None
        self._threshold, self._thresholds = 0.5, dict[str, float]()
        self._asked: _Asked | None = None
        self._encoder: asyncio.Task[None] | None = None
        self._frame_s = 0.0
        self._upload: _Upload | None = None
        self._still: _Upload | None = None
        self._news = asyncio.Event()
        self._own_stream = object()
        self.tracks = Tracks() if live.settings.track else None
        self._watching: Broadcast | None = None
        self._flying: set[int] = set()
        self.last_number = self.dropped = 0

    async def serve(self) -> None:
        """Do everything until the visitor leaves."""
        self._welcome()
        tasks = [asyncio.create_task(work()) for work in (self._receive, self._send, self._detect, self._full.wait)]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            if self._watching is not None:
                self._watching.remove(self)
            if self._encoder is not None:
                tasks.append(self._encoder)
            for task in tasks:
                task.cancel()
            ends = await asyncio.gather(*tasks, return_exceptions=True)
        for end in ends:
            if isinstance(end, Exception) and not _left(end):
                log.error("a visitor's connection failed", exc_info=end)
        await _goodbye(self._websocket, 1008 if self._full.is_set() else 1000, "")

    def _welcome(self) -> None:
        source = self._live.source
        detector = self._model.detector
        self.tell(
            {
                "type": "welcome",
                "models": list(self._live.models),
                "model": self._model.name,
                "source": None if source is None else {"name": source.name},
                "track": self.tracks is not None,
                "max_bytes": self._live.settings.max_bytes,
                "shortest_side": detector.shortest_side,
                "longest_side": detector.longest_side,
            }
        )

    # -- out --

    def tell(self, message: dict[str, Any]) -> None:
        """Send a message."""
        self._put(json.dumps(message))

    def _put(self, message: str | bytes) -> None:
        try:
            self._outbox.put_nowait(message)
        except asyncio.QueueFull:
            self._full.set()

    async def _send(self) -> None:
        while True:
            message = await self._outbox.get()
            if isinstance(message, bytes):
                await self._websocket.send_bytes(message)
            else:
                await self._websocket.send_text(message)

    def _fail(self, about: str, id: object, message: str) -> None:
        self.tell({"type": "error", "about": about, "id": id, "message": message})

    # -- in --

    async def _receive(self) -> None:
        while True:
            message = await self._websocket.receive()
            if message["type"] == "websocket.disconnect":
                return
            header: dict[str, Any] = {}
            try:
                if message.get("bytes") is not None:
                    header, picture = unpack(message["bytes"])
                    self._take_frame(header, picture)
                else:
                    header = read_object(message.get("text") or "")
                    self._take(header)
            except GlipError as error:
                kind = header.get("type")
                self._fail(kind if isinstance(kind, str) else "message", whole_number(header.get("id")), str(error))

    def _take(self, message: dict[str, Any]) -> None:
        match message.get("type"):
            case "prompt":
                self._take_thresholds(message)
                self._take_prompt(message)
            case "thresholds":
                self._take_thresholds(message)
                if self.taken is not None:
                    encoded = self.taken.encoded
                    self.taken = Taken(self.taken.id, encoded, self._limits(encoded))
                    self._ask_still_again()
            case "ack":
                frame = message.get("frame")
                self._flying = {one for one in self._flying if not isinstance(frame, int) or one > frame}
                self._wake()
            case "source":
                self._watch(message.get("source") == "server")
            case "model":
                self._take_model(message.get("model"))
            case other:
                raise OptionError(
                    f"a message has the type {shown(other)}; legal is prompt, thresholds, ack, source, model or frame"
                )

    def _take_model(self, name: object) -> None:
        if not isinstance(name, str) or name not in self._live.models:
            raise OptionError(f"there is no model {shown(name)} here; choose {', '.join(self._live.models)}")
        watching = self._watching is not None
        self._watch(False)
        self._model, self.taken, self._asked = self._live.models[name], None, None
        self._watch(watching)

    def _watch(self, wanted: bool) -> None:
        if self._watching is not None:
            self._watching.remove(self)
            self._watching = None
        self._flying.clear()
        self._upload = self._still = None
        self._own_stream = object()
        self.dropped = 0
        if wanted:
            self._watching = self._live.broadcast(self._model)
            if self._watching is None:
                raise OptionError("this server has no source of its own; start glip-serve with --source")
            self._watching.add(self)

    def _take_thresholds(self, message: dict[str, Any]) -> None:
        threshold, own = message.get("threshold", 0.5), message.get("thresholds", {})
        if not isinstance(own, dict):
            raise OptionError(f"thresholds are {shown(own)}; give an object with a number for each phrase")
        thresholds(list(own), own, threshold)  # checks the numbers
        self._threshold, self._thresholds = float(threshold), {fold(name): float(own[name]) for name in own}

    def _limits(self, encoded: EncodedPrompt) -> Any:
        """Return (C,) float32: what the sliders of a prompt's phrases say; those of others are kept for later."""
        own = [self._thresholds.get(fold(phrase), self._threshold) for phrase in encoded.phrases]
        return thresholds(encoded.phrases, own)

    # -- prompts --

    def _take_prompt(self, message: dict[str, Any]) -> None:
        id, prompt = whole_number(message.get("id")), message.get("prompt")
        names = [prompt] if isinstance(prompt, str) else prompt
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise PromptError(f"the prompt is {shown(prompt)}; give a text or a list of names")
        size, most = sum(map(len, names)), self._live.settings.max_characters
        if size > most:
            raise PromptError(f"the prompt has {size} characters, at most {most} are accepted; name fewer classes")
        if not prompt:
            self._asked = self.taken = None
            self._wake()
            return
        patience = max(_GRACE_S, self._frame_s)
        self._asked = _Asked(id or 0, prompt, time.monotonic() + patience)
        asyncio.get_running_loop().call_later(patience, self._wake)
        if self._encoder is None or self._encoder.done():
            self._encoder = asyncio.create_task(self._encode())

    async def _encode(self) -> None:
        """Encode the newest prompt that was asked for, until there is none."""
        while self._asked is not None:
            asked, model = self._asked, self._model
            try:
                encoded = await model.encode(asked.prompt)
                described = await asyncio.to_thread(self._live.describe, asked.prompt, encoded, model)
            except GlipError as error:
                self._fail("prompt", asked.id, str(error))
            except Exception:
                log.exception("a prompt could not be encoded")
                self._fail("prompt", asked.id, "the prompt could not be encoded; the server's log says why")
            else:
                if self._asked is asked and model is self._model:
                    self.taken = Taken(asked.id, encoded, self._limits(encoded))
                    self.tell({"type": "prompt", "id": asked.id, **described})
                    self._ask_still_again()
            if self._asked is asked:
                self._asked = None
                self._wake()

    @property
    def _held(self) -> bool:
        """Whether the next frame waits for a prompt that is being encoded: with the old one it would take longer."""
        return self._asked is not None and time.monotonic() < self._asked.until

    def _wake(self) -> None:
        self._news.set()
        if self._watching is not None:
            self._watching.wake()

    # -- frames of the server's source --

    @property
    def ready(self) -> bool:
        """Whether another frame of the server's source may be sent."""
        return len(self._flying) < _IN_FLIGHT and not self._held

    def show(
        self, frame: SharedFrame, jpeg: bytes, taken: Taken | None, found: Detections, ms: dict[str, float]
    ) -> None:
        """Send a frame of the server's source and what was found in it."""
        self._flying.add(frame.number)
        assert self._live.source is not None
        size = frame.image.shape[1], frame.image.shape[0]
        more = {"source": self._live.source.name, "index": frame.index}
        self._put(pack(self._result(frame.number, size, taken, found, ms) | more, jpeg))

    def _result(
        self, frame: int, size: tuple[int, int], taken: Taken | None, found: Detections, ms: dict[str, float]
    ) -> dict[str, Any]:
        self._frame_s = sum(ms.values()) / 1000
        return {
            "type": "result",
            "frame": frame,
            "prompt": None if taken is None else taken.id,
            "width": size[0],
            "height": size[1],
            "detections": found.to_dicts(),
            "classes": found.labels.tolist(),
            "ms": {stage: round(milliseconds, 3) for stage, milliseconds in ms.items()},
            "dropped": self.dropped,
        }

    # -- frames of the visitor's own --

    def _take_frame(self, header: dict[str, Any], picture: bytes) -> None:
        frame = whole_number(header.get("frame"))
        if header.get("type") != "frame" or frame is None:
            raise OptionError(f"a picture came with {shown(header)}; its header is a frame with a number")
        upload = _Upload(frame, picture, header.get("still") is True, time.monotonic(), self._own_stream)
        if self._upload is not None:
            self._drop(self._upload)
        self._upload = upload
        self._still = upload if upload.still else None
        self._news.set()

    def _ask_still_again(self) -> None:
        if self._still is not None:
            self._still.at = time.monotonic()
            self._upload = self._still
        self._wake()

    def _drop(self, upload: _Upload) -> None:
        if not upload.still:
            self.dropped += 1
            self.tell({"type": "dropped", "frame": upload.frame, "dropped": self.dropped})

    async def _detect(self) -> None:
        """Look at the visitor's own frames, each time the newest."""
        while True:
            await self._news.wait()
            self._news.clear()
            if self._upload is None or self._held:
                continue
            upload, self._upload = self._upload, None
            taken = self.taken
            if taken is None:
                if not upload.still:
                    self._drop(upload)
                continue
            try:
                await self._look_at(upload, taken)
            except QueueFull:
                self._drop(upload)
            except GlipError as error:
                self._fail("frame", upload.frame, str(error))
            except Exception:
                log.exception("a visitor's frame could not be looked at")
                self._fail("frame", upload.frame, "detection failed; the server's log says how")
            if self._upload is not None:
                self._news.set()

    async def _look_at(self, upload: _Upload, taken: Taken) -> None:
        """Answer a frame, with the prompt as it was when it was taken up."""
        began = time.monotonic()
        async with self._live.pictures.decoded(upload.picture) as image:
            decoded = time.monotonic()
            tracks = None if upload.still else self.tracks
            limits = taken.limits if tracks is None else tracks.limits(taken)
            (found,), ms = await self._model.detect_prompts(image, [taken.encoded], [limits])
            size = image.shape[1], image.shape[0]
        if tracks is not None:
            following = time.monotonic()
            found = await asyncio.to_thread(tracks.follow, found, taken, upload.stream, upload.at)
            ms = {**ms, "tracking": 1000 * (time.monotonic() - following)}
        ms = {"wait": 1000 * (began - upload.at), "decode": 1000 * (decoded - began), **ms}
        self.tell(self._result(upload.frame, size, taken, found, ms))


def _left(error: Exception) -> bool:
    """Tell whether an exception is but the end of a connection, as the web server words it."""
    from starlette.websockets import WebSocketDisconnect

    return isinstance(error, WebSocketDisconnect | OSError) or (
        isinstance(error, RuntimeError) and "close" in str(error)
    )


def _tokens(encoded: EncodedPrompt, tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """Return the text of each token and the place of the class for which it scores, if any."""
    tokens: list[dict[str, Any]] = []
    first = 0
    for chunk in encoded.chunks:
        of: dict[int, int] = {}
        for label, positions in enumerate(chunk.prompt.token_spans):
            for position in positions:
                of.setdefault(position, first + label)
        ids = chunk.prompt.input_ids.tolist()
        tokens += [{"text": tokenizer.id_to_token(id), "class": of.get(place)} for place, id in enumerate(ids)]
        first += len(chunk.phrases)
    return tokens
