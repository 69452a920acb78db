"""The queue before a detector: what goes together, what waits, what is refused, and what a client's leaving does."""

from __future__ import annotations

import asyncio
import threading

import numpy as np
import pytest

from glip_deploy.detector import Detector, EncodedPrompt, FrameStep
from glip_deploy.errors import BackendError, ClosedError
from glip_deploy.prompts.tokens import Prompt
from glip_deploy.results.detections import Detections
from glip_deploy.serve.errors import QueueFull
from glip_deploy.serve.models import Model, Places

SMALL, LARGE = np.zeros((4, 6, 3), np.uint8), np.zeros((8, 6, 3), np.uint8)


def prompt(*names):
    ids = np.arange(2 + len(names), dtype=np.int64)
    return EncodedPrompt(Prompt(". ".join(names), names, ids, tuple((i + 1,) for i in range(len(names)))), np.zeros(1))


def limits(*numbers):
    return [np.array(numbers, np.float32)]


class Scripted:
    """A detector that finds boxes of scores 0.3, 0.5, 0.7 and 0.9 in every frame, once `go` is set, and notes calls."""

    def __init__(self, most=100):
        self.go, self.begun, self.calls, self.most = threading.Event(), threading.Event(), [], most
        self.closed = 0

    def clone(self):
        return self

    def close(self):
        self.closed += 1

    def detect_batch(self, frames, encoded, threshold, *, color, max_detections, timings):
        self.begun.set()
        assert self.go.wait(60)
        self.calls.append((len(frames), encoded.phrases, threshold))
        if len(frames) > self.most:
            raise BackendError("too many frames")
        timings[FrameStep.IMAGE] = 0.01
        scores = np.array([0.3, 0.5, 0.7, 0.9], np.float32)
        found = Detections(np.zeros((4, 4)), scores, np.zeros(4, np.int64), [encoded.phrases[0]] * 4)
        return [found[found.scores > threshold[0]] for _ in frames]

    def detect_prompts(self, frame, encoded, thresholds, *, color, max_detections, timings):
        return [
            self.detect_batch([frame], one, limit, color=color, max_detections=max_detections, timings=timings)[0]
            for one, limit in zip(encoded, thresholds, strict=True)
        ]


async def until(condition):
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.005)


def run(body, *, most=100, **options):
    """Run `body(model, scripted)` in an event loop; the first frame keeps the detector busy until `go` is set."""
    scripted = Scripted(most)
    model = Model("scripted", scripted, **options)
    try:
        return asyncio.run(body(model, scripted)), scripted
    finally:
        scripted.go.set()
        model.close()


async def busy(model, scripted):
    task = asyncio.create_task(model.detect(SMALL, [prompt("first")], limits(0.5)))
    await until(scripted.begun.is_set)
    return task


def test_frames_that_wait_with_the_same_prompt_go_together():
    async def body(model, scripted):
        first = await busy(model, scripted)
        asked = [
            asyncio.create_task(model.detect(image, [one], limits(limit)))
            for image, one, limit in (
                (SMALL, prompt("dog"), 0.6),
                (SMALL, prompt("bus"), 0.6),
                (LARGE, prompt("dog"), 0.6),  # another size: GLIP sees padding
                (SMALL, prompt("dog"), 0.4),
                (SMALL, prompt("dog"), 0.8),
            )
        ]
        await until(lambda: model.waiting == 5)
        scripted.go.set()
        await first
        return [await one for one in asked]

    found, scripted = run(body, batch_size=4)
    assert [call[:2] for call in scripted.calls] == [(1, ("first",)), (3, ("dog",)), (1, ("bus",)), (1, ("dog",))]
    assert scripted.calls[1][2] == pytest.approx([0.4])
    # Each gets what its own threshold leaves, as it would alone.
    assert [one.detections[0].scores.tolist() for one in found] == [
        pytest.approx(scores) for scores in ([0.9, 0.7], [0.9, 0.7], [0.9, 0.7], [0.9, 0.7, 0.5], [0.9])
    ]
    assert [one.batch for one in found] == [3, 1, 1, 3, 3]
    assert all(one.ms["queue"] > 0 and one.ms["image branch"] == pytest.approx(10) for one in found)


def test_batches_are_limited_in_size():
    async def body(model, scripted):
        first = await busy(model, scripted)
        asked = [asyncio.create_task(model.detect(SMALL, [prompt("dog")], limits(0.5))) for _ in range(5)]
        await until(lambda: model.waiting == 5)
        scripted.go.set()
        await asyncio.gather(first, *asked)

    _, scripted = run(body, batch_size=2)
    assert [call[0] for call in scripted.calls] == [1, 2, 2, 1]


def test_a_frame_waits_for_others_as_long_as_it_was_told():
    async def body(model, scripted):
        scripted.go.set()
        first = asyncio.create_task(model.detect(SMALL, [prompt("dog")], limits(0.5)))
        await until(lambda: model.waiting == 0)
        assert not scripted.begun.is_set()
        second = asyncio.create_task(model.detect(SMALL, [prompt("dog")], limits(0.5)))
        return [(await one).batch for one in (first, second)]

    found, _ = run(body, batch_size=2, batch_wait=60.0)
    assert found == [2, 2]


