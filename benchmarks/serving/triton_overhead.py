"""Measure what Triton adds to a picture: the time of a client on the same machine against `Detector.detect`.

python benchmarks/serving/triton_overhead.py build/demo/glip_nano --json triton.json

The same 640x480 JPEG with the same prompt is asked of a model repository that `glip-build --triton` writes, by
tritonclient over HTTP and over gRPC, and detected in this process, all in turn, one at a time. Needs a server: see
`local_triton.py`.
"""

from __future__ import annotations

import argparse
import importlib
import io
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from glip_bench.machine.host import describe_machine, versions
from glip_engines.options import BuildOptions
from glip_engines.triton_repository import MODEL, write_repository

from glip_deploy import Detector
from glip_deploy.cli.app import run_main
from glip_deploy.errors import BackendError
from glip_deploy.files import write_atomically
from glip_deploy.frames.load import decode_image, load_image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from serving.local_triton import NotHere, Server, find_triton

PICTURE = Path(__file__).resolve().parents[2] / "examples" / "nano" / "media" / "scene.jpg"
PROMPT = "dog. red apple. bicycle. guitar. penguin. sunflower. bus. traffic light. backpack"
SIZE = (640, 480)
CLIENTS = 4


def picture_bytes() -> bytes:
    """Return the picture as a JPEG of 640x480."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(load_image(PICTURE)).resize(SIZE).save(file, "JPEG", quality=90)
    return file.getvalue()


def client(library: Any, address: str, picture: bytes, stack: ExitStack) -> Callable[[], int]:
    """Return a function that asks once, and returns how many boxes came."""
    connection = stack.enter_context(library.InferenceServerClient(address))

    def ask() -> int:
        inputs = [library.InferInput(name, [1, 1], "BYTES") for name in ("IMAGE", "PROMPT")]
        for one, data in zip(inputs, (picture, PROMPT.encode()), strict=True):
            one.set_data_from_numpy(np.array([[data]], np.object_))
        names = ("BOXES", "SCORES", "LABELS", "PHRASES")
        answer = connection.infer(MODEL, inputs, outputs=[library.InferRequestedOutput(name) for name in names])
        return int(answer.as_numpy("BOXES").shape[1])

    return ask


def timed(call: Callable[[], int]) -> tuple[float, int]:
    """Return the milliseconds and the result of a call."""
    start = time.perf_counter()
    result = call()
    return (time.perf_counter() - start) * 1e3, result


def throughput(make: Callable[[], Callable[[], int]], seconds: float) -> float:
    """Return pictures a second of several clients at once."""

    def one(_: int) -> int:
        ask, done = make(), 0
        ask()
        start = time.perf_counter()
        while time.perf_counter() - start < seconds:
            ask()
            done += 1
        return done

    with ThreadPoolExecutor(CLIENTS) as pool:
        return sum(pool.map(one, range(CLIENTS))) / seconds


def measure(bundle: Path, rounds: int, side: int, threads: int, batch: int, seconds: float) -> dict[str, Any]:
    """Return the figures."""
    picture = picture_bytes()
    http, grpc = (importlib.import_module(f"tritonclient.{name}") for name in ("http", "grpc"))
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        write_repository(bundle, folder / "models", BuildOptions(), batch=batch)
        config = folder / "models" / MODEL / "config.pbtxt"
        text = config.read_text()
        for name, old, new in (("shortest_side", "800", str(side)), ("threads", "", str(threads))):
            line, wanted = (f'key: "{name}" value {{ string_value: "{value}" }}' for value in (old, new))
            assert line in text
            text = text.replace(line, wanted)
        config.write_text(text)
        server = stack.enter_context(Server(folder / "models", folder / "log.txt", find_triton()))
        with http.InferenceServerClient(server.http_address) as asking:
            version = asking.get_server_metadata()["version"]
        detector = stack.enter_context(Detector.open(bundle, shortest_side=side, threads=threads, cache_dir=None))
        prompt = detector.encode(PROMPT)
        frame = decode_image(picture)
        subjects: dict[str, Callable[[], int]] = {
            "detect": lambda: len(detector.detect(frame, prompt, 0.5, color="rgb")),
            "decode and detect": lambda: len(detector.detect(decode_image(picture), prompt, 0.5, color="rgb")),
            "triton, HTTP": client(http, server.http_address, picture, stack),
            "triton, gRPC": client(grpc, server.grpc_address, picture, stack),
        }
        samples: dict[str, list[float]] = {name: [] for name in subjects}
        found = {name: {timed(call)[1] for _ in range(5)} for name, call in subjects.items()}
        assert len(set(map(frozenset, found.values()))) == 1, f"they do not find the same: {found}"
        for _ in range(rounds):
            for name, call in subjects.items():
                samples[name].append(timed(call)[0])
        many = throughput(lambda: client(http, server.http_address, picture, stack), seconds)
    figures = {name: _figures(values) for name, values in samples.items()}
    direct = figures["decode and detect"]["p50_ms"]
    return {
        "server": version,
        "boxes": next(iter(found["detect"])),
        "jpeg_bytes": len(picture),
        "subjects": figures,
        "overhead_p50_ms": {name: round(figures[name]["p50_ms"] - direct, 3) for name in list(subjects)[2:]},
        f"http_{CLIENTS}_clients_pictures_per_second": round(many, 2),
        "samples_ms": {name: [round(value, 3) for value in values] for name, values in samples.items()},
    }


def _figures(values: list[float]) -> dict[str, float]:
    return {
        "p50_ms": round(statistics.median(values), 3),
        "p90_ms": round(float(np.percentile(values, 90)), 3),
        "p99_ms": round(float(np.percentile(values, 99)), 3),
    }


def run(arguments: argparse.Namespace) -> int:
    """Measure, print and write."""
    try:
        find_triton()
    except NotHere as error:
        raise BackendError(str(error)) from None
    options = (arguments.rounds, arguments.shortest_side, arguments.threads, arguments.batch, arguments.seconds)
    figures = measure(arguments.bundle, *options)
    server_version = figures.pop("server")
    result = {
        "what": "triton overhead",
        "command": f"python benchmarks/serving/triton_overhead.py {arguments.bundle.name} --rounds {arguments.rounds}"
        f" --shortest-side {arguments.shortest_side} --threads {arguments.threads} --batch {arguments.batch}",
        "machine": describe_machine(),
        "versions": versions() | {"tritonclient": metadata.version("tritonclient"), "tritonserver": server_version},
        "model": arguments.bundle.name,
        "picture": f"{SIZE[0]}x{SIZE[1]} JPEG",
        "prompt": PROMPT,
        **figures,
    }
    for name, figures in result["subjects"].items():
        print(f"{name:<20}" + "  ".join(f"{key} {value:8.2f}" for key, value in figures.items()))
    print("over decoding and detecting, at the median: " + json.dumps(result["overhead_p50_ms"]))
    if arguments.json is not None:
        write_atomically(arguments.json, json.dumps(result, indent=1) + "\n")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; return its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--shortest-side", type=int, default=224)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args(argv)
    return run_main(lambda: run(arguments), "triton_overhead.py", extra="triton")


if __name__ == "__main__":
    sys.exit(main())
