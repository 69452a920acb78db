"""What is fuzzed: for each area, how hostile bytes are made and what reads them.

`run` may return, or raise a GlipError whose message is one line of bounded length. Anything else is a fault, as is a
result that says other than it should (asserted). Both only depend on the bytes, so a fault is kept as a file.

To add an area, subclass `Area` and name it in `AREAS`.
"""

from __future__ import annotations

import asyncio
import base64
import copy
import io
import json
import random
import shutil
import struct
import tempfile
import zipfile
from abc import ABC, abstractmethod
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from glip_deploy import Bundle, Caption, ClassName, Detector, GlipError

LONGEST_MESSAGE = 2000
"""Characters: names of files, which may be 4,000 long, are left out of the count."""
HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]


def check_message(error: GlipError, folder: Path) -> None:
    """Check what a user would read."""
    text = str(error).replace(str(folder), "")
    assert text.strip() and "\n" not in text, f"{type(error).__name__}: {text!r}"
    assert len(text) <= LONGEST_MESSAGE, f"{type(error).__name__} of {len(text)} characters: {text[:300]!r}"


class Area(ABC):
    """One kind of input."""

    name: str

    def __init__(self, bundle: Path, folder: Path) -> None:
        """Take a bundle of a tiny GLIP, which is not changed, and a folder of this area's own."""
        self.bundle, self.folder = bundle, folder

    @abstractmethod
    def make(self, draw: random.Random) -> bytes:
        """Make a hostile input."""

    @abstractmethod
    def run(self, data: bytes) -> None:
        """Give it to the code under test."""


def mutated(draw: random.Random, data: bytes, most: int = 8) -> bytes:
    """Return bytes with a few changes of the kinds that damage and malice make."""
    out = bytearray(data)
    for _ in range(draw.randint(1, most)):
        at = draw.randrange(len(out)) if out else 0
        kind = draw.randrange(9)
        if kind == 0:
            del out[at:]
        elif kind == 1 and out:
            out[at] ^= 1 << draw.randrange(8)
        elif kind == 2 and out:
            out[at] = draw.choice((0, 1, 0x7F, 0x80, 0xFF, draw.randrange(256)))
        elif kind == 3:
            del out[at : at + draw.choice((1, 2, 4, 16, 256))]
        elif kind == 4:
            out[at:at] = draw.randbytes(draw.choice((1, 2, 4, 16, 256)))
        elif kind == 5:
            number = draw.choice((0, 1, -1, 2**31 - 1, -(2**31), 2**16, draw.getrandbits(31)))
            out[at : at + 4] = struct.pack(draw.choice(("<i", ">i")), number)
        elif kind == 6:
            start, size = draw.randrange(len(out) + 1), draw.choice((4, 32, 512))
            out[at:at] = out[start : start + size]
        elif kind == 7:
            out[at : at + draw.choice((4, 64, 1024))] = b"\0" * draw.choice((4, 64, 1024))
        elif out:
            other = draw.randrange(len(out))
            out[at], out[other] = out[other], out[at]
    return bytes(out)


SPECIAL: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 0.5, 1e308, -0.0, 10**30, 2**63, -(2**63), 2**31, 10**400, 4096),
    *("", " ", "a", "\0", "..", "/", "../../etc/passwd", "x" * 300, "\ud800", "١", "NaN", "1e999", "\u202e", "\n"),
    *([], {}, [[]], [None], {"": None}, [0] * 100, [1, 2], [-1, 5], {"a": {"b": []}}),
)


def special(draw: random.Random) -> Any:
    """Return a value that readers may not expect; a list or dictionary is a new one."""
    return copy.deepcopy(draw.choice(SPECIAL))


def mutated_json(draw: random.Random, value: Any, most: int = 3) -> Any:
    """Return a JSON value with a few of its parts replaced, removed, repeated or renamed."""
    value = json.loads(json.dumps(value))
    for _ in range(draw.randint(1, most)):
        places: list[tuple[Any, Any]] = []

        def walk(part: Any, places: list[tuple[Any, Any]] = places) -> None:
            for key in part if isinstance(part, dict) else range(len(part)) if isinstance(part, list) else ():
                places.append((part, key))
                walk(part[key])

        walk(value)
        if not places:
            return special(draw)
        holder, key = draw.choice(places)
        kind = draw.randrange(6)
        if kind <= 2:
            holder[key] = special(draw)
        elif kind == 3:
            del holder[key]
        elif kind == 4:
            other, from_key = draw.choice(places)
            if isinstance(other, dict) or from_key < len(other):
                holder[key] = json.loads(
                    json.dumps(other.get(from_key) if isinstance(other, dict) else other[from_key])
                )
        elif isinstance(holder, dict):
            holder[draw.choice(("x", "", "sha256", "é" * 9))] = holder.pop(key)
        else:
            holder.extend(json.loads(json.dumps(holder[:4])))
    return value


