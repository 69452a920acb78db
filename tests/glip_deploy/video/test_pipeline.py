"""Reading, detection and writing at the same time: order, counts, overlap, and an orderly end after any error."""

import threading
import time

import numpy as np
import pytest

from glip_deploy.errors import GlipError, OptionError, OutputError, SourceLost
from glip_deploy.results.detections import Detections
from glip_deploy.video.base import Frame, Sink, Source
from glip_deploy.video.pipeline import RunSummary, detect_stream, run

WAIT = 10.0  # a generous bound, only ever reached by a failing test


class Numbers(Source):
    """`count` frames; frame i is a picture of value i."""

    name = "numbers"
    is_video = True
    fps = 10.0

    def __init__(self, count, *, fail_at=None, live=False, pace=0.0):
        super().__init__()
        self.count = count
        self.frame_count = count
        self.is_live = live
        self.fail_at = fail_at
        self.pace = pace
        self.given = 0
        self.closed = threading.Event()

    def __iter__(self):
        for i in range(self.count):
            if self.closed.wait(self.pace) if self.pace else self.closed.is_set():
                return
            if i == self.fail_at:
                raise GlipError(f"frame {i} is lost")
            self.given += 1
            yield Frame(np.full((4, 6, 3), i % 256, np.uint8), self.name, i, i / 10)

    def close(self):
        self.closed.set()


class Fake:
    """Finds one box a frame; calls `during(i)` while it does."""

    def __init__(self, during=lambda i: None):
        self.during = during
        self.seen = []

    def detect(self, frame, prompt, threshold=0.5, color="bgr"):
        assert color == "rgb" and prompt == "prompt" and threshold == 0.25
        i = int(frame[0, 0, 0])
        self.during(i)
        self.seen.append(i)
        return Detections(
            boxes=np.array([[0, 0, 2, 2]], np.float32),
            scores=np.array([0.5], np.float32),
            labels=np.array([0]),
            phrases=["x"],
        )


class Recorder(Sink):
    def __init__(self, during=lambda i: None, fail_on_exit=False):
        self.during = during
        self.fail_on_exit = fail_on_exit
        self.written = []
        self.events = []

    def __enter__(self):
        self.events.append("enter")
        return self

    def write(self, frame, detections):
        assert len(detections) == 1
        self.during(frame.index)
        self.written.append(frame.index)

    def __exit__(self, kind, error, trace):
        self.events.append(kind)
        if self.fail_on_exit:
            raise GlipError("cannot be completed")


@pytest.fixture(autouse=True)
def no_thread_is_left_behind():
    before = set(threading.enumerate())  # threads of other files' tests may end meanwhile
    yield
    deadline = time.monotonic() + WAIT
    while set(threading.enumerate()) - before and time.monotonic() < deadline:
        time.sleep(0.005)
    assert set(threading.enumerate()) <= before


def go(detector, source, sinks=(), **options):
    return run(detector, source, "prompt", sinks, threshold=0.25, **options)


def test_every_frame_is_detected_and_written_in_order():
    sinks = [Recorder(), Recorder()]
    shown = []
    source = Numbers(50)
    summary = go(Fake(), source, sinks, on_frame=lambda frame, found: shown.append(frame.index))
    assert isinstance(summary, RunSummary)
    assert sinks[0].written == sinks[1].written == shown == list(range(50))
    assert sinks[0].events == ["enter", None]
    assert (summary.frames, summary.detected, summary.objects) == (50, 50, 50)
    assert (summary.skipped, summary.dropped, summary.interrupted) == (0, 0, False)
    assert summary.seconds > 0 and summary.fps == pytest.approx(50 / summary.seconds)
    assert source.closed.is_set()


def test_the_prompt_may_change_while_the_video_runs():
    class ByPrompt(Fake):
        def detect(self, frame, prompt, threshold=0.5, color="bgr"):
            self.seen.append(prompt)
            return Detections.empty()

    def choose(frame):
        return "early" if frame.index < 2 else "late"

    detector = ByPrompt()
    run(detector, Numbers(4), choose)
    assert detector.seen == ["early", "early", "late", "late"]
    detector = ByPrompt()
    assert [frame.index for frame, _ in detect_stream(detector, Numbers(3), choose)] == [0, 1, 2]
    assert detector.seen == ["early", "early", "late"]


def test_unreadable_frames_are_in_the_summary():
    source = Numbers(3)
    source.skipped = 7
    assert go(Fake(), source).skipped == 7