def test_a_batch_that_fails_is_looked_at_frame_by_frame():
    async def body(model, scripted):
        first = await busy(model, scripted)
        asked = [asyncio.create_task(model.detect(SMALL, [prompt("dog")], limits(0.5))) for _ in range(3)]
        await until(lambda: model.waiting == 3)
        scripted.go.set()
        await first
        return [(await one).batch for one in asked]

    found, scripted = run(body, most=1, batch_size=4)
    assert found == [1, 1, 1]
    assert [call[0] for call in scripted.calls] == [1, 3, 1, 1, 1]


def test_an_error_is_the_answer_and_the_next_frame_is_looked_at():
    async def body(model, scripted):
        scripted.go.set()
        with pytest.raises(BackendError, match="too many frames"):
            await model.detect(SMALL, [prompt("dog")], limits(0.5))
        scripted.most = 1
        return await model.detect(SMALL, [prompt("dog")], limits(0.5))

    found, _ = run(body, most=0)
    assert found.batch == 1


def test_a_frame_that_nobody_waits_for_any_more_is_not_looked_at():
    async def body(model, scripted):
        first = await busy(model, scripted)
        second = asyncio.create_task(model.detect(SMALL, [prompt("dog")], limits(0.5)))
        await until(lambda: model.waiting == 1)
        second.cancel()
        await until(lambda: model.waiting == 0)
        scripted.go.set()
        await first
        with pytest.raises(asyncio.CancelledError):
            await second

    _, scripted = run(body)
    assert [call[1] for call in scripted.calls] == [("first",)]


def test_a_full_queue_refuses_and_says_when_to_ask_again():
    async def body(model, scripted):
        first = await busy(model, scripted)
        second = asyncio.create_task(model.detect(SMALL, [prompt("dog")], limits(0.5)))
        await until(lambda: model.waiting == 1)
        with pytest.raises(QueueFull, match=r"under way as this server takes \(1\); ask again in 1 s") as error:
            await model.detect(SMALL, [prompt("dog")], limits(0.5))
        assert error.value.status == 429
        assert 1 <= int(error.value.headers["Retry-After"]) <= 60
        scripted.go.set()
        await asyncio.gather(first, second)

    run(body, queue_size=1)


def test_the_live_page_does_not_wait_behind_all_requests():
    async def body(model, scripted):
        first = await busy(model, scripted)
        asked = [asyncio.create_task(model.detect(SMALL, [prompt("dog")], limits(0.5))) for _ in range(3)]
        await until(lambda: model.waiting == 3)
        live = asyncio.create_task(model.detect_prompts(SMALL, [prompt("live"), prompt("two")], limits(0.5) * 2))
        await until(lambda: model.waiting == 4)
        scripted.go.set()
        await asyncio.gather(first, *asked)
        return await live

    (found, ms), scripted = run(body)
    assert [call[1][0] for call in scripted.calls] == ["first", "live", "two", "dog", "dog", "dog"]
    assert [one.phrases[0] for one in found] == ["live", "two"] and "queue" in ms


def test_closing_refuses_what_waits_and_finishes_what_runs():
    async def body(model, scripted):
        first = await busy(model, scripted)
        second = asyncio.create_task(model.detect(SMALL, [prompt("dog")], limits(0.5)))
        await until(lambda: model.waiting == 1)
        closing = asyncio.create_task(asyncio.to_thread(model.close))
        with pytest.raises(ClosedError, match="the server is ending"):
            await second
        scripted.go.set()
        await closing
        with pytest.raises(ClosedError):
            await model.detect(SMALL, [prompt("dog")], limits(0.5))
        return await first

    found, scripted = run(body)
    assert len(found.detections[0]) == 2
    assert scripted.closed >= 1


def test_places_are_given_back():
    places = Places(1, [])
    with places.place():
        assert places.taken == 1
    with pytest.raises(ZeroDivisionError), places.place():
        raise ZeroDivisionError
    assert places.taken == 0


def test_batches_find_what_single_frames_do(tiny_bundle):
    """With real frames: other thresholds in one batch change nothing."""
    frames = [np.random.default_rng(seed).integers(0, 255, (40, 60, 3), np.uint8) for seed in range(3)]
    numbers = (0.05, 0.3, 0.1)
    with Detector.open(tiny_bundle, shortest_side=48, cache_dir=None) as detector:
        dog = detector.encode("dog. bus")
        alone = [
            detector.detect(frame, dog, number, color="rgb") for frame, number in zip(frames, numbers, strict=True)
        ]

        async def body(model):
            tasks = [
                asyncio.create_task(model.detect(frame, [dog], [np.full(2, number, np.float32)]))
                for frame, number in zip(frames, numbers, strict=True)
            ]
            return [await task for task in tasks]

        model = Model("tiny", detector.clone(), batch_size=3, batch_wait=60.0)
        together = asyncio.run(body(model))
        model.close()
    assert [one.batch for one in together] == [3, 3, 3]
    assert sum(map(len, alone)) > 3
    for one, other in zip(alone, together, strict=True):
        assert one.labels.tolist() == other.detections[0].labels.tolist()
        np.testing.assert_allclose(one.boxes, other.detections[0].boxes, atol=0.1)
        np.testing.assert_allclose(one.scores, other.detections[0].scores, atol=1e-3)