def hostile_json(draw: random.Random, value: Any) -> bytes:
    """Return JSON text: changed in its structure, its bytes, or both."""
    text = json.dumps(mutated_json(draw, value) if draw.random() < 0.8 else value)
    if draw.random() < 0.2:
        text = text.replace(draw.choice((":", ",", "1", '"')), draw.choice(("", "1e999", "[" * 5000, "NaN", "\0")), 1)
    data = text.encode("utf-8", "surrogatepass")
    return mutated(draw, data) if draw.random() < 0.3 else data


class Prompts(Area):
    """Strings, lists, captions with spans, prompt files, thresholds: all as JSON."""

    name = "prompts"
    WORDS = ("person", "red car", "dog", "a man with a [green hat]", "traffic_light", "cat (animal)", "DOG", "dog")
    PIECES = (
        *"[]\\.()_,;|'\"/#- \t\n\0",
        ". ",
        " . ",
        "[dog]",
        "\\[",
        "é",
        "中",
        "\u0301",
        "a" * 300,
        "\ud800",
        "🐕",
        "ﬁ",
        "İ",
        "ß",
    )

    @cached_property
    def tokenizer(self) -> Any:
        """The tiny bundle's."""
        return Bundle.open(self.bundle, verify=False).tokenizer()

    def text(self, draw: random.Random) -> str:
        """Make a text of words, and of hostile pieces in half of the cases."""
        hostile = draw.choice((0.0, 0.4))
        parts = [draw.choice(self.PIECES if draw.random() < hostile else self.WORDS) for _ in range(draw.randint(1, 6))]
        return draw.choice(("", " ", ". ")).join(parts) * draw.choice((*[1] * 20, 40))

    def make(self, draw: random.Random) -> bytes:
        """See `Area.make`."""
        kind = draw.choice(("string", "names", "classes", "caption", "file.txt", "file.json"))
        value: Any = self.text(draw)
        if kind in ("names", "file.json"):
            value = [
                self.text(draw) if draw.random() < 0.9 else draw.choice(SPECIAL) for _ in range(draw.randint(0, 9))
            ]
        elif kind == "classes":
            value = [
                {"name": self.text(draw), "prefix": self.text(draw), "suffix": draw.choice((self.text(draw), 5))}
                for _ in range(draw.randint(1, 4))
            ]
        elif kind == "caption":
            spans: list[Any] = [
                [draw.randint(-2, 30), draw.randint(-2, 30)] if draw.random() < 0.8 else draw.choice(SPECIAL)
                for _ in range(draw.randint(0, 4))
            ]
            labels = draw.choice((None, None, [self.text(draw)] * len(spans), draw.choice(SPECIAL)))
            value = {"caption": value, "spans": spans, "phrases": labels}
            kind = draw.choice(("caption", "file.json"))
        limits = draw.choice((*[0.5] * 9, [0.5] * draw.randint(0, 4), {self.text(draw): 0.2}, draw.choice(SPECIAL)))
        how = draw.choice((*["auto", "whole", "dots"] * 6, draw.choice(("", "AUTO", None))))
        return json.dumps([kind, value, limits, how]).encode()

    def run(self, data: bytes) -> None:
        """See `Area.run`."""
        from glip_deploy.prompts import parse_prompt, read_prompt_file, thresholds

        try:
            kind, value, limits, how = json.loads(data)
        except (ValueError, RecursionError, TypeError):
            kind, value, limits, how = "string", data.decode("utf-8", "surrogateescape"), 0.5, "auto"
        if str(kind).startswith("file"):
            file = self.folder / ("p.json" if kind == "file.json" else "p.txt")
            text = json.dumps(value) if kind == "file.json" else str(value)
            file.write_bytes(text.encode("utf-8", "surrogatepass"))
            value = read_prompt_file(file)
        elif kind == "classes" and isinstance(value, list):
            value = [ClassName(**entry) if isinstance(entry, dict) else entry for entry in value]
        elif kind == "caption" and isinstance(value, dict):
            value = Caption(value.get("caption"), value.get("spans"), value.get("phrases"))  # type: ignore[arg-type]
        prompt = parse_prompt(value, self.tokenizer, phrases=how)
        assert len(prompt) > 0 and len(prompt.input_ids) <= 256
        assert all(prompt.class_map.sum(1).round(4) == 1) and prompt.key
        assert thresholds(prompt, limits).shape == (len(prompt),)


