"""Detectors on Ray Serve, on this machine or on a cluster, behind the interface of `Model`.

The HTTP service stays where it is, with all that guards it. Its frames go to replicas, whose number follows the load. A
replica is asked again for the prompts that it has encoded: a prompt is what Ray Serve calls a multiplexed model.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import socket
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from glip_deploy.errors import BackendError, BundleError, ClosedError, GlipError, reason_of
from glip_deploy.prompts.chunks import parse_chunks
from glip_deploy.prompts.encoded import ChunkedPrompt, EncodedPrompt
from glip_deploy.prompts.syntax import Caption, Phrases
from glip_deploy.prompts.tokens import parse_prompt

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from glip_deploy.bundle.manifest import Bundle
    from glip_deploy.prompts.syntax import PromptText
    from glip_deploy.prompts.tokens import Prompt
    from glip_deploy.results.detections import Detections
    from glip_deploy.serve.models import Found

__all__ = ["RayModel", "ReplicaSetup", "deploy"]

log = logging.getLogger(__name__)
TEXT = "text branch"
"""A stage of the first frame with a prompt that its replica does not know."""
_PROMPTS = 64
"""Prompts that a replica keeps encoded."""
_TARGET = 2
"""Frames under way that a replica should have; with more, replicas are added while there may be more of them."""
_TRIES = 3
"""A frame whose replica is lost is given to another so often."""


@dataclass(frozen=True)
class ReplicaSetup:
    """What every replica of a model does.

    Attributes:
        name: what clients call the model.
        application: what Ray Serve calls it: of several services on a cluster, each has its own. One that is started in
            the place of another that was killed takes over the name, and with it the replicas left there.
        path: folder of the bundle, absolute.
        manifest_sha256: of the bundle: a replica elsewhere must find the same one.
        options: for `Detector.open`.
        queue: for `Model`.
    """

    name: str
    application: str
    path: str
    manifest_sha256: str
    options: dict[str, Any]
    queue: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _Refusal:
    """A `GlipError` on its way from a replica, which Ray would wrap with a traceback."""

    kind: str
    message: str


@dataclass(frozen=True)
class _Shown:
    """What is asked of a model's detector beside detection."""

    bundle: Bundle
    shortest_side: int
    longest_side: int | None


def deploy(setup: ReplicaSetup, *, replicas: int, most: int, threads: int, gpus: float = 0) -> Any:
    """Start the replicas of a model on the Ray that is connected, and return Ray Serve's handle of them.

    Args:
        setup: of the model.
        replicas: that there are always.
        most: that there may be under load.
        threads: CPU threads of each.
        gpus: of each; may be a fraction.

    Raises:
        BackendError: they cannot be started.
    """
    from ray import serve

    limit = setup.queue.get("queue_size", 64)
    deployment = serve.deployment(_replica_class()).options(
        name=setup.name,
        max_ongoing_requests=limit,
        autoscaling_config={"min_replicas": replicas, "max_replicas": most, "target_ongoing_requests": _TARGET},
        ray_actor_options={"num_cpus": threads, "num_gpus": gpus},
    )
    try:
        serve.start(proxy_location="Disabled")  # clients ask the service, not Ray
        return serve.run(deployment.bind(setup), name=setup.application, route_prefix=None)
    except BaseException as error:
        with suppress(Exception):  # on a cluster they would go on to start
            serve.delete(setup.application)
        if not isinstance(error, Exception):
            raise
        # a RuntimeError, or whatever Ray raises
        raise BackendError(f"replicas of {setup.name} cannot be started on Ray ({reason_of(error)})") from error


