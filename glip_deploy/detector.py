"""The facade: the text branch once per prompt, the image branch once per frame."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Mapping, MutableMapping, Sequence
from enum import Enum, StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glip_deploy.backends import MAX_THREADS, check_trusted, open_backend
from glip_deploy.backends.base import Backend
from glip_deploy.bundle.contract import Candidates, ImageInputs
from glip_deploy.bundle.manifest import Bundle
from glip_deploy.errors import GlipError, OptionError, PromptError
from glip_deploy.files import cache_folder
from glip_deploy.frames.canvas import Resize
from glip_deploy.frames.device import network_canvas
from glip_deploy.frames.geometry import check_sides, check_whole
from glip_deploy.prompts.cache import PromptCache
from glip_deploy.prompts.chunks import parse_chunks
from glip_deploy.prompts.encoded import ChunkedPrompt, EncodedPrompt
from glip_deploy.prompts.syntax import Caption, Phrases, PromptText
from glip_deploy.prompts.tokens import Prompt, parse_prompt, thresholds
from glip_deploy.results.detections import Detections
from glip_deploy.results.postprocess import select_batch

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["ChunkedPrompt", "Detector", "EncodedPrompt", "FrameStep", "thresholds_of_prompts"]

_log = logging.getLogger(__name__)
_RECENT = 4
"""Texts whose encoded prompts a detector remembers: few, as the embeddings of a long list take megabytes."""

Threshold = float | Sequence[float] | Mapping[str, float]


class FrameStep(StrEnum):
    """The parts of a frame's way through `Detector.detect`, in order."""

    RESIZE = "resize and canvas"
    IMAGE = "image branch"
    """To the device and back included, where there is one."""
    SELECT = "threshold and NMS"


class _Clock:
    """Writes the seconds since its last reading into a mapping, if there is one."""

    def __init__(self, timings: MutableMapping[FrameStep, float] | None) -> None:
        self._timings, self._last = timings, time.perf_counter()

    def lap(self, step: FrameStep) -> None:
        """End a step."""
        if self._timings is not None:
            now = time.perf_counter()
            self._timings[step], self._last = now - self._last, now


def thresholds_of_prompts(threshold: Threshold | Sequence[Threshold], count: int) -> Sequence[Threshold]:
    """Return what each of `count` prompts has for a threshold; see `Detector.detect_prompts`.

    Raises:
        OptionError: thresholds that are not one for each prompt.
    """
    if isinstance(threshold, Sequence) and not isinstance(threshold, str):
        if len(threshold) != count:
            raise OptionError(
                f"{len(threshold)} thresholds are given for {count} prompts; give one for each, or a number"
            )
        return threshold
    if isinstance(threshold, Mapping):
        raise OptionError("thresholds by phrase belong to one prompt; give a list with one entry for each prompt")
    return [threshold] * count


class _Default(Enum):
    """Marks "the user's cache directory", since None means no directory."""

    CACHE = "default"


def _resize_of(asked: Resize | None, backend: Backend) -> Resize:
    """Return how frames are resized: as asked, or on the GPU where the backend can.

    Raises:
        OptionError: on the GPU, with a backend that cannot.
        GlipError: on the GPU, and what the backend needs for it is missing.
    """
    if asked is not None and asked is not Resize.GPU:
        return asked
    try:
        if backend.prepare_resize():
            return Resize.GPU
    except GlipError as error:
        if asked is not None:
            raise
        _log.warning("frames are resized on the CPU: %s", error)
    return Resize.EXACT if asked is None else Resize.on_cpu(asked)