class Frames(Area):
    """Arrays of every shape, type and layout, with options: as JSON."""

    name = "frames"

    def make(self, draw: random.Random) -> bytes:
        """See `Area.make`."""

        def frame() -> dict[str, Any]:
            def side() -> Any:
                return draw.choice((1, 2, 3, 31, 32, 33, 64, 100, *(draw.randint(0, 300) for _ in range(3))))

            shape = [side(), side(), draw.choice((3, 3, 3, 3, 3, 3, 1, 4, 2))][: draw.choice((3, 3, 3, 3, 3, 3, 2, 1))]
            if draw.random() < 0.05:
                shape = draw.choice(([1, 60000, 3], [60000, 1, 3], [2, 3, 4, 3], [10**6, 10**6, 3], [1] * 10))
            kinds = (*["u1"] * 30, "u2", ">u2", "f4", "f8", "i8", "?", "c8", "O", "M8[s]", "S3", "f2")
            layout = draw.choice(
                ("plain", "plain", "reversed", "step", "fortran", "broadcast", "transposed", "read-only")
            )
            return {"shape": shape, "dtype": draw.choice(kinds), "layout": layout, "seed": draw.getrandbits(16)}

        frames: list[Any] = [frame() for _ in range(draw.choice((1, 1, 1, 2, 3)))]
        if draw.random() < 0.05:
            frames.append(draw.choice(SPECIAL))

        def side() -> Any:
            return draw.choice((1, 2, 32, 64, 128, 129, *[96] * 9, draw.choice(SPECIAL)))

        options = {
            "color": draw.choice((*["rgb", "bgr"] * 8, draw.choice(SPECIAL))),
            "shortest_side": side(),
            "longest_side": draw.choice((None, 256, 1333, side())),
            "method": draw.choice((*["exact", "fast"] * 8, draw.choice(SPECIAL))),
        }
        return json.dumps({"frames": frames, "options": options}).encode()

    @staticmethod
    def array(facts: Any) -> Any:
        """Build an array from its description; what is no description stays."""
        if not isinstance(facts, dict) or "shape" not in facts:
            return facts
        shape = tuple(facts["shape"])
        if facts["layout"] == "broadcast" or np.prod([float(side) for side in shape]) > 2**22:
            return np.broadcast_to(np.zeros((), facts["dtype"]), shape)
        pixels = np.random.default_rng(facts["seed"]).integers(0, 256, shape).astype(facts["dtype"])
        if facts["layout"] == "reversed":
            return pixels[::-1]
        if facts["layout"] == "step":
            return pixels[::2]
        if facts["layout"] == "fortran":
            return np.asfortranarray(pixels)
        if facts["layout"] == "transposed":
            return pixels.T
        pixels.setflags(write=facts["layout"] != "read-only")
        return pixels

    def run(self, data: bytes) -> None:
        """See `Area.run`."""
        from glip_deploy.frames.device import network_canvas

        given = json.loads(data)
        frames = [self.array(facts) for facts in given["frames"]]
        canvas = network_canvas(frames, **given["options"])
        batch, height, width, channels = canvas.pixels.shape
        assert (batch, channels) == (len(frames), 3) and height % 32 == width % 32 == 0
        assert (canvas.image_sizes >= 1).all() and (canvas.image_sizes <= (height, width)).all()


class Pictures(Area):
    """Picture files, damaged."""

    name = "pictures"
    FORMATS = ("jpeg", "png", "webp", "bmp", "gif", "tiff", "ppm", "tga", "ico", "pcx", "jpeg2000", "sgi", "dds", "xbm")

    @cached_property
    def good(self) -> list[bytes]:
        """One file of each format that Pillow writes, in several modes."""
        from PIL import Image

        pixels = np.random.default_rng(0).integers(0, 256, (24, 40, 4), dtype=np.uint8)
        files = []
        for format_ in self.FORMATS:
            for mode in ("RGB", "L", "RGBA", "P", "CMYK", "I;16", "1"):
                stream = io.BytesIO()
                try:
                    exif = Image.Exif()
                    exif[0x0112] = 6
                    image = Image.fromarray(pixels, "RGBA").convert("RGB").convert(mode)
                    image.save(stream, format_, **({"exif": exif} if format_ in ("jpeg", "png", "webp") else {}))
                except (OSError, ValueError, KeyError):
                    continue
                files.append(stream.getvalue())
        return files

    def make(self, draw: random.Random) -> bytes:
        """See `Area.make`."""
        return mutated(draw, draw.choice(self.good)) if draw.random() < 0.97 else draw.randbytes(draw.randint(0, 200))

    def run(self, data: bytes) -> None:
        """See `Area.run`."""
        from glip_deploy import load_image
        from glip_deploy.video.open import open_source

        # The suffix follows from the bytes, so that a kept file behaves as the one it was kept from.
        file = self.folder / f"p{('.jpg', '.png', '', '.dat')[sum(data[-4:]) % 4]}"
        file.write_bytes(data)
        error: GlipError | None = None
        try:
            picture = load_image(file)
            assert picture.ndim == 3 and picture.shape[2] == 3 and picture.dtype == np.uint8
        except GlipError as caught:
            error = caught
            check_message(caught, self.folder)
        with open_source(str(file)) as source:
            frames = [frame.image.shape for frame in source]
        assert error is None or not frames or file.suffix in ("", ".dat")