def test_times_are_those_of_the_stages():
    summary = go(Fake(lambda i: time.sleep(0.02)), Numbers(5), [Recorder(lambda i: time.sleep(0.005))])
    assert 20 <= summary.inference.median_ms <= summary.inference.p95_ms
    assert 5 <= summary.writing.median_ms < summary.inference.median_ms
    assert summary.reading.median_ms < summary.inference.median_ms


def test_no_frames_at_all():
    summary = go(Fake(), Numbers(0), [Recorder()])
    assert (summary.frames, summary.detected, summary.fps) == (0, 0, 0.0)
    assert summary.inference.median_ms == 0


def test_reading_and_writing_go_on_during_inference():
    source = Numbers(10)
    recorder = Recorder()
    overlapped = []

    def during(i):
        if i != 3:
            return
        deadline = time.monotonic() + WAIT
        while time.monotonic() < deadline:  # inference of frame 3 does not end before these two have moved
            if source.given > 4 and recorder.written[-1:] == [2]:
                overlapped.append(True)
                return
            time.sleep(0.001)

    go(Fake(during), source, [recorder])
    assert overlapped == [True]


def test_a_slow_stage_bounds_what_is_read_ahead():
    source = Numbers(200)
    ahead = []
    recorder = Recorder()

    def during(i):
        time.sleep(0.001)
        ahead.append(source.given - i)

    go(Fake(during), source, [recorder], queue_size=2)
    assert max(ahead) <= 2 + 3  # two wait, one is on its way in, one in detection, one being counted
    assert recorder.written == list(range(200))

    source = Numbers(60)
    detector = Fake()
    behind = []
    recorder = Recorder(lambda i: (time.sleep(0.002), behind.append(len(detector.seen) - i)))
    go(detector, source, [recorder], queue_size=2)
    assert max(behind) <= 2 + 2
    assert recorder.written == list(range(60))


def test_a_live_source_drops_old_frames_and_counts_them():
    source = Numbers(100, live=True, pace=0.001)
    detector = Fake(lambda i: time.sleep(0.01))
    recorder = Recorder()
    summary = go(detector, source, [recorder])
    assert summary.dropped > 20
    assert summary.dropped + summary.detected == summary.frames == 100
    assert recorder.written == sorted(set(recorder.written))
    assert recorder.written[-1] == 99  # the newest is never the one to go


def test_a_silent_live_source_is_an_error(monkeypatch):
    from glip_deploy.video import pipeline as video

    monkeypatch.setattr(video, "_PATIENCE", 0.1)
    source = Numbers(5, live=True)
    source.timeout = 0.1

    def hang(self):
        yield Frame(np.zeros((4, 6, 3), np.uint8), "numbers", 0)
        self.closed.wait(WAIT)

    monkeypatch.setattr(Numbers, "__iter__", hang)
    recorder = Recorder()
    with pytest.raises(SourceLost, match=r"numbers: no frame for 0\.2 s"):
        go(Fake(), source, [recorder])
    assert recorder.written == [0]


def test_what_was_detected_before_the_source_failed_is_written():
    recorder = Recorder()
    detector = Fake()
    with pytest.raises(GlipError, match="frame 20 is lost") as caught:
        go(detector, Numbers(50, fail_at=20), [recorder])
    assert recorder.written == detector.seen == list(range(len(detector.seen)))
    assert recorder.events == ["enter", GlipError]
    assert caught.value.__cause__ is None


def test_what_was_detected_before_the_detector_failed_is_written():
    def during(i):
        if i == 5:
            raise GlipError("the engine is gone")

    recorder = Recorder()
    source = Numbers(10**6)
    with pytest.raises(GlipError, match="the engine is gone"):
        go(Fake(during), source, [recorder])
    assert recorder.written == [0, 1, 2, 3, 4]
    assert recorder.events == ["enter", GlipError]
    assert source.given < 20


@pytest.mark.parametrize("error", [GlipError("no space left"), BrokenPipeError(), ZeroDivisionError()])
def test_a_sink_that_fails_stops_everything(error):
    def during(i):
        if i == 5:
            raise error

    source = Numbers(10**6)
    detector = Fake()
    recorder = Recorder(during)
    with pytest.raises(type(error)):
        go(detector, source, [recorder])
    assert recorder.written == [0, 1, 2, 3, 4]
    assert recorder.events == ["enter", type(error)]
    assert len(detector.seen) < 20


