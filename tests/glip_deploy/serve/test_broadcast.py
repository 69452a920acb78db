"""One model at the server's source: the backbone once for all who watch, each with a prompt of his own."""

from __future__ import annotations

import asyncio
import time

import numpy as np
import pytest

from glip_deploy import Detections
from glip_deploy.errors import BackendError
from glip_deploy.prompts.encoded import EncodedPrompt
from glip_deploy.prompts.tokens import Prompt
from glip_deploy.serve.broadcast import Broadcast, Taken
from glip_deploy.serve.sources import SharedFrame


def encoded(*phrases):
    ids = np.arange(len(phrases) + 2)
    prompt = Prompt(". ".join(phrases), phrases, ids, tuple((place + 1,) for place in range(len(phrases))))
    return EncodedPrompt(prompt, np.zeros((len(ids), 4), np.float32))


def taken(id, *phrases, threshold=0.5):
    return Taken(id, encoded(*phrases), np.full(len(phrases), threshold, np.float32))


class Endless:
    """A source with a new frame every few milliseconds."""

    name, trouble = "yard.mp4", ""

    def __init__(self, every=0.005):
        self.every, self.began, self.watching = every, time.monotonic(), 0

    def watched(self):
        from contextlib import contextmanager

        @contextmanager
        def watched():
            self.watching += 1
            try:
                yield
            finally:
                self.watching -= 1

        return watched()

    async def newer(self, number):
        while (newest := 1 + int((time.monotonic() - self.began) / self.every)) <= number:
            await asyncio.sleep(self.every / 5)
        return SharedFrame(
            newest, np.zeros((16, 16, 3), np.uint8), newest - 1, time.monotonic(), (newest - 1) * self.every
        )


class Model:
    """Finds one box a class, with scores 0.9, 0.7, 0.5, ...; remembers what it was asked."""

    name = "glip"

    def __init__(self, seconds=0.01, error=None):
        self.asked, self.seconds, self.error = [], seconds, error

    async def detect_prompts(self, image, prompts, thresholds, **options):
        self.asked.append(([one.phrases for one in prompts], [limit.tolist() for limit in thresholds]))
        await asyncio.sleep(self.seconds)
        if self.error is not None:
            raise self.error
        answers = []
        for one, limit in zip(prompts, thresholds, strict=True):
            count = len(one.phrases)
            scores = 0.9 - 0.2 * np.arange(count, dtype=np.float32)
            boxes = np.zeros((count, 4), np.float32)
            found = Detections(boxes, scores, np.arange(count), list(one.phrases))
            answers.append(found[found.scores > np.asarray(limit)[found.labels]])
        return answers, {"image branch": 1000 * self.seconds}


class Visitor:
    def __init__(self, prompt=None, room=1_000_000, tracks=None):
        self.taken, self.room, self.dropped, self.last_number = prompt, room, 0, 0
        self.tracks = tracks
        self.seen, self.told, self.ids = [], [], []

    @property
    def ready(self):
        return len(self.seen) < self.room

    def show(self, frame, jpeg, taken, found, ms):
        assert jpeg.startswith(b"\xff\xd8")
        self.seen.append((frame.number, None if taken is None else taken.id, found.phrases))
        self.ids.append(found.track.tolist())
        self.ms = ms

    def tell(self, message):
        self.told.append(message)


def watch(model, *visitors, seconds=0.5, meanwhile=None, source=None):
    async def work():
        looking = Broadcast(model, source or Endless())
        for visitor in visitors:
            looking.add(visitor)
        if meanwhile is not None:
            await meanwhile(looking)
        await asyncio.sleep(seconds)
        for visitor in visitors:
            looking.remove(visitor)
        await asyncio.sleep(0)

    asyncio.run(work())


def test_the_model_is_asked_once_a_frame_for_all_prompts():
    one, other = Visitor(taken(1, "dog", "cat")), Visitor(taken(7, "bus"))
    model = Model()
    watch(model, one, other)
    assert len(model.asked) >= 5
    assert all(sorted(prompts) == [("bus",), ("dog", "cat")] for prompts, _ in model.asked)
    assert {entry[1:2] for entry in one.seen} == {(1,)}
    assert all(found == ["dog", "cat"] for _, _, found in one.seen)
    assert all(found == ["bus"] for _, _, found in other.seen)
    assert [number for number, *_ in one.seen] == [number for number, *_ in other.seen]


def test_one_prompt_with_two_thresholds_is_asked_once_and_answers_both():
    low, high = Visitor(taken(1, "dog", "cat", threshold=0.5)), Visitor(taken(1, "dog", "cat", threshold=0.8))
    model = Model()
    watch(model, low, high)
    assert all(prompts == [("dog", "cat")] and limits == [[0.5, 0.5]] for prompts, limits in model.asked)
    assert all(found == ["dog", "cat"] for _, _, found in low.seen)
    assert all(found == ["dog"] for _, _, found in high.seen)


def test_who_is_slow_stalls_nobody_and_gets_a_newer_frame_later():
    slow, quick = Visitor(taken(1, "dog"), room=1), Visitor(taken(2, "bus"))

    async def later(looking):
        await asyncio.sleep(0.4)
        slow.room = 2
        looking.wake()

    watch(Model(), slow, quick, meanwhile=later, seconds=0.2)
    assert len(slow.seen) == 2
    assert len(quick.seen) > 10
    (first, *_), (second, *_) = slow.seen
    assert second - first > 20, "the frames in between are not kept for him"
    assert slow.dropped == second - first - 1