class Videos(Area):
    """Video files, damaged."""

    name = "videos"

    @cached_property
    def good(self) -> list[bytes]:
        """A second of video in several containers."""
        import av

        files = []
        for suffix, codec in (
            (".mp4", "mpeg4"),
            (".mkv", "mpeg4"),
            (".avi", "mjpeg"),
            (".webm", "libvpx"),
            (".ts", "mpeg2video"),
        ):
            path = self.folder / f"good{suffix}"
            with av.open(str(path), "w") as container:
                stream: Any = container.add_stream(codec, rate=10)
                stream.width, stream.height, stream.pix_fmt = 64, 48, "yuvj420p" if codec == "mjpeg" else "yuv420p"
                for i in range(8):
                    pixels = np.full((48, 64, 3), i * 30, np.uint8)
                    for packet in stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")):
                        container.mux(packet)
                for packet in stream.encode():
                    container.mux(packet)
            files.append(path.read_bytes())
        return files

    def make(self, draw: random.Random) -> bytes:
        """See `Area.make`."""
        return mutated(draw, draw.choice(self.good)) if draw.random() < 0.97 else draw.randbytes(draw.randint(0, 200))

    def run(self, data: bytes) -> None:
        """See `Area.run`."""
        from glip_deploy.video.open import open_source

        file = self.folder / "v.mp4"
        file.write_bytes(data)
        with open_source(str(file), max_frames=20) as source:
            for frame in source:
                assert frame.image.ndim == 3 and frame.image.dtype == np.uint8


class Manifests(Area):
    """`manifest.json` of a bundle whose other files are good; opened without hashes."""

    name = "manifests"

    @cached_property
    def good(self) -> Any:
        """The tiny bundle's manifest."""
        return json.loads((self.bundle / "manifest.json").read_bytes())

    @cached_property
    def copy(self) -> Path:
        """A copy of the bundle."""
        return Path(shutil.copytree(self.bundle, self.folder / "bundle"))

    def make(self, draw: random.Random) -> bytes:
        """See `Area.make`."""
        return hostile_json(draw, self.good)

    def run(self, data: bytes) -> None:
        """See `Area.run`."""
        (self.copy / "manifest.json").write_bytes(data)
        bundle = Bundle.open(self.copy, verify=False)
        assert 0 <= bundle.score_threshold <= 1 and 0 <= bundle.nms_iou <= 1 and bundle.max_detections >= 1
        assert len(bundle.key) == 64 and bundle.max_tokens >= 1
        bundle.tokenizer()


class Bundles(Area):
    """A whole bundle with a damaged file; what opens must detect, and a file that differs must not verify."""

    name = "bundles"
    FILES = ("tokenizer.json", "text.onnx", "text.onnx.data", "image.onnx", "image.onnx.data", "manifest.json")

    def make(self, draw: random.Random) -> bytes:
        """See `Area.make`."""
        how = draw.choice(("bytes", "bytes", "bytes", "missing", "empty", "folder", "link loop", "other file"))
        return json.dumps(
            [draw.choice(self.FILES), how, draw.getrandbits(32), draw.random() < 0.5, draw.random() < 0.5]
        ).encode()

    def run(self, data: bytes) -> None:
        """See `Area.run`."""
        name, how, seed, honest, verify = json.loads(data)
        draw = random.Random(seed)
        copy = Path(tempfile.mkdtemp(dir=self.folder))
        try:
            shutil.copytree(self.bundle, copy, dirs_exist_ok=True)
            file, before = copy / name, (self.bundle / name).read_bytes()
            file.unlink()
            if how == "bytes":
                file.write_bytes(mutated(draw, before))
            elif how == "empty":
                file.write_bytes(b"")
            elif how == "folder":
                file.mkdir()
            elif how == "link loop":
                file.symlink_to(file.name)
            elif how == "other file":
                file.write_bytes((self.bundle / draw.choice(self.FILES)).read_bytes())
            same = file.is_file() and file.read_bytes() == before
            if honest and file.is_file() and name != "manifest.json":  # malice: the hash is right, the file is not
                import hashlib

                manifest = json.loads((copy / "manifest.json").read_bytes())
                content = file.read_bytes()
                manifest["files"][name] = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
                (copy / "manifest.json").write_text(json.dumps(manifest))
            with Detector.open(
                copy, verify=verify, shortest_side=64, threads=1, cache_dir=None, trusted=False
            ) as detector:
                assert not verify or honest or same or name == "manifest.json"
                found = detector.detect(np.zeros((48, 64, 3), np.uint8), ["person", "dog"], 0.1, color="rgb")
            assert np.isfinite(found.boxes).all() and (found.boxes >= 0).all() and (found.scores <= 1).all()
            assert set(found.labels) <= {0, 1}
        finally:
            shutil.rmtree(copy, ignore_errors=True)


