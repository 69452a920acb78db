"""Tracks: an object keeps its id through a video, an id never goes to another phrase, and boxes stay as they are."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from selection import slow

from glip_deploy import Detector
from glip_deploy.errors import MissingPackage, OptionError
from glip_deploy.results.boxes import pairwise_iou
from glip_deploy.results.detections import NO_TRACK, Detections
from glip_deploy.video.base import Frame, Source
from glip_deploy.video.open import open_source
from glip_deploy.video.pipeline import detect_stream, run
from glip_deploy.video.tracking import WEAK, Tracker

pytest.importorskip("trackers", reason="trackers (extra track) is not installed", exc_type=ImportError)

MOVING = Path(__file__).parents[3] / "examples" / "nano" / "media" / "moving.mp4"
STEP = 0.1


def found(*boxes, phrases=("cat", "dog")):
    """Detections of (label, x, y, score) squares of 20 pixels."""
    return Detections(
        np.array([[x, y, x + 20, y + 20] for _, x, y, _ in boxes], np.float32).reshape(-1, 4),
        np.array([score for *_, score in boxes], np.float32),
        np.array([label for label, *_ in boxes], np.int64),
        [phrases[label] for label, *_ in boxes],
    )


def play(tracker, frames, *, phrases=("cat", "dog"), threshold=0.5, step=STEP, start=0.0):
    """The tracks of each frame, by label and place in x."""
    told = []
    for i, boxes in enumerate(frames):
        result = tracker.update(found(*boxes, phrases=phrases), phrases, threshold, time=start + i * step)
        order = np.lexsort((result.boxes[:, 0], result.labels))
        told.append(result.track[order].tolist())
    return told


def moving(x, speed, frames, label=0, score=0.9, y=50):
    return [[(label, x + speed * i, y, score)] for i in range(frames)]


def together(*lists):
    return [[box for boxes in frames for box in boxes] for frames in zip(*lists, strict=True)]


def test_an_object_gets_an_id_in_its_second_frame_and_keeps_it():
    tracker = Tracker(interval=STEP)
    assert play(tracker, moving(10, 8, 20)) == [[-1], *[[1]] * 19]
    assert tracker.count == 1


def test_objects_that_cross_keep_their_ids():
    tracker = Tracker(interval=STEP)
    right, left = moving(0, 6, 20, y=50), moving(120, -6, 20, y=62)
    tracks = [
        tracker.update(found(*boxes), ("cat", "dog"), time=i * STEP) for i, boxes in enumerate(together(right, left))
    ]
    by_height = [dict(zip(one.boxes[:, 1].tolist(), one.track.tolist(), strict=True)) for one in tracks[1:]]
    assert {tuple(sorted(one.items())) for one in by_height} == {((50.0, 1), (62.0, 2))}


def test_a_flash_gets_no_id():
    tracker = Tracker(interval=STEP)
    assert play(tracker, [[], [(0, 10, 10, 0.9)], [], [], []]) == [[], [-1], [], [], []]
    assert tracker.count == 0


def test_two_phrases_over_the_same_object_are_two_tracks():
    tracker = Tracker(interval=STEP)
    told = play(tracker, together(moving(10, 5, 10, label=0), moving(10, 5, 10, label=1)))
    assert told[1:] == [[1, 2]] * 9
    # The phrase that was found is another one now: no id goes over to it.
    told = play(tracker, moving(60, 5, 3, label=1), start=10 * STEP)
    assert told == [[2]] * 3
    only_dog = Tracker(interval=STEP)
    assert play(only_dog, moving(10, 5, 5, label=0))[-1] == [1]
    assert play(only_dog, moving(35, 5, 3, label=1), start=5 * STEP) == [[-1], [2], [2]]


def test_the_same_phrase_in_two_prompts():
    tracker = Tracker(interval=STEP)
    phrases = ("dog", "cat", "dog")
    told = play(tracker, together(moving(10, 5, 10, label=0), moving(10, 5, 10, label=2)), phrases=phrases)
    assert told[1:] == [[1, 2]] * 9


def test_an_object_keeps_its_id_when_the_prompt_changes():
    tracker = Tracker(interval=STEP)
    play(tracker, moving(10, 5, 5, label=1))
    told = play(tracker, moving(35, 5, 4, label=0), phrases=("dog", "bus"), start=5 * STEP)
    assert told == [[1]] * 4


def test_empty_frames_and_an_object_that_returns():
    tracker = Tracker(interval=STEP)
    there = moving(10, 5, 5)
    gap = [[]] * 4
    assert play(tracker, there + gap + [[(0, 55, 50, 0.9)]] * 2)[-2:] == [[1], [1]]  # where it is expected, in time
    assert play(tracker, [[]] * 15, start=11 * STEP) == [[]] * 15
    assert play(tracker, [[(0, 55, 50, 0.9)]] * 3, start=26 * STEP) == [[-1], [2], [2]]  # gone for more than a second
    empty = tracker.update(Detections.empty(), ("cat",), time=100.0)
    assert len(empty) == 0 and empty.track.shape == (0,) and empty.track.dtype == np.int64


def test_the_threshold_decides_what_begins_a_track():
    assert play(Tracker(interval=STEP), moving(10, 5, 4, score=0.3), threshold=0.25) == [[-1], [1], [1], [1]]
    assert play(Tracker(interval=STEP), moving(10, 5, 4, score=0.3), threshold=0.3) == [[]] * 4
    frames = together(moving(10, 5, 4, label=0, score=0.35), moving(10, 5, 4, label=1, score=0.35, y=150))
    assert play(Tracker(interval=STEP), frames, threshold=[0.2, 0.6]) == [[-1], [1], [1], [1]]
    assert play(Tracker(interval=STEP), frames, threshold={"dog": 0.2}) == [[-1], [1], [1], [1]]
    tracker = Tracker(interval=STEP)
    play(tracker, moving(10, 5, 3, score=0.6))
    assert play(tracker, moving(25, 5, 3, score=0.3), threshold=0.2, start=3 * STEP) == [[1]] * 3  # moved meanwhile


def test_a_score_that_dips_does_not_lose_the_object():
    """It turns meanwhile, so that straight motion would lead elsewhere."""
    back = [[(0, 50 - 4 * (i + 1), 50, 0.3)] for i in range(8)]
    again = [[(0, 50 - 4 * (i + 8), 50, 0.9)] for i in range(2)]
    tracker = Tracker(interval=STEP)
    play(tracker, moving(10, 8, 6))
    assert play(tracker, back, start=6 * STEP) == [[]] * 8  # not shown
    assert play(tracker, again, start=14 * STEP) == [[1], [1]]
    lost = Tracker(interval=STEP)
    play(lost, moving(10, 8, 6))
    play(lost, [[]] * 8, start=6 * STEP)
    assert play(lost, again, start=14 * STEP) == [[-1], [2]]


def test_the_time_of_a_frame_counts_not_its_number():
    tracker = Tracker(interval=STEP)
    play(tracker, moving(0, 15, 6))  # 150 pixels a second
    later = [(0, 15 * 5 + 15 * 5, 50, 0.9)]  # half a second on, frames dropped
    assert play(tracker, [later], start=5 * STEP + 0.5) == [[1]]
    tracker = Tracker(interval=STEP)
    play(tracker, moving(0, 15, 6))
    assert play(tracker, [later], start=6 * STEP) == [[-1]]  # that far away a frame later, it is another


def test_frames_that_are_seconds_apart():
    tracker = Tracker(interval=STEP)
    assert play(tracker, moving(10, 2, 6), step=4.0) == [[-1], *[[1]] * 5]
    tracker = Tracker(interval=STEP)
    assert play(tracker, [*moving(10, 2, 4), [], [(0, 18, 50, 0.9)]], step=4.0)[-1] == [1]


def test_without_times_frames_are_an_interval_apart():
    tracker = Tracker(interval=STEP)
    told = [tracker.update(found(*boxes), ("cat", "dog")).track.tolist() for boxes in moving(10, 8, 6)]
    assert told == [[-1], *[[1]] * 5]
    for _ in range(11):
        tracker.update(Detections.empty(), ("cat", "dog"))
    assert tracker.update(found((0, 58, 50, 0.9)), ("cat", "dog")).track.tolist() == [-1]


@pytest.mark.parametrize("how", ["reset", "the time goes back", "a long gap"])
def test_a_cut_forgets_objects_and_repeats_no_id(how):
    tracker = Tracker(interval=STEP)
    assert play(tracker, moving(10, 0, 5))[-1] == [1]
    start = {"reset": 5 * STEP, "the time goes back": -3.0, "a long gap": 30.0}[how]
    if how == "reset":
        tracker.reset()
    assert play(tracker, moving(10, 0, 3), start=start) == [[-1], [2], [2]]
    assert tracker.count == 2


def test_times_that_stand_still_or_jitter(recwarn):
    tracker = Tracker(interval=STEP)
    times = [0.0, 0.1, 0.1, 0.09, 0.2, 0.3]
    told = [
        tracker.update(found((0, 10 + i, 50, 0.9)), ("cat", "dog"), time=time).track.tolist()
        for i, time in enumerate(times)
    ]
    assert told == [[-1], *[[1]] * 5]
    assert not [one for one in recwarn if "timestamp" in str(one.message)]


def test_a_tracker_that_has_nothing_to_follow_holds_nothing():
    tracker = Tracker(interval=STEP)
    for i in range(50):
        phrases = (f"thing {i}", "other")
        play(tracker, moving(10, 0, 3), phrases=phrases, start=10.0 * i)
    assert len(tracker._associations) <= 1
    assert tracker.count == 50


def test_what_is_wrong_with_the_arguments():
    for options in ({"interval": 0}, {"memory": float("nan")}):
        with pytest.raises(OptionError, match="must be a finite number above 0 seconds"):
            Tracker(**options)
    with pytest.raises(OptionError, match="label 1 is found, but there are 1 phrases"):
        Tracker().update(found((1, 0, 0, 0.9)), ["cat"])
    with pytest.raises(OptionError, match=r"legal|\[0, 1\]"):
        Tracker().update(found((0, 0, 0, 0.9)), ["cat"], 2.0)


@pytest.mark.parametrize(
    ("message", "advice"),
    [
        ("libGL.so.1: cannot open shared object file", "--force-reinstall --no-deps opencv-python-headless"),
        ("cannot import name 'x' from 'trackers'", r"pip install 'glip-deploy\[track\]'"),
    ],
)
def test_a_package_that_cannot_be_imported(monkeypatch, message, advice):
    def fails(name):
        raise ImportError(message)

    monkeypatch.setattr("glip_deploy.video.tracking.importlib.import_module", fails)
    with pytest.raises(MissingPackage, match=advice) as raised:
        Tracker()
    assert message in str(raised.value) and "\n" not in str(raised.value)


# -- through the pipeline -------------------------------------------------------------------------------------------


class Clip(Source):
    """A square that moves, as the brightness of each frame says; every frame at its time."""

    name = "clip"
    is_video = True
    fps = 10.0

    def __init__(self, times, *, is_video=True):
        super().__init__()
        self.times, self.is_video = times, is_video

    def __iter__(self):
        for index, time in enumerate(self.times):
            yield Frame(np.full((8, 8, 3), index, np.uint8), self.name, index, time)

    def close(self):
        pass


class Fake:
    def __init__(self, frames):
        self.frames, self.thresholds = frames, []

    def detect(self, image, prompt, threshold=0.5, *, color, max_detections=None):
        self.thresholds.append(threshold)
        every = found(*self.frames[image[0, 0, 0]], phrases=prompt.phrases)
        return every[every.scores > np.array(threshold)[every.labels]]

    def detect_prompts(self, image, prompts, threshold=0.5, *, color, max_detections=None):
        return [self.detect(image, *pair, color=color) for pair in zip(prompts, threshold, strict=True)]


class Prompt:
    def __init__(self, *phrases):
        self.phrases = phrases


def test_run_looks_for_weaker_boxes_but_does_not_show_them():
    frames = [*moving(10, 5, 4), [(0, 30, 50, 0.3), (1, 100, 50, 0.9)], *moving(35, 5, 3)]
    detector = Fake(frames)
    seen = []
    summary = run(
        detector,
        Clip([STEP * i for i in range(8)]),
        Prompt("cat", "dog"),
        threshold=[0.5, 0.95],
        tracker=Tracker(interval=STEP),
        on_frame=lambda frame, one: seen.append(one.track.tolist()),
    )
    assert seen == [[-1], [1], [1], [1], [], [1], [1], [1]]
    assert detector.thresholds[0] == pytest.approx([0.25, 0.475])
    assert summary.tracks == 1 and summary.objects == 7


def test_several_prompts_and_frames_without_a_time():
    detector = Fake(moving(10, 5, 6))
    prompts = [Prompt("cat", "dog"), Prompt("cat")]
    told = [
        one.track.tolist()
        for _, one in detect_stream(detector, Clip([None] * 6), prompts, threshold=0.5, tracker=Tracker(interval=STEP))
    ]
    assert told == [[-1, -1], *[[1, 2]] * 5]


def test_pictures_are_refused():
    pictures = Clip([0.0], is_video=False)
    pictures.files = (Path("a.jpg"), Path("b.jpg"))
    for call in (
        lambda: Tracker.of(pictures),
        lambda: run(Fake([[]]), pictures, Prompt("cat"), tracker=Tracker()),
        lambda: next(detect_stream(Fake([[]]), pictures, Prompt("cat"), tracker=Tracker())),
    ):
        with pytest.raises(OptionError, match="source clip is pictures; leave it out"):
            call()


def test_the_interval_is_that_of_the_stride():
    source = Clip([])
    source.stride = 3
    assert Tracker.of(source)._interval == pytest.approx(0.3)


# -- GLIP-nano ------------------------------------------------------------------------------------------------------

TRUTH = json.loads((Path(__file__).parents[2] / "data" / "nano" / "moving.json").read_text())
"""Names and boxes of the nine objects in the video, by frame; `examples/nano/media.py --truth` writes it."""
PHRASES = list(dict.fromkeys(TRUTH["names"]))  # two of them are red apples
FRAMES = 110
THRESHOLD = 0.75


class Remembering:
    """A detector that does not compute the same frame twice, for runs with several strides."""

    def __init__(self, detector):
        self.detector, self.known = detector, {}

    def detect(self, image, prompt, threshold=0.5, *, color, max_detections=None):
        key = image.tobytes()
        if key not in self.known:
            self.known[key] = self.detector.detect(image, prompt, WEAK * THRESHOLD, color=color)
        everything = self.known[key]
        return everything[everything.scores > np.float32(threshold)[everything.labels]]


@pytest.fixture(scope="module")
def nano(nano_bundle):
    with Detector.open(nano_bundle, shortest_side=224, cache_dir=None) as detector:
        yield Remembering(detector), detector.encode(PHRASES)


def sightings(nano, *, stride):
    """By object, the times and tracks of the boxes that lie on it; and the number of all tracks."""
    detector, prompt = nano
    by_object: dict[int, list[tuple[float, int]]] = {}
    with open_source(MOVING, stride=stride, max_frames=FRAMES // stride) as source:
        tracker = Tracker.of(source)
        stream = detect_stream(detector, source, prompt, threshold=[THRESHOLD] * len(PHRASES), tracker=tracker)
        for frame, one in stream:
            boxes = np.array(TRUTH["boxes"][frame.index])
            for place, name in enumerate(TRUTH["names"]):
                own = one[np.array([phrase == name for phrase in one.phrases], bool)]
                overlap = pairwise_iou(boxes[place : place + 1], own.boxes)[0]
                if len(own) and overlap.max() > 0.5 and own.track[overlap.argmax()] != NO_TRACK:
                    by_object.setdefault(place, []).append((frame.time, int(own.track[overlap.argmax()])))
    return by_object, tracker.count


@pytest.mark.parametrize("stride", [pytest.param(1, marks=slow), 2, 3, 5])
def test_each_object_of_the_video_keeps_one_id(nano, stride):
    by_object, tracks = sightings(nano, stride=stride)
    assert len(by_object) == len(TRUTH["names"])
    seen = sum(map(len, by_object.values()))
    assert seen > 400 / stride
    returned = 0
    for times in by_object.values():
        for (before, old), (now, new) in pairwise(times):
            # Below the threshold for more than a second, an object is a new one when it comes back.
            assert new == old or now - before > 1
            returned += new != old
    owners = [{track for _, track in times} for times in by_object.values()]
    assert len(set().union(*owners)) == sum(map(len, owners)), "two objects share an id"
    assert sum(map(len, owners)) == len(owners) + returned <= len(owners) + 1
    assert tracks <= len(owners) + returned + 3  # the model is not right about everything


def test_tracking_changes_no_box(nano):
    detector, prompt = nano
    limits = [THRESHOLD] * len(PHRASES)
    told = {}
    for tracker in (None, Tracker(interval=0.2)):
        with open_source(MOVING, stride=3, max_frames=8) as source:
            stream = detect_stream(detector.detector, source, prompt, threshold=limits, tracker=tracker)
            told[tracker is None] = [[(one.box, one.score, one.label) for one in found] for _, found in stream]
    assert told[True] == told[False] and sum(map(len, told[True])) > 8
