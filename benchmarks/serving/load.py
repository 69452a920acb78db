"""Ask a glip-serve of this machine from many connections, and see what it answers, how fast, and in how much memory.

python benchmarks/serving/load.py build/demo/glip_nano --json build/load.json

Three measurements, each on servers of its own, over the loopback interface:

- load: `--clients` connections ask without a pause for `--seconds`. The queue is shorter than that, so that some are
  told to come again (status 429), which they do after the second that the server names. Any other status but 200 is a
  fault, as is resident memory that grows by more than `--limit` MB a minute after the first quarter.
- batching: 16 connections with the same prompt, at each of a few batch sizes, and with two workers instead.
- overhead: one connection; a request and `decode_image` with `Detector.detect` in this process, in turn.

Exit status 1 at a fault. Linux only, since it reads /proc.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import io
import json
import re
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

PROMPT = "dog. red apple. bicycle. guitar"
SIDE = 320
"""Shortest side that frames are resized to: that of the pictures GLIP-nano learned from, about."""
QUEUE = 48
BATCHING_CLIENTS = 16


def picture(path: Path) -> bytes:
    """Return a picture as a JPEG of 640x480 pixels."""
    from PIL import Image

    stream = io.BytesIO()
    with Image.open(path) as image:
        image.convert("RGB").resize((640, 480)).save(stream, "JPEG", quality=90)
    return stream.getvalue()


def form(data: bytes) -> tuple[bytes, dict[str, str]]:
    """Return body and headers of a request to detect."""
    parts = ((b'image"; filename="frame.jpg', data), (b"prompt", PROMPT.encode()), (b"threshold", b"0.5"))
    body = b"".join(b'--boundary\r\nContent-Disposition: form-data; name="%s"\r\n\r\n%s\r\n' % part for part in parts)
    return body + b"--boundary--\r\n", {"Content-Type": "multipart/form-data; boundary=boundary"}


@contextlib.contextmanager
def serving(bundle: Path, *options: str) -> Iterator[tuple[int, int]]:
    """Start a server on a free port; give its process id and the port."""
    command = [sys.executable, "-m", "glip_deploy.serve.command", "--model", str(bundle), "--port", "0"]
    command += ["--shortest-side", str(SIDE), *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            line = process.stderr.readline()
            found = re.search(r"http://127\.0\.0\.1:(\d+)/", line)
            if found is None:
                raise SystemExit(line + process.stderr.read())
            yield process.pid, int(found[1])
        finally:
            process.terminate()


@dataclass
class Tally:
    """What a few clients saw.

    Attributes:
        statuses: answers by status; "error" where there was none.
        seconds: of the answers with status 200.
    """

    statuses: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)


def client(port: int, body: bytes, headers: dict[str, str], until: float, tally: Tally) -> None:
    """Ask without a pause until it is time to stop, from one connection."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    while time.monotonic() < until:
        began = time.perf_counter()
        try:
            connection.request("POST", "/v1/detect", body, headers)
            answer = connection.getresponse()
            answer.read()
        except (OSError, http.client.HTTPException) as error:
            tally.statuses[f"error {type(error).__name__}"] += 1
            connection.close()
            continue
        tally.statuses[str(answer.status)] += 1
        if answer.status == 200:
            tally.seconds.append(time.perf_counter() - began)
        elif answer.status == 429:
            time.sleep(min(float(answer.headers["Retry-After"]), max(0.0, until - time.monotonic())))
    connection.close()


def crowd(port: int, data: bytes, clients: int, seconds: float, pid: int | None = None) -> tuple[Tally, Any, float]:
    """Let so many clients ask; return what they saw, the server's memory meanwhile, and the seconds it took."""
    (body, headers), tallies = form(data), [Tally() for _ in range(clients)]
    began = time.monotonic()
    threads = [threading.Thread(target=client, args=(port, body, headers, began + seconds, tally)) for tally in tallies]
    for thread in threads:
        thread.start()
    memory = []
    while time.monotonic() < began + seconds:
        if pid is not None:
            memory.append({"seconds": round(time.monotonic() - began, 1), **state(pid)})
        time.sleep(max(0.0, min(2.0, seconds / 20, began + seconds - time.monotonic())))
    for thread in threads:
        thread.join()
    total = Tally()
    for tally in tallies:
        total.statuses.update(tally.statuses)
        total.seconds += tally.seconds
    return total, memory, time.monotonic() - began