class Checkpoints(Area):
    """`.pth` files, damaged: bytes of the archive, or entries of it."""

    name = "checkpoints"

    @cached_property
    def good(self) -> bytes:
        """A tiny checkpoint."""
        from tiny_glip import write_tiny

        return Path(write_tiny(self.folder / "tiny.pth")).read_bytes()

    def make(self, draw: random.Random) -> bytes:
        """See `Area.make`."""
        if draw.random() < 0.4:
            return mutated(draw, self.good)
        out = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(self.good)) as given, zipfile.ZipFile(out, "w") as made:
            names = given.namelist()
            pickle = next(name for name in names if name.endswith("data.pkl"))
            victim = pickle if draw.random() < 0.6 else draw.choice(names)
            for name in names:
                content = given.read(name)
                made.writestr(name, mutated(draw, content, 3) if name == victim else content)
        return out.getvalue()

    def run(self, data: bytes) -> None:
        """See `Area.run`."""
        from glip_export.checkpoints import load_checkpoint

        file = self.folder / "c.pth"
        file.write_bytes(data)
        load_checkpoint(file, None)


class Engines(Area):
    """`build.json` beside engines."""

    name = "engines"

    @cached_property
    def engines(self) -> Path:
        """A copy of the bundle with engines for the simulated TensorRT."""
        from simulated_tensorrt import write_engines

        copy = shutil.copytree(self.bundle, self.folder / "bundle")
        return Path(write_engines(Bundle.open(copy)))

    @cached_property
    def good(self) -> Any:
        """A record."""
        return json.loads((self.engines / "build.json").read_bytes())

    def make(self, draw: random.Random) -> bytes:
        """See `Area.make`."""
        return hostile_json(draw, self.good)

    def run(self, data: bytes) -> None:
        """See `Area.run`."""
        from glip_deploy.bundle.engines import EngineRecord, Machine, read_records

        (self.engines / "build.json").write_bytes(data)
        bundle = Bundle.open(self.engines.parents[1], verify=False)
        record = EngineRecord.read(self.engines)
        assert read_records(bundle.path) == [(self.engines, record)]
        record.check(
            self.engines, bundle, Machine(record.flavour, record.version, record.gpu or "", record.compute_capability)
        )


class CacheEntries(Area):
    """Files of the prompt cache: a damaged one is a miss, never another embedding."""

    name = "cache entries"
    KEY = "a" * 64

    @cached_property
    def embedding(self) -> Any:
        """What was stored."""
        return np.random.default_rng(0).normal(size=(5, 32)).astype(np.float32)

    @cached_property
    def good(self) -> bytes:
        """Its file."""
        from glip_deploy.prompts.cache import PromptCache

        cache = PromptCache(self.folder / "cache", "b" * 64)
        cache.put(self.KEY, self.embedding)
        (self.file,) = (self.folder / "cache").rglob("*.embedding")
        return Path(self.file).read_bytes()

    def make(self, draw: random.Random) -> bytes:
        """See `Area.make`."""
        return mutated(draw, self.good)

    def run(self, data: bytes) -> None:
        """See `Area.run`."""
        from glip_deploy.prompts.cache import PromptCache

        good = self.good
        self.file.write_bytes(data)
        found = PromptCache(self.folder / "cache", "b" * 64).get(self.KEY)
        assert (found is not None) == (data == good)
        assert found is None or np.array_equal(found, self.embedding)


