"""Builds the C++ runtime, and talks to it through its C interface and through a program that shows its parts."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from selection import SLOW

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "runtime"
NAMES = ("OK", "OPTION", "PROMPT", "FRAME", "BUNDLE", "BACKEND", "MISSING", "CLOSED", "INTERNAL")


def absence() -> str | None:
    """Say what is missing to build it, or return None."""
    if sys.platform != "linux":
        return "the C++ runtime is built on Linux"
    for program in ("cmake", "c++"):
        if shutil.which(program) is None:
            return f"{program} is not installed"
    for header, package in (("utf8proc.h", "libutf8proc-dev"), ("nlohmann/json.hpp", "nlohmann-json3-dev")):
        if not Path("/usr/include", header).exists():
            return f"{package} is not installed"
    return None


def openvino_folder() -> str:
    from openvino.utils import get_cmake_path

    return str(get_cmake_path())


def engine_folders() -> list[str]:
    """Return CMake's options for the headers of engines that are not found by themselves."""
    from glip_engines.compilers import cuda_headers, find_tensorrt_headers

    from glip_deploy import GlipError

    try:
        found = [f"-DTENSORRT_DIR={find_tensorrt_headers()}", f"-DCUDA_DIR={cuda_headers()}"]
    except GlipError:
        return []
    # No package brings the headers of TensorRT-RTX: those of the tests serve unless real ones are named.
    rtx = os.environ.get("TENSORRT_RTX_HOME") or ROOT / "engines" / "runtime" / "tests" / "simulated_rtx"
    return [*found, f"-DTENSORRT_RTX_DIR={rtx}"]