def test_a_sink_that_fails_ends_the_wait_for_a_slow_source():
    def during(i):
        raise GlipError("no space left")

    class OneThenSlow(Numbers):
        def __iter__(self):
            yield Frame(np.zeros((4, 6, 3), np.uint8), self.name, 0)
            self.closed.wait(WAIT)

    start = time.monotonic()
    with pytest.raises(GlipError, match="no space left"):
        go(Fake(), OneThenSlow(2), [Recorder(during)])
    assert time.monotonic() - start < WAIT / 2


def test_a_sink_that_cannot_be_completed_is_an_error():
    with pytest.raises(GlipError, match="cannot be completed"):
        go(Fake(), Numbers(3), [Recorder(fail_on_exit=True)])


def test_sinks_are_exited_when_another_cannot_be_entered():
    class Closed(Recorder):
        def __enter__(self):
            raise GlipError("cannot be opened")

    first = Recorder()
    with pytest.raises(GlipError, match="cannot be opened"):
        go(Fake(), Numbers(3), [first, Closed()])
    assert first.events == ["enter", GlipError]


def test_ctrl_c_finishes_what_is_detected_and_says_so():
    def during(i):
        if i == 7:
            raise KeyboardInterrupt

    recorder = Recorder(lambda i: time.sleep(0.005))
    summary = go(Fake(during), Numbers(10**6), [recorder])
    assert summary.interrupted
    assert summary.detected == 7
    assert recorder.written == list(range(7))
    assert recorder.events == ["enter", None]


def test_ctrl_c_while_the_last_frames_are_written_still_completes(monkeypatch):
    from glip_deploy.video import pipeline as video

    finish = video._Writer.finish
    calls = []

    def interrupted_once(self):
        calls.append(1)
        if len(calls) == 1:
            raise KeyboardInterrupt
        finish(self)

    monkeypatch.setattr(video._Writer, "finish", interrupted_once)
    recorder = Recorder()
    assert go(Fake(), Numbers(5), [recorder]).interrupted
    assert recorder.written == [0, 1, 2, 3, 4]
    assert recorder.events == ["enter", None]


def test_a_second_ctrl_c_gives_up_but_never_leaves_a_sink_in_mid_write(monkeypatch):
    from glip_deploy.video import pipeline as video

    entered = threading.Event()
    release = threading.Event()

    def slow(i):
        entered.set()
        release.wait(WAIT)

    def during(i):
        if i == 2:
            entered.wait(WAIT)
            raise KeyboardInterrupt

    def interrupted(self):
        release.set()
        raise KeyboardInterrupt

    monkeypatch.setattr(video._Writer, "finish", interrupted)
    recorder = Recorder(slow)
    with pytest.raises(KeyboardInterrupt):
        go(Fake(during), Numbers(100), [recorder])
    assert recorder.written[0] == 0
    assert recorder.events == ["enter", KeyboardInterrupt]


@pytest.mark.parametrize("outputs", [("read",), ("new", "read"), ("new", "new")])
def test_an_output_that_is_read_or_written_twice_is_refused_before_anything_is_touched(tmp_path, outputs):
    class ToFile(Recorder):
        def __init__(self, path):
            super().__init__()
            self.path = path

        def outputs(self, source):
            return [self.path]

    source = Numbers(3)
    source.files = (tmp_path / "read",)
    source.files[0].write_text("x")
    sinks = [ToFile(tmp_path / name) for name in outputs]
    with pytest.raises(OutputError, match=r"is the source itself|is named twice"):
        go(Fake(), source, sinks)
    assert source.given == 0 and all(sink.events == [] for sink in sinks)


def test_detect_stream():
    out = list(detect_stream(Fake(), Numbers(20), "prompt", threshold=0.25))
    assert [frame.index for frame, _ in out] == list(range(20))
    assert all(len(found) == 1 for _, found in out)


def test_the_loop_over_detect_stream_can_end_early():
    source = Numbers(10**6)
    for frame, _ in detect_stream(Fake(), source, "prompt", threshold=0.25):
        if frame.index == 3:
            break
    assert source.given < 20


def test_detect_stream_raises_what_the_source_raised():
    with pytest.raises(GlipError, match="frame 0 is lost"):
        list(detect_stream(Fake(), Numbers(5, fail_at=0), "prompt", threshold=0.25))


@pytest.mark.parametrize("call", [run, lambda *a, **k: next(detect_stream(*a, **k))])
def test_queue_size_out_of_range(call):
    with pytest.raises(OptionError, match="queue_size is 0; it must be a whole number of at least 1"):
        call(Fake(), Numbers(1), "prompt", queue_size=0)