class Categories(Area):
    """COCO annotation files, from which names and ids are taken."""

    name = "COCO categories"
    GOOD = {  # noqa: RUF012
        "categories": [{"id": 1, "name": "person"}, {"id": 7, "name": "traffic light", "supercategory": "x"}],
        "images": [{"id": 139, "file_name": "000000000139.jpg", "height": 10, "width": 20}],
    }

    def make(self, draw: random.Random) -> bytes:
        """See `Area.make`."""
        return hostile_json(draw, self.GOOD)

    def run(self, data: bytes) -> None:
        """See `Area.run`."""
        from glip_deploy.results.coco import CocoIds, read_coco_names

        file = self.folder / "c.json"
        file.write_bytes(data)
        categories, images = read_coco_names(file)
        assert all(isinstance(number, int) for number in (*categories.values(), *images.values()))
        CocoIds(categories, images).check(["person"])


class Configurations(Area):
    """Official YAML configurations for glip-export."""

    name = "configurations"
    GOOD = b"""MODEL:
  META_ARCHITECTURE: "GeneralizedVLRCNN"
  RPN_ONLY: True
  LANGUAGE_BACKBONE: {MODEL_TYPE: "bert-base-uncased", MAX_QUERY_LEN: 256}
  DYHEAD: {NUM_CONVS: 2, FUSE_CONFIG: {EARLY_FUSE_ON: True, TYPE: "MHA-B"}}
  ATSS: {INFERENCE_TH: 0.05, NMS_TH: 0.6, PRE_NMS_TOP_N: 1000, DETECTIONS_PER_IMG: 100}
INPUT: {MIN_SIZE_TEST: 800, MAX_SIZE_TEST: 1333, PIXEL_MEAN: [103.53, 116.28, 123.675]}
TEST: {DURING_TRAINING: False}
"""

    def make(self, draw: random.Random) -> bytes:
        """See `Area.make`."""
        if draw.random() < 0.5:
            return mutated(draw, self.GOOD)
        words = self.GOOD.split(b" ")
        for _ in range(draw.randint(1, 3)):
            tokens = (
                b"!!python/object/apply:os.system",
                b"&a",
                b"*a",
                b"[" * 2000,
                b"1e999",
                b"-",
                b"null",
                b"{",
                b"0x" + b"f" * 3000,
            )
            words[draw.randrange(len(words))] = draw.choice(tokens)
        return b" ".join(words)

    def run(self, data: bytes) -> None:
        """See `Area.run`."""
        from glip_export.official_config import apply_official_config
        from tiny_glip import tiny_config

        file = self.folder / "c.yaml"
        file.write_bytes(data)
        apply_official_config(tiny_config(), file)


class Addresses(Area):
    """Addresses of streams: whatever their form, what is shown has no password."""

    name = "addresses"
    SECRET = "Zq7secretZq7"

    def make(self, draw: random.Random) -> bytes:
        """See `Area.make`."""

        def noise() -> str:
            return "".join(draw.choice("@:/?#&=[]%.;a ") for _ in range(draw.randint(0, 4)))

        scheme = draw.choice(("rtsp", "http", "https", "rtmp", "RTSP", "srt", "udp"))
        user = draw.choice((f"user:{noise()}{self.SECRET}{noise()}@", f"{self.SECRET}:{noise()}@"))
        query = draw.choice(("password", "token", "api_key", "PWD", "auth", "user", "x-access-token"))
        return draw.choice(
            (
                f"{scheme}://{user}host{draw.choice(('', ':554', ':99999'))}/path{draw.choice(('', '?a=1', '/x@y'))}",
                f"{scheme}://host/path?a=1&{query}={self.SECRET}&b=2",
                f"{scheme}://host/{draw.choice(('p;', 'p#', 'p?'))}{query}={self.SECRET}",
            )
        ).encode()

    def run(self, data: bytes) -> None:
        """See `Area.run`."""
        from glip_deploy.video.address import live_address

        address = live_address(data.decode("utf-8", "replace"))
        assert address is None or self.SECRET not in address.name, address.name