def state(pid: int) -> dict[str, float]:
    """Return resident memory, descriptors and threads of a process."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return {
        "resident_mb": round(int(status["VmRSS"].split()[0]) / 1024, 1),
        "descriptors": sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir()),
        "threads": int(status["Threads"]),
    }


def quantiles(seconds: list[float]) -> dict[str, float]:
    """Return the median and the 99th percentile, in ms."""
    ordered = sorted(seconds)
    return {
        "p50_ms": round(1000 * statistics.median(ordered), 2),
        "p99_ms": round(1000 * ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))], 2),
    }


def load(bundle: Path, data: bytes, clients: int, seconds: float, limit: float) -> dict[str, Any]:
    """Measure many clients at a server with its defaults, but a short queue."""
    with serving(bundle, "--queue", str(QUEUE)) as (pid, port):
        crowd(port, data, 4, 5.0)
        tally, memory, took = crowd(port, data, clients, seconds, pid)
    kept = [sample for sample in memory if sample["seconds"] >= seconds / 4]
    slope = statistics.linear_regression(
        [sample["seconds"] / 60 for sample in kept], [sample["resident_mb"] for sample in kept]
    ).slope
    wrong = sorted(set(tally.statuses) - {"200", "429"})
    return {
        "clients": clients,
        "queue": QUEUE,
        "seconds": round(took, 1),
        "answers": dict(tally.statuses),
        "frames_per_second": round(len(tally.seconds) / took, 2),
        **quantiles(tally.seconds),
        "resident_mb": [min(one["resident_mb"] for one in kept), max(one["resident_mb"] for one in kept)],
        "resident_mb_per_minute": round(slope, 2),
        "limit_mb_per_minute": limit,
        "faults": [f"status {status}" for status in wrong] + (["memory grows"] if slope > limit else []),
        "samples": memory,
    }


def batching(bundle: Path, data: bytes, seconds: float) -> list[dict[str, Any]]:
    """Measure throughput with batches of several sizes, and with two workers of one thread."""
    results = []
    for options in (
        ["--batch-size", "1"],
        ["--batch-size", "2"],
        ["--batch-size", "4"],
        ["--batch-size", "8"],
        ["--batch-size", "1", "--workers", "2", "--threads", "1"],
    ):
        with serving(bundle, *options) as (pid, port):
            crowd(port, data, 4, 3.0)
            tally, _, took = crowd(port, data, BATCHING_CLIENTS, seconds)
            resident = state(pid)["resident_mb"]
        results.append(
            {
                "options": " ".join(options),
                "clients": BATCHING_CLIENTS,
                "frames_per_second": round(len(tally.seconds) / took, 2),
                **quantiles(tally.seconds),
                "resident_mb": resident,
                "answers": dict(tally.statuses),
            }
        )
    return results


def overhead(bundle: Path, data: bytes, rounds: int) -> dict[str, Any]:
    """Measure a request against the same work in this process, in turn."""
    from glip_deploy import Detector
    from glip_deploy.frames.load import decode_image

    body, headers = form(data)
    times: dict[str, list[float]] = {"http": [], "decode": [], "detect": []}
    with Detector.open(bundle, shortest_side=SIDE) as detector, serving(bundle) as (_, port):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        prompt = detector.encode(PROMPT)
        for turn in range(rounds + 5):
            began = time.perf_counter()
            connection.request("POST", "/v1/detect", body, headers)
            answered = connection.getresponse()
            answered.read()
            asked = time.perf_counter()
            pixels = decode_image(data)
            decoded = time.perf_counter()
            detector.detect(pixels, prompt, 0.5, color="rgb")
            ended = time.perf_counter()
            if answered.status != 200:
                raise SystemExit(f"status {answered.status}")
            if turn >= 5:  # the first warm up
                for name, took in (("http", asked - began), ("decode", decoded - asked), ("detect", ended - decoded)):
                    times[name].append(took)
        connection.close()
    differences = [h - c - d for h, c, d in zip(times["http"], times["decode"], times["detect"], strict=True)]
    return {
        "rounds": rounds,
        "jpeg_bytes": len(data),
        **{name: quantiles(took) for name, took in times.items()},
        "overhead_p50_ms": round(1000 * statistics.median(differences), 2),
    }


def main() -> int:
    """Run from the command line; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--picture", type=Path, default=Path("tests/data/nano/held_out_00.jpg"))
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=120.0, help="of the load")
    parser.add_argument("--batch-seconds", type=float, default=20.0, help="for each way to batch")
    parser.add_argument("--rounds", type=int, default=100, help="of the comparison with one process")
    parser.add_argument("--limit", type=float, default=5.0, help="MB a minute")
    parser.add_argument("--json", type=Path, help="write the figures")
    args = parser.parse_args()
    data = picture(args.picture)
    found: dict[str, Any] = {"overhead": overhead(args.bundle, data, args.rounds)}
    print(json.dumps(found["overhead"]), flush=True)
    found["batching"] = batching(args.bundle, data, args.batch_seconds)
    for one in found["batching"]:
        print(json.dumps(one), flush=True)
    found["load"] = load(args.bundle, data, args.clients, args.seconds, args.limit)
    print(json.dumps({name: value for name, value in found["load"].items() if name != "samples"}))
    if args.json is not None:
        import onnxruntime
        from glip_bench.machine.host import describe_machine

        facts = {
            "what": "serving",
            "command": f"python benchmarks/serving/load.py {args.bundle.name} --clients {args.clients}"
            f" --seconds {args.seconds:g}",
            "machine": describe_machine(),
            "onnxruntime": onnxruntime.__version__,
            "shortest_side": SIDE,
            **found,
        }
        args.json.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    return 1 if found["load"]["faults"] else 0


if __name__ == "__main__":
    sys.exit(main())
