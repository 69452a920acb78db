"""Every kind of source, and what happens when part or all of it cannot be read."""

import functools
import http.server
import logging
import os
import signal
import socket
import sys
import threading
import time
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from glip_deploy.errors import FrameError, OptionError, SourceError, SourceLost
from glip_deploy.video.address import Address
from glip_deploy.video.open import open_source
from glip_deploy.video.pictures import PictureSource
from glip_deploy.video.video_in import VideoSource


def gray(i):
    return 20 * (i % 13)


def write_video(path, *, frames=12, size=(64, 48), rotation=None, **options):
    """Frame i is plain gray of value 20 i, so that a decoded frame tells which one it was."""
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream("libx264", rate=Fraction(10))
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        stream.options = {"g": "4", "bf": "0"}
        if rotation is not None:
            stream.set_display_rotation(rotation)
        for i in range(frames):
            image = np.full((size[1], size[0], 3), gray(i), np.uint8)
            if rotation is not None:
                image[: size[1] // 2, : size[0] // 2] = 255
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def packets_of(path):
    with av.open(str(path)) as container:
        return [(p.pos, p.size) for p in container.demux(video=0) if p.size]


def write_pictures(folder, names):
    folder.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(names):
        Image.fromarray(np.full((6, 8, 3), i, np.uint8)).save(folder / name)
    return folder


def values(source):
    return [round(float(frame.image.mean()) / 20) for frame in source]


def test_one_picture(tmp_path):
    write_pictures(tmp_path, ["a.png"])
    with open_source(tmp_path / "a.png") as source:
        assert isinstance(source, PictureSource)
        assert (source.is_video, source.is_live, source.fps, source.frame_count) == (False, False, None, 1)
        (frame,) = source
    assert frame.image.shape == (6, 8, 3) and frame.image.dtype == np.uint8
    assert (frame.source, frame.index, frame.time) == (str(tmp_path / "a.png"), 0, None)


def test_a_picture_is_known_by_its_content_if_not_by_its_name(tmp_path):
    write_pictures(tmp_path, ["a.png"])
    (tmp_path / "a.png").rename(tmp_path / "photo")
    with open_source(str(tmp_path / "photo")) as source:
        assert not source.is_video and len(list(source)) == 1


@pytest.mark.parametrize("error", [ValueError("bad size"), RuntimeError("no"), SyntaxError("not a PNG")])
def test_a_file_pillow_fails_on_is_one_error(tmp_path, monkeypatch, error):
    def fail(*args, **kwargs):
        raise error

    (tmp_path / "file.dat").write_bytes(b"junk")
    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(SourceError, match=r"file\.dat: cannot be opened as a video") as caught:
        open_source(tmp_path / "file.dat")
    assert "\n" not in str(caught.value)


def test_a_picture_too_large_without_a_suffix_says_so(tmp_path, monkeypatch):
    write_pictures(tmp_path, ["a.png"])
    (tmp_path / "a.png").rename(tmp_path / "photo")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with open_source(tmp_path / "photo") as source, pytest.raises(FrameError, match="too large"):
        list(source)


def test_names_the_system_refuses_are_one_error(tmp_path, monkeypatch):
    with pytest.raises(SourceError, match=r"cannot be read \(File name too long\)"):
        open_source("n" * 300)

    def unreadable(self, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.stat", unreadable)
    with pytest.raises(SourceError, match=r"cannot be read \(Permission denied\)"):
        open_source(tmp_path / "a.png")


def test_folder_is_in_natural_order_and_holds_only_pictures(tmp_path):
    write_pictures(tmp_path, ["f10.png", "f2.PNG", "F1.jpg", ".hidden.png"])
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "sub.png").mkdir()
    with open_source(tmp_path) as source:
        names = [frame.source.rsplit("/", 1)[1] for frame in source]
    assert names == ["F1.jpg", "f2.PNG", "f10.png"]
    assert source.frame_count == 3


def test_glob_goes_into_subfolders_and_knows_its_root(tmp_path):
    write_pictures(tmp_path / "a", ["1.png"])
    write_pictures(tmp_path / "b", ["1.png", "2.txt.png"])
    (tmp_path / "b" / "movie.txt").write_text("x")
    with open_source(f"{tmp_path}/**/*") as source:
        assert [str(path.relative_to(tmp_path)) for path in source.files] == [
            "a/1.png",
            "b/1.png",
            "b/2.txt.png",
        ]
        assert source.root == tmp_path


def test_a_file_whose_name_looks_like_a_glob_is_a_file(tmp_path):
    write_pictures(tmp_path, ["a[1].png"])
    with open_source(tmp_path / "a[1].png") as source:
        assert len(list(source)) == 1


def test_stride_and_limit_on_pictures_keep_the_index(tmp_path):
    write_pictures(tmp_path, [f"{i}.png" for i in range(7)])
    with open_source(tmp_path, stride=3) as source:
        assert source.frame_count == 3
        assert [frame.index for frame in source] == [0, 3, 6]
    with open_source(tmp_path, stride=2, max_frames=2) as source:
        assert source.frame_count == 2
        assert [frame.index for frame in source] == [0, 2]


def test_an_unreadable_picture_is_reported_counted_and_skipped(tmp_path, caplog):
    write_pictures(tmp_path, ["0.png", "2.png"])
    (tmp_path / "1.png").write_bytes(b"not a picture")
    with open_source(tmp_path) as source, caplog.at_level(logging.WARNING, "glip_deploy"):
        assert [frame.index for frame in source] == [0, 2]
    assert source.skipped == 1
    assert "picture 1" in caplog.text and "1.png" in caplog.text


def test_a_folder_where_nothing_can_be_read_is_an_error(tmp_path):
    for name in ("a.png", "b.jpg"):
        (tmp_path / name).write_bytes(b"junk")
    with (
        open_source(tmp_path) as source,
        pytest.raises(SourceError, match="none of its 2 pictures could be read"),
    ):
        list(source)


def test_one_unreadable_picture_is_an_error(tmp_path):
    (tmp_path / "a.png").write_bytes(b"junk")
    with open_source(tmp_path / "a.png") as source, pytest.raises(FrameError, match=r"a\.png"):
        list(source)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nothing.mp4", "does not exist"),
        ("empty", "holds no pictures"),
        ("*.png", "matches no pictures"),
        ("twovideos/*", "matches 2 videos"),
    ],
)
def test_sources_that_do_not_exist_or_hold_no_frames(tmp_path, monkeypatch, spec, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "twovideos").mkdir()
    for name in "ab":
        (tmp_path / "twovideos" / f"{name}.mp4").write_bytes(b"x")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SourceError, match=message) as caught:
        open_source(spec)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stride": 0}, "stride is 0; it must be a whole number of at least 1"),
        ({"max_frames": 0}, "max_frames is 0"),
        ({"reconnect": -1}, "reconnect is -1"),
        ({"timeout": 0}, "timeout is 0"),
        ({"timeout": float("nan")}, "timeout is nan"),
        ({"timeout": 10**400}, "timeout is 1000"),
        ({"timeout": "5"}, "timeout is '5'"),
        ({"stride": "2"}, "stride is '2'"),
        ({"max_frames": 2.5}, "max_frames is 2.5"),
    ],
)
def test_numbers_out_of_range(options, message):
    with pytest.raises(OptionError, match=message):
        open_source("x.png", **options)


