"""Sinks: complete files, one clear error where a file cannot be written, and no partial files."""

import errno
import io
import json
import os
import signal
import subprocess
import sys
import textwrap
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from glip_deploy.errors import OutputError
from glip_deploy.results.detections import Detections
from glip_deploy.video.base import Frame
from glip_deploy.video.label_sinks import LabelStudioSink, YoloSink
from glip_deploy.video.open import open_source
from glip_deploy.video.pictures import PictureSource
from glip_deploy.video.sinks import CocoSink, JsonLinesSink, PictureSink
from glip_deploy.video.video_out import VideoSink

NAMES = ("person", "traffic light")


def frame(index=0, *, source="a.jpg", size=(64, 48), value=100, time=None):
    return Frame(np.full((size[1], size[0], 3), value, np.uint8), source, index, time)


def one(label=1):
    return Detections(
        boxes=np.array([[4, 8, 30.5, 40]], np.float32),
        scores=np.array([0.75], np.float32),
        labels=np.array([label]),
        phrases=[NAMES[label]],
    )


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def broken_save(*args, **kwargs):
    Path(args[1]).write_bytes(b"half")
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(("name", "kind"), [("o.png", "PNG"), ("o.JPG", "JPEG"), ("o.jpeg", "JPEG")])
def test_picture_in_the_format_of_its_name(tmp_path, name, kind):
    with PictureSink(tmp_path / name) as sink:
        sink.write(frame(), one())
    with Image.open(tmp_path / name) as picture:
        assert picture.format == kind and picture.size == (64, 48)
        assert np.asarray(picture).std() > 1  # something was drawn on the plain frame
    assert names_in(tmp_path) == [name]


def test_folder_keeps_names_and_subfolders(tmp_path):
    out = tmp_path / "x" / "out"
    with PictureSink(out, folder=True, root=tmp_path / "in") as sink:
        assert not out.exists()
        for name in ("a/1.jpg", "b/1.jpg", "b/2.webp", "b/2.png"):
            sink.write(frame(source=str(tmp_path / "in" / name)), one())
        sink.write(frame(source="/elsewhere/3.png"), one())
    assert sorted(str(p.relative_to(out)) for p in out.rglob("*.*")) == [
        "3.png",
        "a/1.jpg",
        "b/1.jpg",
        "b/2.png",
        "b/2.webp.png",
    ]


def test_a_picture_is_not_half_written_on_a_full_disk(tmp_path, monkeypatch):
    (tmp_path / "o.png").write_bytes(b"what was there")
    monkeypatch.setattr(Image.Image, "save", broken_save)
    with PictureSink(tmp_path / "o.png") as sink, pytest.raises(OutputError, match=r"o\.png.*no space left"):
        sink.write(frame(), one())
    assert names_in(tmp_path) == ["o.png"]
    assert (tmp_path / "o.png").read_bytes() == b"what was there"


def test_what_each_sink_writes(tmp_path):
    folder = tmp_path / "in"
    source = PictureSource([folder / "a" / "1.jpg", folder / "2.webp"], name="in", root=folder)
    assert PictureSink(tmp_path / "o.png").outputs(source) == [tmp_path / "o.png"]
    assert PictureSink(tmp_path / "o", folder=True, root=folder).outputs(source) == [
        tmp_path / "o" / "a" / "1.jpg",
        tmp_path / "o" / "2.webp.png",
    ]
    assert VideoSink(tmp_path / "o.mp4").outputs(source) == [tmp_path / "o.mp4"]
    assert CocoSink(tmp_path / "o.json").outputs(source) == [tmp_path / "o.json"]
    assert JsonLinesSink(tmp_path / "o.jsonl").outputs(source) == [tmp_path / "o.jsonl"]
    assert JsonLinesSink("-").outputs(source) == []


def test_the_source_is_not_overwritten(tmp_path):
    Image.fromarray(frame().image).save(tmp_path / "a.png")
    before = (tmp_path / "a.png").read_bytes()
    with PictureSink(tmp_path, folder=True) as sink, pytest.raises(OutputError, match="is the source itself"):
        sink.write(frame(source=str(tmp_path / "a.png")), one())
    assert (tmp_path / "a.png").read_bytes() == before