class CommandLines(Area):
    """Arguments of glip-detect: a status of 0, 1 or 2, one line of error, and never a traceback."""

    name = "command lines"
    OPTIONS = (
        *(
            "--model",
            "--prompt",
            "--prompt-file",
            "--class",
            "--classes",
            "--phrases",
            "--threshold",
            "--class-threshold",
        ),
        *("--source", "--stride", "--max-frames", "--timeout", "--reconnect", "--output", "--json", "--coco"),
        *("--coco-categories", "--shortest-side", "--longest-side", "--resize", "--backend", "--engines", "--threads"),
        *("--cache-dir", "--log-level"),
    )
    FLAGS = ("--untrusted", "--no-plugins", "--no-verify", "--no-cache", "--quiet", "--nonsense", "-x", "--")
    VALUES = (
        *(
            "",
            "-",
            "--",
            "0",
            "1",
            "-1",
            "3",
            "0.5",
            "1e999",
            "nan",
            "x",
            "a.jpg",
            "v.mp4",
            "list.json",
            "/",
            ".",
            "..",
            "x" * 300,
        ),
        *(
            "nul\0",
            "\udcff",
            "out/",
            "missing/out.jpg",
            "out.jpg",
            "out.mp4",
            "o.jsonl",
            "a=0.5",
            "=1",
            "a.b.",
            "[a",
            "12:30.mp4",
        ),
        *(
            "rtsp://",
            "file://a.jpg",
            "*.jpg",
            "**",
            "[",
            "auto",
            "fast",
            "exact",
            "debug",
            "tensorrt",
            "onnxruntime",
            "９９",
        ),
    )

    def make(self, draw: random.Random) -> bytes:
        """See `Area.make`."""
        words = ["--model", draw.choice(("missing", "missing", "BUNDLE", "a.jpg"))] if draw.random() < 0.9 else []
        words += ["--prompt", draw.choice(("dog", "[dog", "a. b", ""))] if draw.random() < 0.8 else []
        words += ["--source", draw.choice(("a.jpg", "v.mp4", "missing", "."))] if draw.random() < 0.8 else []
        for _ in range(draw.randint(0, 5)):
            if draw.random() < 0.2:
                words.append(draw.choice(self.FLAGS))
            else:
                words += [draw.choice(self.OPTIONS), draw.choice(self.VALUES)]
        return json.dumps(words).encode()

    def run(self, data: bytes) -> None:
        """See `Area.run`."""
        import contextlib
        import os

        from glip_deploy.cli.detect import main

        words = [str(self.bundle) if word == "BUNDLE" else word for word in json.loads(data)]
        work = Path(tempfile.mkdtemp(dir=self.folder))
        (work / "a.jpg").write_bytes(self._picture)
        (work / "list.json").write_text('["dog"]')
        here = Path.cwd()
        out, err = io.StringIO(), io.StringIO()
        os.chdir(work)
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                status = main([*words, "--timeout", "1", "--shortest-side", "32"])
        finally:
            os.chdir(here)
            kept = (work / "a.jpg").read_bytes() if (work / "a.jpg").is_file() else b""
            shutil.rmtree(work, ignore_errors=True)
        said = err.getvalue()
        assert status in (0, 1, 2), (status, said)
        assert "Traceback" not in said, said
        assert status == 0 or said.splitlines()[-1].startswith("glip-detect: error: "), said
        assert kept == self._picture, "the source was overwritten"

    @cached_property
    def _picture(self) -> bytes:
        from PIL import Image

        stream = io.BytesIO()
        Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(stream, "jpeg")
        return stream.getvalue()