def test_video(tmp_path):
    with open_source(write_video(tmp_path / "v.mp4")) as source:
        assert isinstance(source, VideoSource)
        assert (source.is_video, source.is_live, source.fps, source.frame_count) == (True, False, 10.0, 12)
        assert source.size == (64, 48)
        frames = list(source)
    assert [round(float(frame.image.mean()) / 20) for frame in frames] == list(range(12))
    assert [frame.index for frame in frames] == list(range(12))
    assert frames[3].time == pytest.approx(0.3)
    assert frames[0].image.shape == (48, 64, 3) and frames[0].image.flags.c_contiguous
    assert source.skipped == 0


@pytest.mark.parametrize("name", ["v.mkv", "v.ts", "v.mp4"])
def test_containers_without_a_frame_count_estimate_it(tmp_path, name):
    options = {"movflags": "frag_keyframe+empty_moov"} if name.endswith("mp4") else {}
    with open_source(write_video(tmp_path / name, **options)) as source:
        assert source.frame_count == pytest.approx(12, abs=1)
        assert values(source) == list(range(12))


@pytest.mark.skipif(sys.platform == "win32", reason="Windows allows no colon in a file name")
@pytest.mark.parametrize("name", ["2026-11-24T12:30:05.mp4", "rtsp:x.mp4", "concat:a.mp4"])
def test_a_colon_in_a_file_name_is_no_protocol(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    write_video(tmp_path / "v.mp4").rename(tmp_path / name)
    with open_source(name) as source:
        assert source.name == name and [str(file) for file in source.files] == [name]
        assert values(source) == list(range(12))


LISTS = {
    "concat": "ffconcat version 1.0\nfile 'v.mp4'\n",
    "HLS": "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nv.ts\n#EXT-X-ENDLIST\n",
    "SDP": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5000 RTP/AVP 32\n",
    "a text": "hello\n" * 1000,
}


@pytest.mark.parametrize("kind", LISTS)
@pytest.mark.parametrize("form", ["{}", "file://{}"])
def test_a_text_that_lists_other_files_is_no_video(tmp_path, kind, form):
    """FFmpeg goes by the content, whatever the name."""
    write_video(tmp_path / "v.mp4")
    write_video(tmp_path / "v.ts")
    (tmp_path / "list.mp4").write_text(LISTS[kind])
    with pytest.raises(SourceError, match=r"list\.mp4: cannot be opened as a video"):
        open_source(form.format(tmp_path / "list.mp4"))


def test_a_file_address_is_a_file(tmp_path):
    video = write_video(tmp_path / "v.mp4")
    with open_source(f"file://{video}") as source:
        assert source.files == (video,) and len(list(source)) == 12


def test_stride_and_limit_on_video(tmp_path):
    video = write_video(tmp_path / "v.mp4")
    with open_source(video, stride=5) as source:
        assert source.frame_count == 3
        assert [(frame.index, round(float(frame.image.mean()) / 20)) for frame in source] == [
            (0, 0),
            (5, 5),
            (10, 10),
        ]
    with open_source(video, stride=2, max_frames=2) as source:
        assert [frame.index for frame in source] == [0, 2]


def test_skipped_frames_of_a_stride_are_not_converted(tmp_path, monkeypatch):
    from glip_deploy.video import video_in as video_source

    converted = []
    plain = video_source._rgb
    monkeypatch.setattr(video_source, "_rgb", lambda picture: converted.append(picture) or plain(picture))
    with open_source(write_video(tmp_path / "v.mp4"), stride=4) as source:
        assert len(list(source)) == len(converted) == 3


@pytest.mark.parametrize(("rotation", "corner"), [(-90, (0, -1)), (90, (-1, 0)), (180, (-1, -1))])
def test_rotation_of_a_phone_video_is_respected(tmp_path, rotation, corner):
    probe = write_video(tmp_path / "plain.mp4")
    with av.open(str(probe)) as container:
        if not hasattr(container.streams.video[0], "set_display_rotation"):
            pytest.skip("this PyAV cannot write a rotated video")
    # White is top left as stored; turned clockwise (-90) it appears top right.
    with open_source(write_video(tmp_path / "v.mp4", frames=1, rotation=rotation)) as source:
        (frame,) = source
    assert frame.image.shape[:2] == ((48, 64) if rotation == 180 else (64, 48))
    assert frame.image[corner].min() > 230
    others = [frame.image[y, x].max() for y in (0, -1) for x in (0, -1) if (y, x) != corner]
    assert max(others) < 30


def test_a_truncated_mp4_is_one_clear_error(tmp_path):
    video = write_video(tmp_path / "v.mp4")
    video.write_bytes(video.read_bytes()[: video.stat().st_size // 2])
    with pytest.raises(SourceError, match=r"v\.mp4: cannot be opened as a video .*truncated") as caught:
        open_source(video)
    assert "\n" not in str(caught.value)


def test_a_header_that_names_no_known_codec_is_one_clear_error(tmp_path):
    video = write_video(tmp_path / "v.mp4")
    video.write_bytes(video.read_bytes().replace(b"avc1", b"zzzz"))
    with pytest.raises(SourceError, match=r"v\.mp4: its pictures are in a format that FFmpeg does not know") as caught:
        open_source(video)
    assert "\n" not in str(caught.value)


def test_a_truncated_video_with_its_index_gives_the_frames_it_has(tmp_path, caplog):
    video = write_video(tmp_path / "v.mp4", movflags="faststart")
    end, size = packets_of(video)[8]
    video.write_bytes(video.read_bytes()[: end + size])
    with open_source(video) as source, caplog.at_level(logging.WARNING, "glip_deploy"):
        assert values(source)[:8] == list(range(8))
    assert "announces 12 frames" in caplog.text


def test_damaged_data_in_the_middle_is_reported_counted_and_skipped(tmp_path, caplog):
    video = write_video(tmp_path / "v.mp4")
    offset, size = packets_of(video)[5]
    data = bytearray(video.read_bytes())
    data[offset : offset + size] = b"\xff" * size
    video.write_bytes(data)
    with open_source(video) as source, caplog.at_level(logging.WARNING, "glip_deploy"):
        indices = [frame.index for frame in source]
    assert indices == [0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 11]
    assert source.skipped == 1
    assert "packet 5" in caplog.text


def test_a_bad_frame_does_not_shift_the_stride(tmp_path):
    video = write_video(tmp_path / "v.mp4")
    offset, size = packets_of(video)[5]
    data = bytearray(video.read_bytes())
    data[offset : offset + size] = b"\xff" * size
    video.write_bytes(data)
    with open_source(video, stride=2) as source:
        assert [frame.index for frame in source] == [0, 2, 4, 6, 8, 10]


def test_many_bad_frames_do_not_flood_the_log(tmp_path, caplog):
    video = write_video(tmp_path / "v.mp4", frames=40)
    data = bytearray(video.read_bytes())
    for offset, size in packets_of(video)[1:]:
        data[offset : offset + size] = b"\xff" * size
    video.write_bytes(data)
    with open_source(video) as source, caplog.at_level(logging.WARNING, "glip_deploy"):
        assert len(list(source)) == 1
    assert source.skipped == 39
    assert len(caplog.records) < 15


def test_a_video_where_nothing_can_be_decoded_is_an_error(tmp_path):
    video = write_video(tmp_path / "v.mp4")
    data = bytearray(video.read_bytes())
    for offset, size in packets_of(video):
        data[offset : offset + size] = b"\xff" * size
    video.write_bytes(data)
    with open_source(video) as source, pytest.raises(SourceError, match="not one frame could be decoded"):
        list(source)


def test_a_file_with_sound_only_is_an_error(tmp_path):
    path = tmp_path / "sound.wav"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with pytest.raises(SourceError, match="no video"):
        open_source(path)


def test_close_ends_an_iteration(tmp_path):
    source = open_source(write_video(tmp_path / "v.mp4"))
    frames = iter(source)
    next(frames)
    source.close()
    source.close()
    assert list(frames) == []


def test_a_camera_that_is_not_there():
    with pytest.raises(SourceError, match=r"camera 97.*plugged in"):
        open_source("97")


def lavfi(text, **options):
    """FFmpeg's test picture, standing in for a camera: a device format, without a duration."""
    return VideoSource(Address(text, "camera", format="lavfi", is_live=True), **options)


def test_a_camera_gives_frames_with_the_time_they_came():
    with lavfi("testsrc=size=32x24:rate=30", max_frames=3, stride=2) as source:
        assert source.is_live and source.is_video
        frames = list(source)
    assert [frame.index for frame in frames] == [0, 2, 4]
    assert 0 <= frames[0].time <= frames[1].time <= frames[2].time < 10


def test_a_camera_that_goes_away_is_an_error():
    frames = iter(lavfi("testsrc=size=32x24:rate=10:duration=0.3"))
    assert len([next(frames) for _ in range(3)]) == 3
    with pytest.raises(SourceLost, match=r"camera: lost after 3 frames"):
        next(frames)


def test_a_camera_that_comes_back_continues(monkeypatch, caplog):
    source = lavfi("testsrc=size=32x24:rate=10:duration=0.3", reconnect=2, max_frames=8)
    monkeypatch.setattr(source._closing, "wait", lambda timeout: False)  # no real pauses
    with source, caplog.at_level(logging.WARNING, "glip_deploy"):
        assert [frame.index for frame in source] == list(range(8))
    assert caplog.text.count("attempt 1 of 2") == 2


def test_reconnecting_is_bounded(monkeypatch):
    source = lavfi("testsrc=size=32x24:rate=10:duration=0.3", reconnect=2)
    frames = iter(source)
    waits = []
    monkeypatch.setattr(source._closing, "wait", lambda timeout: waits.append(timeout) is not None)

    def gone():
        raise SourceError("camera: gone")

    monkeypatch.setattr(source, "_connect", gone)
    with source, pytest.raises(SourceLost, match="camera: gone"):
        list(frames)
    assert waits == [1.0, 2.0]


@pytest.fixture
def silent_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield server.getsockname()[1]


def test_a_stream_that_never_answers_is_an_error(silent_port):
    with pytest.raises(SourceError, match=r"cannot be opened.*check the address"):
        open_source(f"rtsp://127.0.0.1:{silent_port}/x", timeout=0.3)
    with pytest.raises(SourceError, match=r"no answer within 0.3 s"):
        open_source(f"http://127.0.0.1:{silent_port}/x", timeout=0.3)


@pytest.mark.parametrize("user", ["me:secret", "me:se@secret", "me:x/secret"])
def test_a_password_is_never_shown(silent_port, user):
    with pytest.raises(SourceError) as caught:
        open_source(f"rtsp://{user}@127.0.0.1:{silent_port}/x?password=secret", timeout=0.3)
    assert "secret" not in str(caught.value) and "me" not in str(caught.value).partition(": ")[0]
    assert f"***@127.0.0.1:{silent_port}/x?password=***" in str(caught.value)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows cannot send a signal to one process alone")
def test_ctrl_c_while_a_source_opens(silent_port):
    timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
    start = time.monotonic()
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        open_source(f"http://127.0.0.1:{silent_port}/x", timeout=5)
    assert time.monotonic() - start < 4
    for thread in threading.enumerate():  # it ends at FFmpeg's own time limit
        if thread.name == "glip-open":
            thread.join()


def test_a_video_on_the_web_is_a_file_that_never_drops(tmp_path):
    write_video(tmp_path / "v.mp4", movflags="faststart")

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=tmp_path)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            with open_source(f"http://127.0.0.1:{server.server_address[1]}/v.mp4", timeout=5) as source:
                assert not source.is_live and source.frame_count == 12
                assert values(source) == list(range(12))
        finally:
            server.shutdown()


def test_a_network_stream_that_breaks_off_is_an_error(tmp_path):
    data = write_video(tmp_path / "v.ts").read_bytes()
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()

        def serve():
            connection, _ = server.accept()
            with connection:
                connection.sendall(data)

        threading.Thread(target=serve, daemon=True).start()
        with open_source(f"tcp://127.0.0.1:{server.getsockname()[1]}", timeout=5) as source:
            assert source.is_live
            count = 0
            with pytest.raises(SourceLost, match=r"lost after \d+ frames"):
                for _ in source:
                    count += 1
    assert count >= 10
