"""The server's own source: read once, at its own pace, in a circle; lost and found again."""

from __future__ import annotations

import asyncio
import io
import threading
import time

import numpy as np
import pytest
from PIL import Image

from glip_deploy.errors import SourceError, SourceLost
from glip_deploy.serve import sources
from glip_deploy.serve.sources import SharedSource
from glip_deploy.video.base import Frame, Source

pytest.importorskip("av", reason="PyAV is not installed (extra video)")


@pytest.fixture
def clip(tmp_path):
    """Ten frames, a second long; frame n is gray 20 * n."""
    from glip_deploy import Detections
    from glip_deploy.video.video_out import VideoSink

    path = tmp_path / "clip.mp4"
    with VideoSink(path, fps=10) as sink:
        for index in range(10):
            sink.write(Frame(np.full((64, 96, 3), 20 * index, np.uint8), "clip", index), Detections.empty())
    return path


class Fake(Source):
    """A live source that gives what it is told to."""

    is_live = is_video = True
    name = "camera 7"
    opened = 0

    def __init__(self, script):
        super().__init__()
        self.script = script

    def __iter__(self):
        for step in self.script:
            if isinstance(step, Exception):
                raise step
            if isinstance(step, threading.Event):
                step.wait(20)
                return
            time.sleep(0.01)
            yield Frame(np.full((8, 8, 3), step, np.uint8), self.name, step)

    def close(self):
        pass


@pytest.fixture
def live(monkeypatch):
    """Replaces what is opened by scripts of live sources, the first of which is opened by `check`."""

    def use(*scripts):
        left = list(scripts)
        monkeypatch.setattr(sources, "_RETRY_S", 0.05)

        def opened(spec, **options):
            script = left.pop(0) if len(left) > 1 else left[0]
            if isinstance(script, Exception):
                raise script
            return Fake(script)

        monkeypatch.setattr("glip_deploy.video.open.open_source", opened)

    return use


def run(work):
    return asyncio.run(asyncio.wait_for(work, 30))


async def frames_of(source, count, number=0):
    found = []
    while len(found) < count:
        frame = await source.newer(number)
        if frame is not None:
            found.append(frame)
            number = frame.number
    return found


def gray(frame):
    return round(float(frame.image.mean()) / 20)


def test_who_stops_waiting_stops_also_when_a_frame_comes_at_that_moment():
    """Otherwise what is ended goes on, and a visitor gets every frame twice."""

    async def work(steps):
        source = SharedSource("7")
        waiting = asyncio.create_task(source.newer(0))
        for _ in range(5):
            await asyncio.sleep(0)
        await source._publish(None, Frame(np.zeros((8, 8, 3), np.uint8), "camera 7", 0), 0.0, "")
        for _ in range(steps):
            await asyncio.sleep(0)
        ended = waiting.cancel()
        [answer] = await asyncio.gather(waiting, return_exceptions=True)
        return ended, isinstance(answer, asyncio.CancelledError)

    moments = [run(work(steps)) for steps in range(8)]
    assert [ended for ended, _ in moments].count(True) > 0
    assert all(obeyed == ended for ended, obeyed in moments), moments


def test_a_video_plays_at_its_own_pace_and_starts_again(clip):
    async def work():
        source = SharedSource(str(clip))
        source.check()
        with source.watched():
            began = time.monotonic()
            found = await frames_of(source, 14)
            taken = time.monotonic() - began
        source.close()
        return found, taken

    found, taken = run(work())
    assert [gray(frame) for frame in found] == [*range(10), *range(4)]
    assert [frame.index for frame in found] == [*range(10), *range(4)]
    assert [frame.number for frame in found] == list(range(1, 15))
    assert taken > 1.0, "14 frames at ten a second, with a circle that closes at once, take 1.2 s"


def test_who_comes_late_gets_the_newest_frame(clip):
    async def work():
        source = SharedSource(str(clip))
        source.check()
        with source.watched():
            await asyncio.sleep(0.65)
            frame = await source.newer(0)
        source.close()
        return frame

    assert run(work()).index >= 4


