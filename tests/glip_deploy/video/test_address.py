"""What is a file, a camera or a network address, and that credentials are never shown."""

from pathlib import Path

import pytest

from glip_deploy.video.address import Address, live_address, without_credentials


@pytest.mark.parametrize(
    "text", ["a.mp4", "2026-11-24T12:30:05.mp4", r"C:\videos\a.mp4", "rtsp:x", "12:30", "a@b:c.mkv"]
)
def test_names_of_files_are_no_addresses(text):
    assert live_address(text) is None


def test_addresses():
    stream = live_address("RTSP://host/x")
    assert stream.is_live and stream.is_remote and stream.options == {"rtsp_transport": "tcp"} and stream.file is None
    web = live_address("https://host/v.mp4")
    assert web.is_remote and not web.is_live
    assert live_address("file:///tmp/v.mp4").file == Path("/tmp/v.mp4")
    local = Address.of_file(Path("12:30.mp4"))
    assert local == Address("file:12:30.mp4", "12:30.mp4", options=local.options, file=Path("12:30.mp4"))
    assert local.options["protocol_whitelist"] == "file" and "concat" not in local.options["format_whitelist"]
    assert live_address("file:///tmp/v.mp4").options == local.options


def test_a_number_is_a_camera_unless_there_is_such_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.platform", "linux")
    assert live_address("3").target == "/dev/video3"
    Path("3").write_bytes(b"")
    assert live_address("3") is None


@pytest.mark.parametrize(
    "user",
    [
        "me:secret",
        "me:se@cret",
        "secret",
        "me:sec/ret",
        "me:se?cret@secret",
        "me:s#ecret",
        "me:se/c@r@secret",
        "me:se@1/secret@x",
        "me:/secret",
        "me:?secret",
        "secret:#",
    ],
)
@pytest.mark.parametrize("rest", ["host/path", "host:554/path?channel=1", "[::1]:554/"])
def test_no_part_of_the_user_information_is_shown(user, rest):
    shown = without_credentials(f"rtsp://{user}@{rest}")
    assert shown == f"rtsp://***@{rest}"


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("http://h/v?password=all&x=1", "http://h/v?password=***&x=1"),
        ("http://h/v?x=1&PWD=a;usr=me#t", "http://h/v?x=1&PWD=***;usr=***#t"),
        (
            "http://h/v?access_token=a.b-c&X-Amz-Signature=f00&apikey=k",
            "http://h/v?access_token=***&X-Amz-Signature=***&apikey=***",
        ),
        ("rtsp://h:554/user=admin_password=tl_channel=1", "rtsp://h:554/user=***"),
        ("rtsp://h:554/user=admin&password=&channel=1", "rtsp://h:554/user=***&password=***&channel=1"),
        ("rtsp://h:554/stream@1?channel=1", "rtsp://h:554/stream@1?channel=1"),
        ("http://[::1]:80/v.mp4?t=a@b", "http://[::1]:80/v.mp4?t=a@b"),
    ],
)
def test_values_that_look_secret_are_not_shown(url, shown):
    assert without_credentials(url) == shown