def run(*command: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a command that must succeed."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, f"{command}:\n{done.stdout[-4000:]}{done.stderr[-4000:]}"
    return done


@contextmanager
def locked() -> Iterator[None]:
    """Let one process at a time build: test files run side by side, and build in the same folder."""
    import fcntl  # on Linux, as the runtime

    BUILD.parent.mkdir(exist_ok=True)
    with BUILD.with_suffix(".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def build() -> Path:
    """Configure and build what changed since the last time; return the folder.

    What nobody has configured before, as `make cpp` does, is compiled with -O1, in less time than by default.
    """
    options = ["-DGLIP_TESTS=ON", f"-DOpenVINO_DIR={openvino_folder()}", *engine_folders()]
    with locked():
        if not (BUILD / "CMakeCache.txt").exists():
            options += ["-G", "Ninja"] if shutil.which("ninja") else []
            options += ["-DCMAKE_CXX_FLAGS_RELEASE=-O1 -DNDEBUG"]
        run("cmake", "-S", ROOT / "engines" / "runtime", "-B", BUILD, *options)
        run("cmake", "--build", BUILD, "--parallel", os.cpu_count() or 1)
    return BUILD


TARGETS = {
    "address": ("glip_probe", "glip_fuzz", "glip_threads", "glip_stand_in"),
    "thread": ("glip_threads", "glip_stand_in"),
}
"""What is built with each sanitizer: the library without an inference engine, whose code they do not know."""


def clang() -> list[str]:
    """Options for clang, which compiles sanitized code faster than gcc; none where it cannot, or has no sanitizers."""
    compiler, plain = shutil.which("clang++"), shutil.which("clang")
    if compiler is None or plain is None:
        return []
    with tempfile.TemporaryDirectory() as folder:
        command = [compiler, "-fsanitize=address,undefined", "-x", "c++", "-", "-o", f"{folder}/program"]
        done = subprocess.run(command, input="int main() {}", text=True, capture_output=True, check=False)
    return [] if done.returncode else [f"-DCMAKE_CXX_COMPILER={compiler}", f"-DCMAKE_C_COMPILER={plain}"]


def build_sanitized(kind: str) -> Path:
    """Build what a sanitizer is run on, optimized only where it runs for long; return the folder."""
    folder = BUILD.with_name(f"{BUILD.name}-{kind}")
    options = ["-DGLIP_TESTS=ON", "-DGLIP_OPENVINO=OFF", "-DGLIP_EXAMPLES=OFF", f"-DGLIP_SANITIZE={kind}"]
    options += [] if SLOW else ["-DCMAKE_BUILD_TYPE=Debug"]
    with locked():
        if not (folder / "CMakeCache.txt").exists():
            options += [*clang(), *(["-G", "Ninja"] if shutil.which("ninja") else [])]
        run("cmake", "-S", ROOT / "engines" / "runtime", "-B", folder, *options)
        run("cmake", "--build", folder, "--parallel", os.cpu_count() or 1, "--target", *TARGETS[kind])
    return folder


class Probe:
    """The parts of the library, asked one JSON object at a time.

    Attributes:
        every: of thousands of texts, one in how many to ask for. Sanitizers make a program slow; that all texts give
            what they should is shown without them.
    """

    def __init__(self, folder: Path, tokenizer: Path) -> None:
        self.every = 1 if folder == BUILD or SLOW else 8
        self._process = subprocess.Popen(
            [folder / "glip_probe", tokenizer], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, **question: Any) -> Any:
        return self.ask_all([question])[0]

    def ask_all(self, questions: Any) -> Any:
        """Ask in portions that fit the pipe."""
        answers = []
        for question in questions:
            assert self._process.stdin is not None and self._process.stdout is not None
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
            assert line, f"the program died of {question}"
            answers.append(json.loads(line))
        return answers

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        assert self._process.wait(10) == 0


class Options(ctypes.Structure):
    _fields_ = [
        ("size", ctypes.c_size_t),
        ("backend", ctypes.c_char_p),
        ("precision", ctypes.c_char_p),
        ("shortest_side", ctypes.c_int32),
        ("longest_side", ctypes.c_int32),
        ("threads", ctypes.c_int32),
        ("no_cache", ctypes.c_int32),
        ("no_verify", ctypes.c_int32),
        ("cache_dir", ctypes.c_char_p),
        ("engines", ctypes.c_char_p),
        ("untrusted", ctypes.c_int32),
        ("no_plugins", ctypes.c_int32),
        ("resize", ctypes.c_char_p),
    ]


class Image(ctypes.Structure):
    _fields_ = [
        ("size", ctypes.c_size_t),
        ("data", ctypes.c_void_p),
        ("width", ctypes.c_int32),
        ("height", ctypes.c_int32),
        ("pitch", ctypes.c_size_t),
        ("format", ctypes.c_int32),
        ("memory", ctypes.c_int32),
        ("chroma", ctypes.c_void_p),
        ("chroma_pitch", ctypes.c_size_t),
        ("stream", ctypes.c_void_p),
    ]


class Phrase(ctypes.Structure):
    _fields_ = [
        ("size", ctypes.c_size_t),
        ("starts", ctypes.POINTER(ctypes.c_size_t)),
        ("ends", ctypes.POINTER(ctypes.c_size_t)),
        ("count", ctypes.c_size_t),
        ("label", ctypes.c_char_p),
    ]


class Box(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_float) for name in ("x1", "y1", "x2", "y2", "score")),
        ("label", ctypes.c_int32),
        ("phrase", ctypes.c_char_p),
    ]


class GlipError(Exception):
    """A status that is not GLIP_OK, with the message."""