def test_a_video_stands_still_while_nobody_watches(clip):
    async def work():
        source = SharedSource(str(clip))
        source.check()
        with source.watched():
            before = (await frames_of(source, 3))[-1]
        await asyncio.sleep(0.6)
        with source.watched():
            after = (await frames_of(source, 2, before.number))[-1]
        source.close()
        return before, after

    before, after = run(work())
    assert after.index - before.index in (2, 3), "it goes on where it was, or with the frame that was ready then"


def test_two_watch_one_reader(clip, monkeypatch):
    import glip_deploy.video.open as module

    opened, real = [], module.open_source
    monkeypatch.setattr(module, "open_source", lambda *a, **k: opened.append(1) or real(*a, **k))

    async def work():
        source = SharedSource(str(clip))
        source.check()
        opened.clear()
        with source.watched(), source.watched():
            one, other = await asyncio.gather(source.newer(0), source.newer(0))
            jpegs = await asyncio.gather(one.jpeg(), other.jpeg())
        source.close()
        return one is other, jpegs

    same, (first, second) = run(work())
    assert same
    assert first is second, "a frame is compressed once for all"
    assert len(opened) == 1
    assert Image.open(io.BytesIO(first)).size == (96, 64)


def test_a_large_frame_is_shown_smaller():
    data = sources._jpeg_of(np.zeros((1080, 1920, 3), np.uint8))
    assert Image.open(io.BytesIO(data)).size == (1280, 720)


def test_a_camera_that_vanishes_is_reported_and_comes_back(live):
    live([1], [1, 2, SourceLost("camera 7: lost after 2 frames (No such device)")], [3, threading.Event()])

    async def work():
        source = SharedSource("7")
        source.check()
        said = []
        with source.watched():
            number = 0
            while number < 3:
                frame = await source.newer(number)
                number = number if frame is None else frame.number
                if source.trouble not in said:
                    said.append(source.trouble)
        source.close()
        return said, source.name

    said, name = run(work())
    assert name == "camera 7"
    assert said == ["", "camera 7: lost after 2 frames (No such device)"]


def test_a_camera_that_falls_silent_is_reported(live, monkeypatch):
    monkeypatch.setattr(sources, "_PATIENCE_S", 0.2)
    hang = threading.Event()
    live([1], [1, hang])

    async def work():
        source = SharedSource("7", timeout=0.3)
        source.check()
        with source.watched():
            await frames_of(source, 1)
            assert await source.newer(1) is None
            trouble = source.trouble
        source.close()
        return trouble

    try:
        trouble = run(work())
    finally:
        hang.set()
    assert trouble.startswith("camera 7: no frame for 0.5 s; check that the camera is plugged in")


def test_a_camera_is_closed_while_nobody_watches(live):
    live([1], list(range(10_000)))

    async def work():
        source = SharedSource("7")
        source.check()
        with source.watched():
            await frames_of(source, 2)
            thread = source._reader._thread
        await asyncio.to_thread(thread.join, 10)
        ended = not thread.is_alive()
        with source.watched():
            again = await frames_of(source, 1)
        source.close()
        return ended, again[0].index

    ended, index = run(work())
    assert ended
    assert index == 0, "the frame of last time is not shown again"


def test_pictures_are_shown_one_after_the_other(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "_PICTURE_S", 0.05)
    for index in range(3):
        Image.new("RGB", (20, 10), (20 * index,) * 3).save(tmp_path / f"{index}.png")

    async def work():
        source = SharedSource(str(tmp_path))
        source.check()
        with source.watched():
            found = await frames_of(source, 5)
        source.close()
        return [gray(frame) for frame in found]

    assert run(work()) == [0, 1, 2, 0, 1]


def test_a_source_that_is_not_there_is_refused_at_the_start(tmp_path):
    with pytest.raises(SourceError, match=r"source .*nothing\.mp4 does not exist; give a picture, a folder"):
        SharedSource(str(tmp_path / "nothing.mp4")).check()