class Detector:
    """Open-vocabulary detection with an exported GLIP.

        detector = Detector.open("glip_t/")
        prompt = detector.encode(["person", "traffic light"])
        detections = detector.detect(frame, prompt, threshold=0.5, color="bgr")

    Changing the prompt never rebuilds anything: an embedding is an input of the image branch. A detector may be used
    from several threads.
    """

    def __init__(
        self,
        bundle: Bundle,
        backend: Backend,
        *,
        shortest_side: int = 800,
        longest_side: int | None = 1333,
        resize: Resize | None = None,
        cache_dir: Path | None = None,
    ) -> None:
        self.bundle = bundle
        self.shortest_side = shortest_side
        self.longest_side = longest_side
        self.resize = _resize_of(resize, backend)
        self.backend = backend
        self._tokenizer = bundle.tokenizer()
        key = bundle.key
        if backend.text_key:
            key = hashlib.sha256(f"{key} {backend.text_key}".encode()).hexdigest()
        self._cache = PromptCache(cache_dir, key)
        self._warned = False
        self._recent: dict[Any, EncodedPrompt] = {}

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        backend: str = "onnxruntime",
        precision: str | None = None,
        engines: str | Path | None = None,
        shortest_side: int = 800,
        longest_side: int | None = 1333,
        resize: str | Resize | None = None,
        threads: int | None = None,
        cache_dir: str | Path | _Default | None = _Default.CACHE,
        verify: bool = True,
        trusted: bool = True,
        plugins: bool = True,
    ) -> Detector:
        """Open a bundle.

        Args:
            path: directory that `glip-export` wrote.
            backend: "onnxruntime" on the CPU; "onnxruntime-cuda", "onnxruntime-tensorrt" or
                "onnxruntime-nv-tensorrt-rtx" on a GPU; "openvino" on the CPU; or "tensorrt" for engines that
                `glip-build` made (TensorRT or TensorRT-RTX).
            precision: for "openvino" alone: "f32" (None means it too), "bf16", or "auto" for bf16 where the CPU has
                instructions for it.
            engines: their folder or its name in the bundle; None takes the first that fit this machine.
            shortest_side: pixels; frames are resized to it before the network.
            longest_side: pixels; the other side's limit, None for no limit (as in the official demo).
            resize: "exact" (as GLIP was evaluated), "fast", or for "tensorrt" alone "gpu" (exact within one gray level;
                frames are uploaded as they are). None takes "gpu" where the backend has it, else "exact".
            threads: CPU threads, up to 512; None for one a core.
            cache_dir: where encoded prompts, and the graphs that OpenVINO compiled, are kept between runs; None keeps
                them in memory only.
            verify: check the hashes of all files.
            trusted: False to refuse native code that comes with the bundle, for one from a stranger: "onnxruntime",
                "onnxruntime-cuda" and "openvino" only read data, all other backends are refused.
            plugins: False to load no plugin library: "tensorrt" then takes only engines that need none.

        Raises:
            BundleError: a damaged or foreign bundle.
            OptionError: an option outside its legal range.
            GlipError: a backend or engines that cannot be opened; see `glip_deploy.backends.open_backend`.
        """
        check_sides(shortest_side, longest_side)
        if threads is not None:
            check_whole("threads", threads, 1, MAX_THREADS)
        method = None if resize is None else Resize.of(resize)
        check_trusted(backend, trusted)
        directory = cache_folder() if isinstance(cache_dir, _Default) else cache_dir
        folder = None if directory is None else Path(directory)
        bundle = Bundle.open(path, verify=verify)
        return cls(
            bundle,
            open_backend(
                backend,
                bundle,
                threads,
                None if engines is None else Path(engines),
                trusted=trusted,
                plugins=plugins,
                precision=precision,
                cache_dir=folder,
            ),
            shortest_side=shortest_side,
            longest_side=longest_side,
            resize=method,
            cache_dir=folder,
        )

    def clone(self) -> Detector:
        """Another detector for another stream of frames.

        It shares the engines' weights and the known prompts; with TensorRT it has a CUDA stream and buffers of
        its own, so that two cameras do not wait for each other.
        """
        twin = Detector(
            self.bundle,
            self.backend.clone(),
            shortest_side=self.shortest_side,
            longest_side=self.longest_side,
            resize=self.resize,
        )
        twin._cache, twin._warned = self._cache, self._warned
        return twin

    def encode(
        self,
        text: PromptText | Prompt,
        *,
        phrases: Phrases | str = Phrases.AUTO,
        classes_per_prompt: int | None = None,
    ) -> EncodedPrompt:
        """Encode a prompt; the text branch runs only if neither memory nor disk knows it.

        A list of names may have any length. One that does not fit into a prompt becomes a `ChunkedPrompt`, whose
        chunks are cached one by one; see `glip_deploy.prompts.chunks.parse_chunks` for how it is divided. A warning
        says once that scores of different chunks are not calibrated against each other.

        Args:
            text: class names in a list; a dotted string "person. dog."; a caption with [phrases] in brackets; one
                without, whose noun phrases are found; a `Caption` with spans. See `glip_deploy.prompts.parse_prompt`.
            phrases: what scores in a string without brackets: "whole" for the noun phrases of a caption, "dots" for
                the pieces between dots, "auto" for dots in a dotted list and noun phrases in all else.
            classes_per_prompt: so many names of a list in each chunk (officially 40 for LVIS); None fills prompts.

        Raises:
            PromptError: an empty prompt, duplicate classes, a caption without a noun, a caption of more than 256
                tokens, ...
            MissingPackage: finding noun phrases needs the extra `captions`.
            OptionError: `phrases` is none of the three; `classes_per_prompt` is below 1, or the prompt is no list.
        """
        # A loop may give `detect` the same text with every frame, and reading a thousand names takes tens of ms.
        key = (type(text), tuple(text) if isinstance(text, list) else text, str(phrases), classes_per_prompt)
        try:
            known = self._recent.get(key)
        except TypeError:  # what cannot be hashed is read again
            return self._read(text, phrases, classes_per_prompt)
        if known is None:
            known = self._read(text, phrases, classes_per_prompt)
            if len(self._recent) >= _RECENT:
                self._recent.clear()
            self._recent[key] = known
        return known

    def _read(self, text: PromptText | Prompt, phrases: Phrases | str, classes_per_prompt: int | None) -> EncodedPrompt:
        limit = self.bundle.max_tokens
        if isinstance(text, Sequence) and not isinstance(text, str | bytes | bytearray):
            prompts = parse_chunks(
                text, self._tokenizer, phrases=phrases, max_tokens=limit, classes_per_prompt=classes_per_prompt
            )
            encoded = [self._encode(prompt) for prompt in prompts]
            if len(encoded) == 1:
                return encoded[0]
            self._warn_of_chunks(sum(map(len, prompts)), len(prompts))
            return ChunkedPrompt(encoded)
        if classes_per_prompt is not None:
            raise OptionError(
                f"classes_per_prompt is {classes_per_prompt}, but the prompt is no list of names; leave it out"
            )
        if not isinstance(text, Prompt):
            text = parse_prompt(text, self._tokenizer, phrases=phrases, max_tokens=limit)
        return self._encode(text)

    def _encode(self, prompt: Prompt) -> EncodedPrompt:
        embedding = self._cache.get(prompt.embedding_key)
        if embedding is None or embedding.shape[0] != prompt.input_ids.shape[0]:
            embedding = self.backend.encode_text(prompt.input_ids)
            embedding.setflags(write=False)  # as one from the cache is
            self._cache.put(prompt.embedding_key, embedding)
        return EncodedPrompt(prompt, embedding)

    def _warn_of_chunks(self, classes: int, prompts: int) -> None:
        if not self._warned:
            self._warned = True
            _log.warning(
                "%d classes are looked for in %d prompts; scores of classes in different prompts are not calibrated"
                " against each other, so that one threshold may suit some better than others",
                classes,
                prompts,
            )

    def detect(
        self,
        frame: NDArray[Any] | Any,
        prompt: EncodedPrompt | PromptText | Prompt,
        threshold: Threshold = 0.5,
        *,
        color: str,
        max_detections: int | None = None,
        timings: MutableMapping[FrameStep, float] | None = None,
    ) -> Detections:
        """Find what the prompt names in one frame.

        Args:
            frame: (H, W, 3) uint8; gray, alpha and 16 bit are converted. With TensorRT also one that is in GPU
                memory already ((H, W, 3 or 4) uint8 with `__dlpack__` or a `__cuda_array_interface__`: PyTorch, CuPy,
                PyCUDA), which is resized there, exactly within one gray level. In NV12, in either memory,
                (H * 3 / 2, W), or a pair of planes (H, W) and (H / 2, W / 2, 2).
            prompt: from `encode`; anything `encode` takes is encoded first (at no cost the second time).
            threshold: scores must exceed it: one number, one per class, or a mapping from phrase to number.
            color: "bgr" (OpenCV), "rgb" (Pillow, PyAV) or "nv12" (video decoders; see `Color`). There is no default:
                the wrong one still gives boxes, only worse ones.
            max_detections: keep so many at most; None for the bundle's number, 100 (officially 300 for LVIS).
            timings: filled with the seconds that each `FrameStep` of this call took, for measurements.

        Returns:
            At most `max_detections`, best first, boxes in pixels of `frame`. The backbone runs once, also for a prompt
            of several chunks; suppression within a class and the limit are over all chunks.
        """
        return self.detect_batch(
            [frame], prompt, threshold, color=color, max_detections=max_detections, timings=timings
        )[0]

    def detect_prompts(
        self,
        frame: NDArray[Any] | Any,
        prompts: Sequence[EncodedPrompt | PromptText | Prompt],
        threshold: float | Sequence[Threshold] = 0.5,
        *,
        color: str,
        max_detections: int | None = None,
        timings: MutableMapping[FrameStep, float] | None = None,
    ) -> list[Detections]:
        """Find what each of several prompts names in one frame, running the backbone once.

        Args:
            frame: as `detect` takes it.
            prompts: each as `detect` takes it.
            threshold: one number for all, or for each prompt what `detect` takes.
            color: as `detect` takes it.
            max_detections: for each prompt, as `detect` takes it.
            timings: as `detect` takes it; filled for all prompts together.

        Returns:
            The detections of each prompt, with labels that are places in that prompt.

        Raises:
            PromptError: no prompts, or one prompt that is not in a list.
            OptionError: thresholds that are not one for each prompt.
        """
        if isinstance(prompts, str | EncodedPrompt | Prompt | Caption):
            raise PromptError("detect_prompts takes a list of prompts; put the prompt into a list, or use detect")
        if not len(prompts):
            raise PromptError("detect_prompts was given an empty list of prompts; give at least one")
        limits = thresholds_of_prompts(threshold, len(prompts))
        found = self._detect([frame], prompts, limits, color, max_detections, timings)
        return [of_prompt[0] for of_prompt in found]

    def detect_batch(
        self,
        frames: Sequence[NDArray[Any] | Any],
        prompt: EncodedPrompt | PromptText | Prompt,
        threshold: Threshold = 0.5,
        *,
        color: str,
        max_detections: int | None = None,
        timings: MutableMapping[FrameStep, float] | None = None,
    ) -> list[Detections]:
        """Find what the prompt names in several frames at once; see `detect`.

        All share one canvas, as large as the largest. GLIP sees padding (it is never masked), so frames of unequal
        shape give slightly other scores together than alone; frames of one shape do not.
        """
        if not len(frames):
            return []
        return self._detect(frames, [prompt], [threshold], color, max_detections, timings)[0]

    def _detect(
        self,
        frames: Sequence[NDArray[Any] | Any],
        prompts: Sequence[EncodedPrompt | PromptText | Prompt],
        threshold: Sequence[Threshold],
        color: str,
        max_detections: int | None,
        timings: MutableMapping[FrameStep, float] | None,
    ) -> list[list[Detections]]:
        """Return the detections by prompt and frame."""
        if max_detections is not None:
            check_whole("max_detections", max_detections, 1)
        encoded = [prompt if isinstance(prompt, EncodedPrompt) else self.encode(prompt) for prompt in prompts]
        limits = [thresholds(one.phrases, limit) for one, limit in zip(encoded, threshold, strict=True)]
        clock = _Clock(timings)
        canvas = network_canvas(
            frames,
            color=color,
            shortest_side=self.shortest_side,
            longest_side=self.longest_side,
            method=self.resize,
        )
        clock.lap(FrameStep.RESIZE)
        chunks = [chunk for one in encoded for chunk in one.chunks]
        inputs = (
            ImageInputs.of(canvas.pixels, canvas.image_sizes, chunk.embedding, chunk.prompt.class_map)
            for chunk in chunks
        )
        found = [self.backend.detect(next(inputs))] if len(chunks) == 1 else self.backend.detect_prompts(inputs)
        clock.lap(FrameStep.IMAGE)
        by_chunk = iter(found)
        detections = [
            select_batch(
                Candidates.joined([next(by_chunk) for _ in one.chunks], [len(chunk.prompt) for chunk in one.chunks]),
                canvas.image_sizes,
                canvas.original_sizes,
                thresholds=limit,
                phrases=one.phrases,
                nms_threshold=self.bundle.nms_iou,
                max_detections=max_detections or self.bundle.max_detections,
            )
            for one, limit in zip(encoded, limits, strict=True)
        ]
        clock.lap(FrameStep.SELECT)
        return detections

    def close(self) -> None:
        """Free the engine's memory; a context manager does it too."""
        self.backend.close()

    def __enter__(self) -> Detector:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