class Library:
    """The C interface."""

    def __init__(self, folder: Path) -> None:
        self.c = ctypes.CDLL(str(folder / "libglip.so"))
        for name in ("glip_version", "glip_last_error", "glip_prompt_phrase", "glip_resize"):
            getattr(self.c, name).restype = ctypes.c_char_p
        for name in ("glip_prompt_classes", "glip_prompt_chunks", "glip_detections_count"):
            getattr(self.c, name).restype = ctypes.c_size_t

    def call(self, name: str, *arguments: Any) -> None:
        status = getattr(self.c, name)(*arguments)
        if status:
            message = self.c.glip_last_error().decode()
            assert "\n" not in message and message
            raise GlipError(f"{NAMES[status]}: {message}")

    def new(self, name: str, *arguments: Any) -> ctypes.c_void_p:
        made = ctypes.c_void_p()
        self.call(name, *arguments, ctypes.byref(made))
        return made

    def open(self, bundle: Path, **options: Any) -> ctypes.c_void_p:
        given = Options(**{"size": ctypes.sizeof(Options), **options})
        return self.new("glip_open", str(bundle).encode(), ctypes.byref(given))

    def encode(self, detector: Any, prompt: Any, classes_per_prompt: int | None = None) -> ctypes.c_void_p:
        if isinstance(prompt, str):
            return self.new("glip_encode", detector, prompt.encode())
        names = (ctypes.c_char_p * len(prompt))(*(name.encode() for name in prompt))
        count = ctypes.c_size_t(len(prompt))
        if classes_per_prompt is None:
            return self.new("glip_encode_names", detector, names, count)
        return self.new("glip_encode_chunks", detector, names, count, ctypes.c_size_t(classes_per_prompt))

    def encode_phrases(self, detector: Any, text: str, phrases: Any) -> ctypes.c_void_p:
        """Encode a caption with phrases: (pieces, label or None) of each."""

        def row(numbers: Any) -> Any:
            return (ctypes.c_size_t * len(numbers))(*numbers)

        made = [
            Phrase(
                ctypes.sizeof(Phrase),
                row([start for start, _ in pieces]),
                row([end for _, end in pieces]),
                len(pieces),
                None if label is None else label.encode(),
            )
            for pieces, label in phrases
        ]
        given = (ctypes.POINTER(Phrase) * len(made))(*(ctypes.pointer(phrase) for phrase in made))
        return self.new("glip_encode_phrases", detector, text.encode(), given, ctypes.c_size_t(len(made)))

    def detect(self, detector: Any, prompt: Any, picture: Any, threshold: float = 0.5, **members: Any) -> Any:
        """Detect in (H, W, 3) uint8 RGB; a list of (box, score, label, phrase)."""
        image = self.image(picture, **members)
        return self.taken(self.new("glip_detect", detector, ctypes.byref(image), prompt, ctypes.c_float(threshold)))

    def detect_batch(self, detector: Any, prompt: Any, pictures: Any, threshold: float = 0.5, **members: Any) -> Any:
        """Detect in several pictures at once: what `detect` returns, of each."""
        images = [self.image(picture, **members) for picture in pictures]
        given = (ctypes.POINTER(Image) * len(images))(*(ctypes.pointer(image) for image in images))
        found = (ctypes.c_void_p * len(images))(*[1] * len(images))
        try:
            size, limit = ctypes.c_size_t(len(images)), ctypes.c_float(threshold)
            self.call("glip_detect_batch", detector, given, size, prompt, limit, found)
        except GlipError:
            assert not any(found)
            raise
        return [self.taken(ctypes.c_void_p(one)) for one in found]

    def detect_prompts(self, detector: Any, prompts: Any, picture: Any, threshold: float = 0.5) -> Any:
        """Detect what several prompts name: what `detect` returns, of each."""
        image, count = self.image(picture), len(prompts)
        given = (ctypes.c_void_p * count)(*prompts)
        found = (ctypes.c_void_p * count)(*[1] * count)
        try:
            size, limit = ctypes.c_size_t(count), ctypes.c_float(threshold)
            self.call("glip_detect_prompts", detector, ctypes.byref(image), given, size, limit, found)
        except GlipError:
            assert not any(found)
            raise
        return [self.taken(ctypes.c_void_p(one)) for one in found]

    def image(self, picture: Any, **members: Any) -> Image:
        """Return a view of (H, W, 3) uint8 RGB, with other members if they are given."""
        given = {"data": picture.ctypes.data, "width": picture.shape[1], "height": picture.shape[0], "format": 1}
        return Image(**{"size": ctypes.sizeof(Image), **given, **members})

    def taken(self, found: ctypes.c_void_p) -> Any:
        """Return detections as (box, score, label, phrase), and free them."""
        out = []
        for index in range(self.c.glip_detections_count(found)):
            one = Box()
            self.call("glip_detections_get", found, ctypes.c_size_t(index), ctypes.byref(one))
            out.append(((one.x1, one.y1, one.x2, one.y2), one.score, one.label, one.phrase.decode()))
        self.c.glip_detections_free(found)
        return out