class RayModel:
    """A model whose detectors are replicas; what `Model` offers, for as long as Ray is connected.

    Args:
        name: what clients call it.
        application: what Ray Serve calls it.
        bundle: of the replicas.
        handle: what `deploy` gave.
        most: replicas that there may be.
        shortest_side: of the replicas' detectors.
        longest_side: likewise.
    """

    def __init__(
        self,
        name: str,
        application: str,
        bundle: Bundle,
        handle: Any,
        *,
        most: int,
        shortest_side: int,
        longest_side: int | None,
    ) -> None:
        self.name = name
        self._application = application
        self.detector = _Shown(bundle, shortest_side, longest_side)
        self.observe: Callable[[int, dict[str, float]], None] | None = None
        self.waiting = 0
        self.closed = False
        self.pause = 1
        self._tokenizer = bundle.tokenizer()
        self._handle = handle
        self._enough = _TARGET * most
        self._under_way: Counter[str] = Counter()

    async def encode(self, text: PromptText, *, phrases: Phrases | str = Phrases.AUTO) -> EncodedPrompt:
        """Tokenize a prompt; the replica that looks for it first encodes it, so the embedding is empty here.

        Raises:
            GlipError: what `Detector.encode` raises.
        """

        def parse() -> list[EncodedPrompt]:
            limit = self.detector.bundle.max_tokens
            if isinstance(text, str | Caption):
                prompts: Sequence[Prompt] = [parse_prompt(text, self._tokenizer, phrases=phrases, max_tokens=limit)]
            else:
                prompts = parse_chunks(text, self._tokenizer, phrases=phrases, max_tokens=limit)
            return [EncodedPrompt(prompt, np.zeros((0, 0), np.float32)) for prompt in prompts]

        chunks = await asyncio.get_running_loop().run_in_executor(None, parse)
        return chunks[0] if len(chunks) == 1 else ChunkedPrompt(chunks)

    async def detect(
        self,
        image: NDArray[np.uint8],
        prompts: Sequence[EncodedPrompt],
        thresholds: Sequence[NDArray[np.float32]],
        max_detections: int | None = None,
    ) -> Found:
        """Find what prompts name in a frame; see `Model.detect`.

        Raises:
            ClosedError: the server ends, or no replica answers.
            GlipError: what the replica raised.
        """
        from ray.exceptions import RayError

        if self.closed:
            raise ClosedError("the server is ending; ask another, or ask again when it is back")
        chunks = [[chunk.prompt for chunk in one.chunks] for one in prompts]
        key = hashlib.sha256(repr([[prompt.key for prompt in one] for one in chunks]).encode()).hexdigest()
        self.waiting += 1
        self._under_way[key] += 1
        try:
            for attempt in range(_TRIES):
                response = self._method(key).remote(key, image, chunks, list(thresholds), max_detections)
                try:
                    answer = await response
                    break
                except asyncio.CancelledError:
                    response.cancel()
                    raise
                except RayError as error:
                    log.warning("a replica of %s was lost (%s)", self.name, reason_of(error))
                    if attempt == _TRIES - 1:
                        raise ClosedError(f"no replica of {self.name} answers; ask again in a minute") from error
        finally:
            self.waiting -= 1
            self._under_way[key] -= 1
            self._under_way += Counter()  # forgets prompts of which nothing is under way
        if isinstance(answer, _Refusal):
            from glip_deploy import errors

            raise getattr(errors, answer.kind, GlipError)(answer.message)
        found: Found = answer
        if self.observe is not None:
            shares = {name: ms / 1000 / found.batch for name, ms in found.ms.items() if name not in ("queue", TEXT)}
            self.observe(1, shares)
        return found

    def _method(self, key: str) -> Any:
        """Return what asks a replica: one that has the prompt encoded, or the one that has least to do.

        Ray Serve sends frames with a known prompt to the replicas that know it until these are full, and would leave
        added ones idle.
        """
        if self._under_way[key] > _TARGET or self.waiting > self._enough:
            return self._handle.detect
        return self._handle.options(multiplexed_model_id=key).detect

    async def detect_prompts(
        self, image: NDArray[np.uint8], prompts: Sequence[EncodedPrompt], thresholds: Sequence[NDArray[np.float32]]
    ) -> tuple[list[Detections], dict[str, float]]:
        """Find what each of several prompts names in a frame of the live page; see `Model.detect_prompts`."""
        found = await self.detect(image, prompts, thresholds)
        return found.detections, found.ms

    def close(self) -> None:
        """Take no more frames; the replicas end with Ray, or with the application on the cluster."""
        from ray import serve

        if not self.closed:
            self.closed = True
            serve.delete(self._application)


def _replica_class() -> type:
    """Return the class of a replica; Ray must be imported to define it."""
    from ray import serve

    class Replica:
        """A model with its queue and its batches, in a process of Ray."""

        def __init__(self, setup: ReplicaSetup) -> None:
            from glip_deploy.detector import Detector
            from glip_deploy.serve.models import Model

            detector = Detector.open(setup.path, **setup.options)
            if detector.bundle.manifest_sha256 != setup.manifest_sha256:
                detector.close()
                raise BundleError(
                    f"bundle {setup.path} on {socket.gethostname()} is another one than where glip-serve was started"
                )
            self._model = Model(setup.name, detector, **setup.queue)

        @serve.multiplexed(max_num_models_per_replica=_PROMPTS)  # type: ignore[untyped-decorator]
        async def _known(self, key: str) -> dict[str, list[EncodedPrompt]]:
            return {}

        async def detect(
            self,
            key: str,
            image: NDArray[np.uint8],
            chunks: list[list[Prompt]],
            thresholds: list[NDArray[np.float32]],
            max_detections: int | None,
        ) -> Found | _Refusal:
            try:
                known = await self._known(key)
                began, encoding = time.perf_counter(), {}
                if "prompts" not in known:
                    known["prompts"] = [await self._encode(prompts) for prompts in chunks]
                    encoding = {TEXT: 1000 * (time.perf_counter() - began)}
                found = await self._model.detect(image, known["prompts"], thresholds, max_detections)
                return replace(found, ms={**encoding, **found.ms})
            except GlipError as error:
                return _Refusal(type(error).__name__, str(error))

        async def _encode(self, prompts: list[Prompt]) -> EncodedPrompt:
            encoded = [await self._model.encode(prompt) for prompt in prompts]  # type: ignore[arg-type]
            return encoded[0] if len(encoded) == 1 else ChunkedPrompt(encoded)

    return Replica