def test_without_a_prompt_the_picture_alone_is_sent():
    visitor, model = Visitor(), Model()
    watch(model, visitor)
    assert not model.asked
    assert len(visitor.seen) > 10
    assert all(entry[1:] == (None, []) for entry in visitor.seen)


def test_a_prompt_takes_effect_with_the_next_frame():
    visitor = Visitor(taken(1, "dog"))
    at = []

    async def change(looking):
        await asyncio.sleep(0.2)
        at.append(len(visitor.seen))
        visitor.taken = taken(2, "bus")

    watch(Model(), visitor, meanwhile=change, seconds=0.2)
    ids = [entry[1] for entry in visitor.seen]
    assert ids[: at[0]] == [1] * at[0]
    assert ids[at[0] :].count(1) <= 1, "the frame that was being looked at"
    assert ids[-1] == 2


def test_many_prompts_take_turns():
    visitors = [Visitor(taken(index, f"thing {index}")) for index in range(20)]
    model = Model(0.002)
    watch(model, *visitors, seconds=1.0)
    assert max(len(prompts) for prompts, _ in model.asked) == 8
    counts = [len(visitor.seen) for visitor in visitors]
    assert min(counts) >= 3
    assert max(counts) - min(counts) <= 2


def test_an_error_is_told_and_looking_goes_on(monkeypatch):
    monkeypatch.setattr("glip_deploy.serve.broadcast._AFTER_ERROR_S", 0.01)
    visitor, model = Visitor(taken(1, "dog")), Model(error=BackendError("the engine failed; open it again"))

    async def recover(looking):
        await asyncio.sleep(0.1)
        model.error = None

    watch(model, visitor, meanwhile=recover)
    assert visitor.told[0] == {
        "type": "error", "about": "frame", "id": None, "message": "the engine failed; open it again",
    }  # fmt: skip
    assert len(visitor.seen) > 5


def test_the_source_is_read_only_while_somebody_watches():
    source = Endless()
    visitor = Visitor()

    async def check(looking):
        await asyncio.sleep(0.05)
        assert source.watching == 1

    watch(Model(), visitor, meanwhile=check, source=source)
    assert source.watching == 0


SHOWN = (*range(0, 400, 50), 900, 1400)
"""Milliseconds at which the frames of `Passing` are."""


class Passing(Endless):
    """A source of 20 frames a second, of which most are lost: half a second passes between the ones that come."""

    async def newer(self, number):
        if number == len(SHOWN):
            await asyncio.sleep(60)
        at = SHOWN[number] / 1000
        return SharedFrame(number + 1, np.full((16, 16, 3), number, np.uint8), number, time.monotonic(), at)


class Mover(Model):
    """Finds a box 20 pixels wide that moves by 100 pixels a second, and whose score dips in the fifth frame."""

    async def detect_prompts(self, image, prompts, thresholds, **options):
        self.asked.append([limit.tolist() for limit in thresholds])
        number = int(image[0, 0, 0])
        x = SHOWN[number] / 10
        score = np.array([0.3 if number == 4 else 0.9], np.float32)
        found = Detections(np.array([[x, 0, x + 20, 20]], np.float32), score, np.zeros(1, int), ["dog"])
        return [found[found.scores > limit[0]] for limit in thresholds], {}


@pytest.fixture
def tracks():
    pytest.importorskip("trackers", reason="the package trackers is not installed (extra track)")
    from glip_deploy.serve.tracks import Tracks

    return Tracks


def test_each_visitor_has_ids_of_his_own_that_outlast_dropped_frames_and_dips(tracks):
    usual, strict, plain = (
        Visitor(taken(1, "dog"), tracks=tracks()),
        Visitor(taken(1, "dog", threshold=0.8), tracks=tracks()),
        Visitor(taken(1, "dog")),
    )
    model = Mover()
    watch(model, usual, strict, plain, source=Passing(), seconds=1.0)
    assert model.asked == [[[0.25]]] * len(SHOWN), "half of the lowest threshold, once for all"
    # Between the last three frames the box moves by 50 pixels, far beyond itself: only their true times tell.
    assert usual.ids == [[-1], [1], [1], [1], [], [1], [1], [1], [1], [1]]
    assert strict.ids == [[-1], [1], [1], [1], [], [1], [1], [1], [1], [1]]
    assert plain.ids == [[-1]] * 4 + [[]] + [[-1]] * 5
    assert [found for _, _, found in usual.seen] == [found for _, _, found in plain.seen], "the boxes are the same"
    assert usual.ms["tracking"] > 0


def test_in_another_stream_no_object_is_the_same_and_no_id_is_given_twice(tracks):
    own, prompt = tracks(), taken(1, "dog")
    box = Detections(np.array([[0, 0, 20, 20]], np.float32), np.array([0.9], np.float32), np.zeros(1, int), ["dog"])
    one, other = object(), object()
    given = [
        own.follow(box, prompt, stream, at).track.tolist()
        for stream, at in [(one, 0.0), (one, 0.1), (other, 0.2), (other, 0.3), (one, 0.4), (other, 0.5), (other, 0.6)]
    ]
    assert given == [[-1], [1], [-1], [2], [-1], [-1], [3]]


@pytest.mark.parametrize("trouble", ["camera 0: lost after 5 frames (No such device)"])
def test_trouble_with_the_source_is_told_to_all_and_to_who_comes_later(trouble):
    source = Endless()
    source.trouble = trouble
    visitor = Visitor()
    watch(Model(), visitor, source=source, seconds=0.1)
    assert visitor.told[0] == {"type": "source", "message": trouble}
