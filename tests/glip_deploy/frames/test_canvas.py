"""Preprocessing against the official numbers, and every kind of picture and array."""

import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

from glip_deploy.errors import FrameError, OptionError
from glip_deploy.frames.canvas import Canvas, Resize, make_canvas, resize
from glip_deploy.frames.geometry import MAX_NETWORK_PIXELS, network_size
from glip_deploy.frames.load import as_frame, decode_image, load_image

GOLDENS = Path(__file__).parents[2] / "data" / "goldens"
TABLE = json.loads((GOLDENS / "unit_resize_table.json").read_text())
MEAN = np.array([103.530, 116.280, 123.675], np.float32)
DEVIATION = np.array([57.375, 57.120, 58.395], np.float32)


def picture(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


# --- size ---


@pytest.mark.parametrize("row", TABLE, ids=lambda row: f"{row['w']}x{row['h']}")
def test_size_equals_the_official_table(row):
    assert network_size(row["h"], row["w"]) == (row["eval_h"], row["eval_w"])
    assert network_size(row["h"], row["w"], longest_side=None) == (row["demo_h"], row["demo_w"])


@given(st.integers(1, 20000), st.integers(1, 20000))
def test_every_size_is_at_least_one_pixel_and_swaps_with_the_sides(height, width):
    size = network_size(height, width)
    assert min(size) >= 1
    assert network_size(width, height) == size[::-1]


def test_a_thin_strip_keeps_one_pixel():
    assert network_size(1, 5000) == (1, 1333)
    assert network_size(5000, 1) == (1333, 1)


def test_a_thin_strip_without_a_longest_side_is_refused():
    with pytest.raises(FrameError, match=r"5000x1 .* side of 4000000 .* set a longest side"):
        network_size(1, 5000, longest_side=None)
    assert MAX_NETWORK_PIXELS < 800 * 4000000


def test_an_empty_picture_is_refused():
    with pytest.raises(FrameError, match="picture is 5x0: both sides must be at least 1 pixel"):
        network_size(0, 5)


@pytest.mark.parametrize("side", [0, -1, 10**9, 10**400, 10**5000, 800.0, "800", True], ids=range(8))
def test_sides_out_of_range_are_refused(side):
    for name, arguments in (("shortest_side", (side,)), ("longest_side", (800, side))):
        with pytest.raises(
            OptionError, match=f"{name} is .*; it must be a whole number of at least 1 pixel and"
        ) as caught:
            network_size(5, 5, *arguments)
        assert len(str(caught.value)) < 200
    assert network_size(5, 5, np.int64(800), np.int32(1333)) == (800, 800)


# --- canvas ---


@pytest.mark.parametrize(
    ("source", "expected", "sides"),
    [
        ("image", "demo_min64", (64, None)),
        ("image", "eval_min64_max90", (64, 90)),
        ("image_small", "demo_up_min64", (64, None)),
    ],
)
@pytest.mark.parametrize("color", ["rgb", "bgr"])
def test_equals_the_official_preprocessing(source, expected, sides, color):
    with np.load(GOLDENS / "unit_preprocess.npz") as golden:
        frame, wanted = golden[source], golden[expected]
    frame = frame if color == "rgb" else frame[:, :, ::-1]
    batch = make_canvas([frame], color=color, shortest_side=sides[0], longest_side=sides[1])
    height, width = wanted.shape[1:]
    assert batch.image_sizes.tolist() == [[height, width]]
    ours = (batch.frames[0, :height, :width].astype(np.float32) - MEAN) / DEVIATION
    np.testing.assert_allclose(ours.transpose(2, 0, 1), wanted, atol=1e-5)


def test_a_batch_is_padded_to_its_largest_with_zeros():
    wide, tall = picture(40, 100), picture(90, 30, 1)
    batch = make_canvas([wide, tall], color="bgr", shortest_side=40, longest_side=90)
    assert batch.image_sizes.tolist() == [[36, 90], [90, 30]]
    assert batch.original_sizes.tolist() == [[40, 100], [90, 30]]
    np.testing.assert_allclose(batch.scales, [[40 / 36, 100 / 90], [1, 1]])
    assert batch.frames.shape == (2, 96, 96, 3)
    assert batch.image_sizes.dtype == batch.original_sizes.dtype == np.int64
    assert not batch.frames[0, 36:].any() and not batch.frames[0, :, 90:].any()
    np.testing.assert_array_equal(batch.frames[1, :90, :30], tall)  # 90x30 needs no resizing


def test_one_array_is_a_batch_of_one():
    assert len(make_canvas(picture(10, 12), color="rgb", shortest_side=10)) == 1


def test_a_tall_and_a_wide_strip_need_no_memory_before_they_are_refused():
    """Each is within the limit; the canvas that holds both would have taken 20 GB."""
    strips = [np.zeros((60_000, 1, 3), np.uint8), np.zeros((1, 40, 3), np.uint8)]
    with pytest.raises(
        FrameError, match=r"^resized pictures of up to 1280x1920000 pixels need a canvas .* another call$"
    ):
        make_canvas(strips, color="rgb", shortest_side=32, longest_side=None)


def test_a_reused_canvas_holds_nothing_of_the_last_frame():
    first = make_canvas([np.full((60, 64, 3), 255, np.uint8)], color="bgr", shortest_side=60)
    second = make_canvas([picture(50, 64)], color="bgr", shortest_side=50, buffer=first.frames)
    assert second.frames is first.frames
    fresh = make_canvas([picture(50, 64)], color="bgr", shortest_side=50)
    np.testing.assert_array_equal(second.frames, fresh.frames)


def test_a_buffer_that_does_not_fit_is_left_alone():
    other = np.full((1, 32, 32, 3), 7, np.uint8)
    batch = make_canvas([picture(50, 64)], color="bgr", shortest_side=50, buffer=other)
    assert batch.frames is not other and (other == 7).all()


@pytest.mark.parametrize("color", [None, "", "gbr", 3])
def test_the_color_has_no_default(color):
    with pytest.raises(OptionError, match=r'color is .*; it must be "bgr" or "rgb"'):
        make_canvas([picture(4, 4)], color=color)


def test_no_frames():
    with pytest.raises(FrameError, match="at least one picture"):
        make_canvas([], color="rgb")


def test_one_pixel():
    batch = make_canvas([np.array([[[1, 2, 3]]], np.uint8)], color="rgb", shortest_side=64)
    assert isinstance(batch, Canvas) and batch.image_sizes.tolist() == [[64, 64]]
    assert (batch.frames[0] == [3, 2, 1]).all()


# --- resize ---


@pytest.mark.parametrize("size", [(20, 31), (40, 62), (120, 186)])
def test_exact_is_pillow_bilinear(size):
    frame = picture(60, 93)
    wanted = np.asarray(Image.fromarray(frame).resize(size[::-1], Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(resize(frame, size), wanted)


@pytest.mark.parametrize("size", [(150, 200), (50, 70), (600, 800)])
def test_fast_is_near_exact_on_a_smooth_picture(size):
    ramp = np.linspace(0, 255, 400)[None, :, None] * np.linspace(0.2, 1, 300)[:, None, None]
    frame = np.repeat(ramp, 3, axis=2).astype(np.uint8)
    fast = resize(frame, size, Resize.FAST)
    assert fast.shape == (*size, 3)
    assert np.abs(fast.astype(int) - resize(frame, size)).max() <= 3


def test_unknown_method():
    with pytest.raises(OptionError, match=r"resize is 'cubic'; it must be \"exact\" or \"fast\" or \"gpu\""):
        resize(picture(4, 4), (2, 2), "cubic")


# --- frames ---


def test_a_legal_frame_is_not_copied():
    frame = picture(5, 6)
    assert np.shares_memory(as_frame(frame), frame)


@pytest.mark.filterwarnings("ignore:the matrix subclass")
def test_a_matrix_is_an_array():
    gray = picture(5, 6)[:, :, 0]
    np.testing.assert_array_equal(as_frame(np.matrix(gray)), as_frame(gray))


def test_gray_alpha_and_sixteen_bits():
    gray = picture(5, 6)[:, :, 0]
    np.testing.assert_array_equal(as_frame(gray), np.stack([gray] * 3, axis=2))
    np.testing.assert_array_equal(as_frame(gray[:, :, None]), as_frame(gray))
    rgba = np.concatenate([picture(5, 6), np.zeros((5, 6, 1), np.uint8)], axis=2)
    np.testing.assert_array_equal(as_frame(rgba), rgba[:, :, :3])
    deep = np.array([[0, 128, 129, 257, 32768, 65535]], np.uint16)
    assert as_frame(deep)[0, :, 0].tolist() == [0, 0, 1, 1, 128, 255]


@pytest.mark.parametrize(
    ("array", "match"),
    [
        (np.zeros((4, 4, 3), np.float32), r"shape \(4, 4, 3\) and dtype float32; legal dtypes are uint8"),
        (np.zeros((4, 4, 3), bool), "dtype bool"),
        (np.zeros((4, 4, 2), np.uint8), r"shape \(4, 4, 2\).*legal shapes"),
        (np.zeros((3, 40, 50), np.uint8), r"transpose\(1, 2, 0\)"),
        (np.zeros((1, 4, 4, 3), np.uint8), "one picture at a time"),
        (np.zeros(4, np.uint8), "legal shapes"),
        (np.zeros((0, 4, 3), np.uint8), "at least 1 pixel"),
        (np.broadcast_to(np.uint8(0), (20000, 20000, 3)), "400000000 pixels, more than the 178956970"),
        ([[1, 2], [3, 4]], "not list"),
        (None, "not NoneType"),
    ],
)
def test_illegal_frames(array, match):
    with pytest.raises(FrameError, match=match) as caught:
        as_frame(array)
    assert "\n" not in str(caught.value)


# --- files ---


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "LA", "RGBA", "CMYK", "YCbCr"])
def test_every_mode_becomes_what_the_official_code_sees(tmp_path, mode):
    name = {"CMYK": "x.tif", "YCbCr": "x.tif"}.get(mode, "x.png")
    Image.fromarray(picture(7, 9)).convert(mode).save(tmp_path / name)
    loaded = load_image(tmp_path / name)
    assert loaded.dtype == np.uint8 and loaded.flags.c_contiguous
    with Image.open(tmp_path / name) as image:
        np.testing.assert_array_equal(loaded, np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("name", ["x.png", "x.tif"])
def test_sixteen_bit_files_use_their_full_range(tmp_path, name):
    samples = np.array([[0, 257, 32768, 65535]], np.uint16)
    Image.fromarray(samples).save(tmp_path / name)
    assert load_image(tmp_path / name)[0, :, 1].tolist() == [0, 1, 128, 255]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(picture(4, 6)).save(tmp_path / "x.png", exif=exif)
    with Image.open(tmp_path / "x.png") as image:
        wanted = np.asarray(ImageOps.exif_transpose(image))
    np.testing.assert_array_equal(load_image(tmp_path / "x.png"), wanted)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_does_not_lose_the_picture(tmp_path):
    Image.fromarray(picture(4, 6)).save(tmp_path / "x.png", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\0\1")
    np.testing.assert_array_equal(load_image(tmp_path / "x.png"), picture(4, 6))


def test_a_float_file_is_refused(tmp_path):
    Image.fromarray(np.zeros((3, 3), np.float32)).save(tmp_path / "x.tif")
    with pytest.raises(FrameError, match="floating-point"):
        load_image(tmp_path / "x.tif")


def test_a_32_bit_file_is_refused(tmp_path):
    Image.fromarray(np.full((3, 3), 70000, np.int32)).save(tmp_path / "x.tif")
    with pytest.raises(FrameError, match="32-bit samples"):
        load_image(tmp_path / "x.tif")


def test_a_name_that_is_too_long(tmp_path):
    with pytest.raises(FrameError, match="cannot be decoded") as caught:
        load_image(tmp_path / ("n" * 300))
    assert "\n" not in str(caught.value)


def test_missing_folder_empty_text_truncated(tmp_path):
    with pytest.raises(FrameError, match="does not exist"):
        load_image(tmp_path / "absent.jpg")
    with pytest.raises(FrameError, match="is not a file"):
        load_image(tmp_path)
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "text.jpg").write_text("no picture")
    for name in ("empty.jpg", "text.jpg"):
        with pytest.raises(FrameError, match="not in a format"):
            load_image(tmp_path / name)
    for suffix in ("jpg", "png", "webp", "gif", "bmp"):
        whole = tmp_path / f"whole.{suffix}"
        Image.fromarray(picture(64, 64)).save(whole)
        cut = tmp_path / f"cut.{suffix}"
        cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
        with pytest.raises(FrameError, match=r"cannot be decoded|not in a format") as caught:
            load_image(cut)
        assert str(cut) in str(caught.value) and "\n" not in str(caught.value)


def test_bytes_are_decoded_as_the_file_is(tmp_path):
    Image.fromarray(picture(64, 48)).save(tmp_path / "whole.jpg")
    data = (tmp_path / "whole.jpg").read_bytes()
    assert np.array_equal(decode_image(data), load_image(tmp_path / "whole.jpg"))
    with pytest.raises(FrameError, match=r"^picture is empty \(0 bytes\)"):
        decode_image(b"")
    with pytest.raises(FrameError, match=r"^picture 2 of 3 is not in a format Pillow can read; convert it"):
        decode_image(b"no picture", "2 of 3")
    with pytest.raises(FrameError, match=r"^picture cannot be decoded \(.*\); it may be truncated, write it again$"):
        decode_image(data[:400])
    bare_png(tmp_path / "bomb.png", 20000, 20000)
    with pytest.raises(FrameError, match=r"^picture is too large \(400000000 pixels\)"):
        decode_image((tmp_path / "bomb.png").read_bytes())


def bare_png(path, width, height):
    """A PNG that claims a size and holds almost nothing: what a decompression bomb looks like."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")
    )


def test_a_20000_by_20000_file_is_refused_before_it_is_decoded(tmp_path):
    bare_png(tmp_path / "bomb.png", 20000, 20000)
    with pytest.raises(FrameError, match=r"too large \(400000000 pixels\); at most 178956970"):
        load_image(tmp_path / "bomb.png")


def test_the_limit_holds_where_pillow_has_none(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    bare_png(tmp_path / "bomb.png", 20000, 20000)
    with pytest.raises(FrameError, match=r"too large \(20000x20000, 400000000 pixels\)"):
        load_image(tmp_path / "bomb.png")