class HttpBodies(Area):
    """Bodies of requests to glip-serve, JSON and multipart, whole and damaged."""

    name = "HTTP bodies"
    PROMPTS: tuple[Any, ...] = (
        *(
            "dog",
            "dog. bus",
            "[a dog] and [a bus",
            "",
            " ",
            ".",
            "a" * 3000,
            "dog. dog",
            "\x00",
            "\U0001f436",
            "[",
            '{"text"',
        ),
        *(
            ["dog"],
            ["dog", "bus"],
            [],
            [""],
            ["dog", "Dog"],
            [{"name": "dog", "suffix": ", small"}],
            [5],
            [["dog"]],
            {},
        ),
        *(
            {"text": "a dog", "spans": [[2, 5]]},
            {"text": "a dog", "spans": [[[2, 3], [4, 5]]]},
            {"text": "", "spans": []},
        ),
        *({"text": "a dog", "spans": [[2]]}, {"text": "a dog", "spans": [[2, 10**30]]}, {"text": "a", "spans": [[]]}),
        *({"text": "a dog", "spans": [[2, 5]], "phrases": ["x"]}, {"text": "a dog", "spans": [[2, 5]], "phrases": []}),
        *(None, 5, True, 1e999),
    )
    THRESHOLDS: tuple[Any, ...] = (
        0.5,
        0,
        1,
        -1,
        2,
        1e-320,
        "0.5",
        "nan",
        [0.5],
        [0.5, 0.5],
        [],
        {"dog": 0.1},
        {"cat": 0.1},
        {},
        None,
        [None],
    )
    OTHERS: tuple[tuple[str, Any], ...] = (
        *(("phrases", "auto"), ("phrases", "dots"), ("phrases", "x"), ("phrases", None), ("model", "fuzzed")),
        *(("model", "../x"), ("model", 5), ("max_detections", 3), ("max_detections", 0), ("max_detections", 2**70)),
        *(("url", "http://127.0.0.1"), ("image", "/etc/passwd"), ("prompts", ["dog", ["bus"]]), ("prompts", [])),
    )

    def make(self, draw: random.Random) -> bytes:
        """See `Area.make`; path and content type are the first two lines."""
        path = "/v1/detect" if draw.random() < 0.85 else "/v1/encode"
        fields: dict[str, Any] = {"prompt": draw.choice(self.PROMPTS)}
        if draw.random() < 0.6:
            fields["threshold"] = draw.choice(self.THRESHOLDS)
        fields |= dict(draw.sample(self.OTHERS, draw.choice((0, 0, 0, 1, 2))))
        picture = mutated(draw, self._picture) if draw.random() < 0.2 else self._picture
        if draw.random() < 0.5:
            kind = "application/json"
            if path == "/v1/detect":
                fields.setdefault("image", base64.b64encode(picture).decode())
            body = json.dumps(fields).encode()
        else:
            kind = "multipart/form-data; boundary=b"
            fields["image"] = picture
            body = b"".join(self._part(draw, name, value) for name, value in fields.items()) + b"--b--\r\n"
        if draw.random() < 0.5:
            body = mutated(draw, body)
        if draw.random() < 0.05:
            kind = draw.choice(
                ("", "text/plain", "multipart/form-data", "multipart/form-data; boundary=", "application/json;x")
            )
        return f"{path}\n{kind}\n".encode() + body

    @staticmethod
    def _part(draw: random.Random, name: str, value: Any) -> bytes:
        file = isinstance(value, bytes) and draw.random() < 0.95
        text = value if isinstance(value, bytes | str) else json.dumps(value)
        content = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
        head = f'Content-Disposition: form-data; name="{name}"' + ('; filename="a.png"' if file else "")
        return f"--b\r\n{head}\r\n\r\n".encode() + content + b"\r\n"

    def run(self, data: bytes) -> None:
        """See `Area.run`: an answer with an error raises it."""
        path, kind, body = [*data.split(b"\n", 2), b"", b""][:3]
        answers: list[dict[str, Any]] = []
        pieces = [body[i : i + 1000] for i in range(0, len(body), 1000)] or [b""]

        async def receive() -> dict[str, Any]:
            if pieces:
                return {"type": "http.request", "body": pieces.pop(0), "more_body": bool(pieces)}
            await asyncio.Event().wait()  # the client stays until it has its answer
            raise AssertionError

        async def send(message: dict[str, Any]) -> None:
            answers.append(message)

        scope = {
            **{"type": "http", "method": "POST", "path": path.decode("latin-1"), "raw_path": path, "query_string": b""},
            **{"http_version": "1.1", "scheme": "http", "root_path": "", "server": ("127.0.0.1", 8000), "client": None},
            "headers": [(b"host", b"127.0.0.1"), (b"content-type", kind), (b"content-length", b"%d" % len(body))],
        }
        self._loop.run(self._app(scope, receive, send))
        start, *rest = answers
        status, answer = start["status"], json.loads(b"".join(one.get("body", b"") for one in rest))
        if status == 200:
            assert path in (b"/v1/detect", b"/v1/encode")
            return
        assert status in (400, 404, 405, 413, 415, 422), (status, answer)
        assert dict(start["headers"])[b"content-type"] == b"application/problem+json"
        assert answer["status"] == status
        raise GlipError(answer["detail"])

    @cached_property
    def _loop(self) -> asyncio.Runner:
        return asyncio.Runner()

    @cached_property
    def _app(self) -> Any:
        from glip_deploy.serve.app import create_app
        from glip_deploy.serve.models import Model
        from glip_deploy.serve.settings import Settings

        settings = Settings(max_bytes=100_000, max_pixels=100_000, max_characters=2000)
        detector = Detector.open(self.bundle, shortest_side=32, cache_dir=None, threads=1)
        return create_app(settings, {"fuzzed": Model("fuzzed", detector)})

    @cached_property
    def _picture(self) -> bytes:
        from PIL import Image

        stream = io.BytesIO()
        Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(stream, "png")
        return stream.getvalue()


AREAS: dict[str, type[Area]] = {
    area.name: area
    for area in (
        *(Prompts, Frames, Pictures, Videos, Manifests, Bundles, Checkpoints, Engines, CacheEntries, Categories),
        *(Configurations, Addresses, CommandLines, HttpBodies),
    )
}
"""By name."""
