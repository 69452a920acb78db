"""Checks of the TensorRT backend that need a GPU: clones, prompts, frames of other libraries, memory errors.

Every check returns a row (`case`, `ok`, and `distance`, `error` or `left_out`); what is not installed is left out.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from glip_deploy.detector import Detector
from glip_deploy.errors import GlipError
from glip_deploy.frames import Resize

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from glip_deploy.results.detections import Detections

    Row = dict[str, Any]
    Maker = Callable[[NDArray[np.uint8]], Any]

__all__ = ["MAKERS", "check_detector", "onnxruntime_cuda", "plan", "sanitizer"]

PROMPTS = ("person. flower. traffic light", "red roof. hair drier")
FRAMES = 20
"""Frames of each stream."""
BOX, SCORE = 2.0, 0.02
"""Pixels and score by which results on frames that the GPU resized may differ: it rounds to one gray level."""


def _torch(picture: NDArray[np.uint8]) -> Any:
    return import_module("torch").from_numpy(picture.copy()).cuda()


def _torch_on_a_stream(picture: NDArray[np.uint8]) -> Any:
    """Return a frame whose copy waits behind a long multiplication, on a stream of its own that stays current."""
    torch = import_module("torch")
    torch.cuda.set_stream(torch.cuda.Stream())
    large = torch.ones(8192, 8192, device="cuda")
    host = torch.from_numpy(picture.copy()).pin_memory()
    _ = large @ large
    return host.to("cuda", non_blocking=True)


def _cupy(picture: NDArray[np.uint8]) -> Any:
    return import_module("cupy").asarray(picture)


def _cupy_on_a_stream(picture: NDArray[np.uint8]) -> Any:
    cupy = import_module("cupy")
    cupy.cuda.Stream(non_blocking=True).use()
    return cupy.asarray(picture)


def _pycuda(picture: NDArray[np.uint8]) -> Any:
    import_module("pycuda.autoprimaryctx")
    return import_module("pycuda.gpuarray").to_gpu(np.ascontiguousarray(picture))


MAKERS: Mapping[str, tuple[str, Maker]] = {
    "PyTorch": ("torch", _torch),
    "PyTorch, on a stream": ("torch", _torch_on_a_stream),
    "CuPy": ("cupy", _cupy),
    "CuPy, on a stream": ("cupy", _cupy_on_a_stream),
    "PyCUDA": ("pycuda", _pycuda),
}
"""Frames in GPU memory, by case: the package they need, and what makes one of a picture."""


OF_DETECTORS = (
    "frames of the host",
    "frames of the host in NV12",
    "two clones under load",
    "a prompt changed in mid-stream",
)
"""What is checked of a detector, besides `MAKERS`."""


def plan(bundle: Path | None) -> list[str]:
    """Return what would be checked here, one line each, with what is missing for it."""
    lines = [*OF_DETECTORS, *(f"frames of {case}" for case in MAKERS)]
    packages = {f"frames of {case}": package for case, (package, _) in MAKERS.items()}
    missing = {line: f"{package} is not installed" for line, package in packages.items() if _absent(package)}
    lines += ["ONNX Runtime's CUDA provider", "compute-sanitizer"]
    if _cuda_absence() is not None:
        missing["ONNX Runtime's CUDA provider"] = str(_cuda_absence())
    if shutil.which("compute-sanitizer") is None:
        missing["compute-sanitizer"] = "it is not on the PATH"
    if bundle is None:
        missing |= dict.fromkeys(lines[:-1], "needs --bundle")
    return [f"{line}: {missing[line]}" if line in missing else line for line in lines]


def check_detector(
    detector: Detector, picture: NDArray[np.uint8], makers: Mapping[str, tuple[str, Maker]] = MAKERS
) -> list[Row]:
    """Check clones, prompts and frames resized on the GPU on an opened detector; the picture is RGB."""
    prompts = [detector.encode(text) for text in PROMPTS]
    planes = to_nv12(picture)
    with detector.clone() as exact:
        exact.resize = Resize.EXACT  # by the processor
        wanted = [exact.detect(picture, prompt, 0.05, color="rgb") for prompt in prompts]
        wanted_of_planes = exact.detect(planes, prompts[0], 0.05, color="nv12")

    def stream(one: Detector, order: Iterable[int]) -> float:
        return max(distance(one.detect(picture, prompts[i], 0.05, color="rgb"), wanted[i]) for i in order)

    def clones() -> float:
        with detector.clone() as first, detector.clone() as second, ThreadPoolExecutor(2) as pool:
            return max(pool.map(stream, (first, second), ([0] * FRAMES, [1] * FRAMES)))

    def of_planes() -> float:
        return distance(detector.detect(planes, prompts[0], 0.05, color="nv12"), wanted_of_planes)

    checks = (
        lambda: stream(detector, [0] * 3),
        lambda: max(of_planes() for _ in range(3)),
        clones,
        lambda: stream(detector, [i // 3 % 2 for i in range(FRAMES)]),
    )
    rows = [_row(case, check) for case, check in zip(OF_DETECTORS, checks, strict=True)]
    for case, (package, make) in makers.items():
        if _absent(package):
            rows.append({"case": f"frames of {case}", "ok": True, "left_out": f"{package} is not installed"})
            continue

        def frames(make: Maker = make) -> float:
            found = (detector.detect(make(picture), prompts[0], 0.05, color="rgb") for _ in range(FRAMES))
            return max(distance(one, wanted[0]) for one in found)

        rows.append(_row(f"frames of {case}", frames))
    return rows


def to_nv12(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return a (H, W, 3) RGB picture in NV12, (H * 3 / 2, W), by BT.601 of limited range; an odd side loses a pixel."""
    height, width = (side // 2 * 2 for side in picture.shape[:2])
    red, green, blue = np.moveaxis(picture[:height, :width].astype(np.float32) / 255, 2, 0)
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    pairs = np.stack([(blue - luma) / 1.772, (red - luma) / 1.402], axis=-1)
    chroma = pairs.reshape(height // 2, 2, width // 2, 2, 2).mean(axis=(1, 3)).reshape(height // 2, width)
    return np.concatenate([16 + 219 * luma, 128 + 224 * chroma]).round().astype(np.uint8)


def distance(found: Detections, wanted: Detections) -> float:
    """Return how far detections are apart, 1 being what is allowed; infinity if more than one in ten is missing."""
    far = []
    for box, score, label in zip(wanted.boxes, wanted.scores, wanted.labels, strict=True):
        same = found.labels == label
        boxes, scores = np.abs(found.boxes[same] - box).max(axis=1) / BOX, np.abs(found.scores[same] - score) / SCORE
        far.append(float(np.maximum(boxes, scores).min(initial=np.inf)))
    far.sort()
    kept = far[: len(far) - len(far) // 10]  # beside the threshold, or suppressed by another
    return max(kept, default=0.0)


def onnxruntime_cuda(bundle: Path, detector: Detector, picture: NDArray[np.uint8]) -> Row:
    """Compare ONNX Runtime's CUDA provider with its CPU, if it is here."""
    case, absence = "ONNX Runtime's CUDA provider", _cuda_absence()
    if absence is not None:
        return {"case": case, "ok": True, "left_out": absence}

    def both() -> float:
        found = []
        for backend in ("onnxruntime-cuda", "onnxruntime"):
            with Detector.open(bundle, backend=backend, shortest_side=detector.shortest_side) as one:
                found.append(one.detect(picture, PROMPTS[0], 0.05, color="rgb"))
        return distance(*found)

    return _row(case, both)


def sanitizer(command: list[str]) -> Row:
    """Run a command under compute-sanitizer, which finds accesses outside of memory and races."""
    case, tool = "compute-sanitizer", shutil.which("compute-sanitizer")
    if tool is None:
        return {"case": case, "ok": True, "left_out": "it is not on the PATH"}
    done = subprocess.run(
        [tool, "--error-exitcode", "9", sys.executable, *command], capture_output=True, text=True, check=False
    )
    last = (done.stdout + done.stderr).strip().splitlines()[-1:]
    return {"case": case, "ok": done.returncode == 0, **({} if done.returncode == 0 else {"error": "".join(last)})}


def _row(case: str, measure: Callable[[], float]) -> Row:
    try:
        far = measure()
    except (GlipError, RuntimeError, OSError) as error:
        return {"case": case, "ok": False, "error": str(error).splitlines()[0]}
    return {"case": case, "ok": far <= 1.0, "distance": far}


def _absent(package: str) -> bool:
    try:
        import_module(package)
    except (ImportError, OSError):
        return True
    return False


def _cuda_absence() -> str | None:
    from glip_deploy.backends import PROVIDERS
    from glip_deploy.backends.onnxruntime import provider_absence

    return provider_absence(PROVIDERS["onnxruntime-cuda"][0])