MAKERS = {
    "picture": lambda path: PictureSink(path.with_suffix(".png")),
    "video": lambda path: VideoSink(path.with_suffix(".mp4")),
    "json": JsonLinesSink,
    "coco": CocoSink,
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_a_missing_folder_is_found_before_anything_is_written(tmp_path, make):
    with pytest.raises(OutputError, match="does not exist; make it first"):
        make(tmp_path / "nowhere" / "o.x")
    assert names_in(tmp_path) == []


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_making_a_sink_touches_nothing(tmp_path, make):
    for suffix in (".png", ".mp4", ".x"):
        (tmp_path / f"o{suffix}").write_bytes(b"kept")
    make(tmp_path / "o.x")
    assert {path.read_bytes() for path in tmp_path.iterdir()} == {b"kept"}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_a_folder_is_not_a_file(tmp_path, make):
    for suffix in (".png", ".mp4", ".x"):
        (tmp_path / f"o{suffix}").mkdir()
    with pytest.raises(OutputError, match="is a folder"):
        make(tmp_path / "o.x")


def test_no_permission(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *args: False)  # root may write everywhere, so say it may not
    with pytest.raises(OutputError, match="permission denied"):
        JsonLinesSink(tmp_path / "o.jsonl")
    with pytest.raises(OutputError, match="permission denied"):
        PictureSink(tmp_path / "new" / "folder", folder=True)


def test_a_folder_under_a_file(tmp_path):
    (tmp_path / "f").write_text("x")
    with pytest.raises(OutputError, match="is a file"):
        PictureSink(tmp_path / "f" / "g", folder=True)


@pytest.mark.parametrize(("make", "name"), [(PictureSink, "o.bmp"), (VideoSink, "o.gif"), (VideoSink, "o")])
def test_other_suffixes_are_refused(tmp_path, make, name):
    with pytest.raises(OutputError, match=f"{name} does not end in"):
        make(tmp_path / name)


def test_json_lines(tmp_path):
    path = tmp_path / "o.jsonl"
    with JsonLinesSink(path) as sink:
        sink.write(frame(7, source="кот.jpg"), one())
        first = path.read_text(encoding="utf-8")
        sink.write(frame(8), Detections.empty())
    assert json.loads(first) == {
        "source": "кот.jpg",
        "frame": 7,
        "width": 64,
        "height": 48,
        "detections": [
            {
                "score": 0.75,
                "label": "traffic light",
                "box": {"xmin": 4.0, "ymin": 8.0, "xmax": 30.5, "ymax": 40.0},
            }
        ],
    }
    assert first.endswith("\n")
    assert json.loads(path.read_text(encoding="utf-8").splitlines()[1])["detections"] == []


def test_json_lines_on_standard_output(capsys):
    with JsonLinesSink("-") as sink:
        sink.write(frame(), one())
    assert json.loads(capsys.readouterr().out)["frame"] == 0


def test_json_lines_on_a_standard_output_that_is_closed(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    with pytest.raises(OutputError, match="standard output is closed"):
        JsonLinesSink("-")


def test_json_lines_on_a_terminal_that_is_not_utf8(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    with JsonLinesSink("-") as sink:
        sink.write(frame(source="кот.jpg"), one())
    assert json.loads(raw.getvalue())["source"] == "кот.jpg"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_json_lines_on_a_full_device():
    with JsonLinesSink("/dev/full") as sink, pytest.raises(OutputError, match=r"/dev/full .*no space left"):
        sink.write(frame(), one())


def test_json_lines_keep_only_whole_lines_on_a_full_disk(tmp_path):
    path = tmp_path / "o.jsonl"
    with JsonLinesSink(path) as sink:
        sink.write(frame(0), one())
        whole = path.read_bytes()
        file = sink._file

        class Full:
            """A disk with room for ten more bytes."""

            room = 10

            def write(self, data):
                if not self.room:
                    raise OSError(errno.ENOSPC, "No space left on device")
                count, self.room = self.room, 0
                return file.write(data[:count])

            def __getattr__(self, name):
                return getattr(file, name)

        sink._file = Full()
        with pytest.raises(OutputError, match="no space left"):
            sink.write(frame(1), one())
    assert path.read_bytes() == whole


def coco(tmp_path, entries, **options):
    with CocoSink(tmp_path / "o.json", **options) as sink:
        for source, index, detections in entries:
            sink.write(frame(index, source=source), detections)
        assert not (tmp_path / "o.json").exists()
    assert names_in(tmp_path) == ["o.json"]
    return json.loads((tmp_path / "o.json").read_text())


def test_coco_results(tmp_path):
    entries = [("x/000000000139.jpg", 0, one(0)), ("x/000000000285.jpg", 1, one(1))]
    first, second = coco(tmp_path, entries)
    assert first == one(0).to_coco(139)[0]
    assert (second["image_id"], second["category_id"]) == (285, 2)


@pytest.mark.parametrize(
    ("sources", "ids"),
    [
        (["7.jpg", "cat.jpg"], [0, 1]),
        (["a/7.jpg", "b/7.jpg"], [0, 1]),
        (["12.mp4", "12.mp4"], [0, 1]),
    ],
)
def test_image_ids_are_indices_unless_all_names_are_distinct_numbers(tmp_path, sources, ids):
    results = coco(tmp_path, [(source, i, one()) for i, source in enumerate(sources)])
    assert [entry["image_id"] for entry in results] == ids


def test_coco_ids_by_name(tmp_path):
    results = coco(
        tmp_path,
        [("cat.jpg", 0, one(0)), ("dog.jpg", 1, one(1))],
        categories={"Person": 1, "traffic_light": 10},
        image_ids={"cat.jpg": 77, "dog.jpg": 88},
    )
    assert [(entry["image_id"], entry["category_id"]) for entry in results] == [(77, 1), (88, 10)]


def test_coco_is_not_written_after_an_error(tmp_path):
    (tmp_path / "o.json").write_text("old")
    with pytest.raises(RuntimeError), CocoSink(tmp_path / "o.json") as sink:
        sink.write(frame(), one())
        raise RuntimeError
    assert (tmp_path / "o.json").read_text() == "old"


def test_coco_on_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    def full(fd):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="no space left"), CocoSink(tmp_path / "o.json") as sink:
        sink.write(frame(), one())
    assert names_in(tmp_path) == []


def read_video(path):
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = [(f.time, f.to_ndarray(format="rgb24")) for f in container.decode(stream)]
        context = stream.codec_context
        return stream.average_rate, frames, (context.name, context.pix_fmt, context.colorspace)


@pytest.mark.parametrize("name", ["o.mp4", "o.mkv", "o.mov"])
def test_video(tmp_path, name):
    with VideoSink(tmp_path / name, fps=10) as sink:
        for i in range(12):
            sink.write(frame(i, value=20 * i), Detections.empty())
    rate, frames, (codec, pixels, colors) = read_video(tmp_path / name)
    assert rate == 10 and len(frames) == 12
    assert [time for time, _ in frames] == pytest.approx([i / 10 for i in range(12)], abs=2e-3)
    assert [float(image.mean()) for _, image in frames] == pytest.approx([20 * i for i in range(12)], abs=4)
    assert pixels == "yuv420p" and colors == 1
    assert codec == ("h264" if "libx264" in av.codecs_available else "mpeg4")
    assert names_in(tmp_path) == [name]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows allows no colon in a file name")
@pytest.mark.parametrize("name", ["12:30.mp4", "tcp:o.mkv"])
def test_a_colon_in_the_name_of_a_video_is_no_protocol(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with VideoSink(name, fps=10) as sink:
        sink.write(frame(), one())
    assert names_in(tmp_path) == [name]
    assert len(read_video(tmp_path / name)[1]) == 1


def test_video_colors_survive(tmp_path):
    image = np.zeros((64, 96, 3), np.uint8)
    image[:, :32], image[:, 32:64], image[:, 64:] = (220, 40, 30), (30, 200, 60), (40, 60, 210)
    with VideoSink(tmp_path / "o.mp4", fps=10) as sink:
        for i in range(4):
            sink.write(Frame(image, "v", i), Detections.empty())
    _, frames, _ = read_video(tmp_path / "o.mp4")
    for x in (16, 48, 80):
        assert np.abs(frames[-1][1][32, x].astype(int) - image[32, x]).max() < 12


def test_a_finished_mp4_is_an_ordinary_one_with_its_index_in_front(tmp_path):
    with VideoSink(tmp_path / "o.mp4", fps=10) as sink:
        for i in range(5):
            sink.write(frame(i), one())
    data = (tmp_path / "o.mp4").read_bytes()
    assert b"moof" not in data and data.index(b"moov") < data.index(b"mdat")
    with open_source(tmp_path / "o.mp4") as source:
        assert source.frame_count == 5 and source.fps == 10


@pytest.mark.parametrize(
    ("fps", "stride", "rate"), [(30, 3, 10), (29.97002997, 1, Fraction(30000, 1001)), (None, 1, 25)]
)
def test_video_rate(tmp_path, fps, stride, rate):
    with VideoSink(tmp_path / "o.mp4", fps=fps, stride=stride) as sink:
        for i in range(0, 8 * stride, stride):
            sink.write(frame(i), one())
    assert read_video(tmp_path / "o.mp4")[0] == pytest.approx(rate)


def test_a_gap_of_unreadable_frames_keeps_the_video_in_time(tmp_path):
    with VideoSink(tmp_path / "o.mp4", fps=10) as sink:
        for i in (3, 4, 8, 9):
            sink.write(frame(i), one())
    times = [time for time, _ in read_video(tmp_path / "o.mp4")[1]]
    assert times == pytest.approx([0, 0.1, 0.5, 0.6])


def test_live_frames_are_timed_by_the_clock(tmp_path):
    with VideoSink(tmp_path / "o.mp4", fps=30, live=True) as sink:
        for i, time in enumerate((1.0, 1.5, 1.5, 3.0)):
            sink.write(frame(i * 17, time=time), one())
    times = [time for time, _ in read_video(tmp_path / "o.mp4")[1]]
    assert times == pytest.approx([0, 0.5, 0.501, 2.0], abs=2e-3)


@pytest.mark.parametrize("size", [(63, 47), (64, 47), (1, 1), (17, 2)])
def test_odd_sizes_are_padded_to_even(tmp_path, size):
    with VideoSink(tmp_path / "o.mp4", fps=10) as sink:
        for i in range(3):
            sink.write(frame(i, size=size), Detections.empty())
    _, frames, _ = read_video(tmp_path / "o.mp4")
    assert frames[0][1].shape == (size[1] + size[1] % 2, size[0] + size[0] % 2, 3)
    assert np.abs(frames[0][1].astype(int) - 100).max() < 5


def test_frames_that_change_size_are_scaled(tmp_path):
    with VideoSink(tmp_path / "o.mp4", fps=10) as sink:
        sink.write(frame(0), one())
        sink.write(frame(1, size=(128, 96)), one())
    _, frames, _ = read_video(tmp_path / "o.mp4")
    assert [image.shape for _, image in frames] == [(48, 64, 3)] * 2


def test_mpeg4_is_used_where_there_is_no_h264(tmp_path, monkeypatch):
    monkeypatch.setattr(av, "codecs_available", {"mpeg4"})
    with VideoSink(tmp_path / "o.mp4", fps=29.97) as sink:
        for i in range(4):
            sink.write(frame(i), one())
    _, frames, (codec, _, _) = read_video(tmp_path / "o.mp4")
    assert codec == "mpeg4" and len(frames) == 4


def test_without_frames_no_video_is_written(tmp_path):
    (tmp_path / "o.mp4").write_bytes(b"old")
    with VideoSink(tmp_path / "o.mp4"):
        pass
    assert (tmp_path / "o.mp4").read_bytes() == b"old"


def test_an_exception_leaves_a_playable_video(tmp_path):
    with pytest.raises(RuntimeError), VideoSink(tmp_path / "o.mp4", fps=10) as sink:
        for i in range(3):
            sink.write(frame(i), one())
        raise RuntimeError
    assert len(read_video(tmp_path / "o.mp4")[1]) == 3


def test_a_video_whose_index_cannot_be_moved_stays_playable(tmp_path, monkeypatch, caplog):
    sink = VideoSink(tmp_path / "o.mp4", fps=10)
    with sink:
        for i in range(3):
            sink.write(frame(i), one())

        def full(self, target):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(Path, "replace", full)
    assert "stays fragmented" in caplog.text
    assert len(read_video(tmp_path / "o.mp4")[1]) == 3
    assert names_in(tmp_path) == ["o.mp4"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk_while_a_video_is_written_is_one_error(tmp_path):
    (tmp_path / "o.mp4").symlink_to("/dev/full")
    with (
        pytest.raises(OutputError, match=r"o\.mp4 cannot be written: no space left") as caught,
        VideoSink(tmp_path / "o.mp4", fps=10) as sink,
    ):
        for i in range(200):
            sink.write(frame(i), one())
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limit on file sizes to stand in for a full disk")
@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_a_full_disk_leaves_a_video_of_whole_frames(tmp_path, suffix):
    program = textwrap.dedent(f"""
        import resource
        import numpy as np
        from glip_deploy.results import Detections
        from glip_deploy.errors import OutputError
        from glip_deploy.video.video_out import VideoSink
        from glip_deploy.video import Frame

        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        picture = np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8)
        try:
            with VideoSink({str(tmp_path / f"o.{suffix}")!r}, fps=100) as sink:
                for i in range(300):
                    picture = picture.copy()
                    picture[i % 48] = 255  # small changes, for which the encoder writes no key frame
                    sink.write(Frame(picture, "v", i), Detections.empty())
        except OutputError as error:
            print(i, error)
    """)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    written, message = done.stdout.strip().split(" ", 1)
    assert f"o.{suffix} cannot be written" in message
    assert 5 < int(written) < 299
    assert int(written) - 2 <= len(read_video(tmp_path / f"o.{suffix}")[1]) <= int(written)
    assert names_in(tmp_path) == [f"o.{suffix}"]


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system cannot kill a process outright")
@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_a_killed_process_leaves_a_playable_video(tmp_path, suffix):
    program = textwrap.dedent(f"""
        import os, signal
        import numpy as np
        from glip_deploy.results import Detections
        from glip_deploy.video.video_out import VideoSink
        from glip_deploy.video import Frame

        with VideoSink({str(tmp_path / f"o.{suffix}")!r}, fps=10) as sink:
            for i in range(6):
                sink.write(Frame(np.full((48, 64, 3), 40 * i, np.uint8), "v", i), Detections.empty())
            os.kill(os.getpid(), signal.SIGKILL)
    """)
    done = subprocess.run([sys.executable, "-c", program], check=False, timeout=60)
    assert done.returncode == -signal.SIGKILL
    assert len(read_video(tmp_path / f"o.{suffix}")[1]) >= 5


def test_every_sink_can_be_completed_without_a_frame(tmp_path):
    for sink in (
        PictureSink(tmp_path / "o.png"),
        VideoSink(tmp_path / "o.mp4"),
        JsonLinesSink(tmp_path / "o.jsonl"),
        CocoSink(tmp_path / "o.json"),
    ):
        with sink:
            pass
    assert names_in(tmp_path) == ["o.json", "o.jsonl"]
    assert json.loads((tmp_path / "o.json").read_text()) == []


# --- labels ---


def test_yolo_labels_of_folders_below(tmp_path):
    source = tmp_path / "photos" / "north" / "a.b.jpg"
    with YoloSink(tmp_path / "set", tmp_path / "photos", ["person", "traffic\nlight"]) as sink:
        sink.write(frame(source=str(source)), one())
        sink.write(frame(source="elsewhere.jpg"), Detections())
    assert (tmp_path / "set" / "classes.txt").read_text() == "person\ntraffic light\n"
    labels = tmp_path / "set" / "labels"
    assert (labels / "north" / "a.b.txt").read_text() == "1 0.269531 0.500000 0.414062 0.666667\n"
    assert (labels / "elsewhere.txt").read_bytes() == b""


def test_label_files_of_before_an_error_stay(tmp_path):
    def fail():
        with YoloSink(tmp_path / "set", tmp_path, NAMES) as sink:
            sink.write(frame(), one())
            raise RuntimeError("the detector failed")

    with pytest.raises(RuntimeError):
        fail()
    assert names_in(tmp_path / "set" / "labels") == ["a.txt"]


def test_a_label_file_that_cannot_be_written(tmp_path, monkeypatch):
    with YoloSink(tmp_path / "set", tmp_path, NAMES) as sink:
        sink.write(frame(), one())
        before = (tmp_path / "set" / "labels" / "a.txt").read_text()
        monkeypatch.setattr(Path, "write_bytes", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
        with pytest.raises(OutputError, match=r"a\.txt cannot be written"):
            sink.write(frame(), Detections())
    assert (tmp_path / "set" / "labels" / "a.txt").read_text() == before
    assert names_in(tmp_path / "set" / "labels") == ["a.txt"]


def test_label_studio_tasks_are_whole_or_not_there(tmp_path):
    def fail():
        with LabelStudioSink(tmp_path / "t.json", tmp_path, model_version="m") as sink:
            sink.write(frame(), one())
            raise RuntimeError("the detector failed")

    with pytest.raises(RuntimeError):
        fail()
    assert names_in(tmp_path) == []
    with LabelStudioSink(tmp_path / "t.json", tmp_path, model_version="m"):
        pass
    assert json.loads((tmp_path / "t.json").read_text()) == []


def test_label_studio_addresses_of_names_that_are_not_utf8(tmp_path):
    with LabelStudioSink(tmp_path / "t.json", tmp_path, model_version="m") as sink:
        sink.write(frame(source=os.fsdecode(bytes(tmp_path / "a?b") + b"\xff.jpg")), one())
    (task,) = json.loads((tmp_path / "t.json").read_text())
    assert task["data"]["image"] == f"/data/local-files/?d={tmp_path.name}/a%3Fb%FF.jpg"
