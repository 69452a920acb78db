"""Runs of `glip-batch` as a process, what they read, and what they leave."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

PICTURES = 9
FRAMES = 40
RESULTS = ("detections.parquet", "coco.json", "failures.json")
OPTIONS = ("--prompt", "person. red car. dog", "--threshold", "0.2", "--shortest-side", "64", "--threads", "1")


def noise(seed: int, height: int = 48, width: int = 64) -> NDArray[np.uint8]:
    """A picture of large random blocks: another one for each seed, so that results that are mixed up are noticed."""
    blocks = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return np.kron(blocks, np.ones((height // 6, width // 8, 1), np.uint8))


def write_pictures(folder: Path, count: int = PICTURES, first: int = 1) -> None:
    """Pictures 1.png, 2.png and so on."""
    from PIL import Image

    folder.mkdir(exist_ok=True)
    for number in range(first, first + count):
        Image.fromarray(noise(number)).save(folder / f"{number}.png")


def write_video(path: Path, frames: int = FRAMES) -> None:
    """A video whose frames differ."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for seed in range(frames):
            for packet in stream.encode(av.VideoFrame.from_ndarray(noise(seed // 4), format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)


def command(bundle: Path, source: str, output: str = "out", *more: str, options: Sequence[str] = OPTIONS) -> list[str]:
    """The command line of a run."""
    where = ["--model", str(bundle), "--source", source, "--output", output]
    return [sys.executable, "-m", "glip_deploy.cli.batch", *where, *options, *more]


def environment(folder: Path, first: Sequence[Path] = ()) -> dict[str, str]:
    """Variables for a run: modules in the folders `first` come before all others."""
    path = os.pathsep.join([*map(str, first), *sys.path])
    return {**os.environ, "PYTHONPATH": path, "GLIP_DEPLOY_CACHE": str(folder / "cache"), "COLUMNS": "200"}


def start(arguments: Sequence[str], folder: Path, first: Sequence[Path] = ()) -> subprocess.Popen[str]:
    """Start a run in a process group of its own."""
    return subprocess.Popen(
        arguments,
        cwd=folder,
        env=environment(folder, first),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str], seconds: float = 600) -> tuple[int, str]:
    """Wait for a run; give its exit status and what it said. Nothing may be on standard output."""
    try:
        out, said = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert out == "", out
    assert "Traceback" not in said, said
    progress = re.compile(r"^glip-batch: \d+ of \d+ frames, .* a second.*\n", re.MULTILINE)  # on a slow machine
    return process.returncode, progress.sub("", said)


def run(arguments: Sequence[str], folder: Path, first: Sequence[Path] = ()) -> tuple[int, str]:
    """Run to the end."""
    return finish(start(arguments, folder, first))


def succeed(arguments: Sequence[str], folder: Path) -> str:
    """Run to the end, which must be a good one."""
    status, said = run(arguments, folder)
    assert status == 0, said
    return said


def refused(arguments: Sequence[str], folder: Path, *parts: str, status: int = 1, first: Sequence[Path] = ()) -> None:
    """Run, and check that it is refused in one line that has these parts."""
    found, said = run(arguments, folder, first)
    assert found == status, said
    assert said.count("\n") == 1 and said.startswith("glip-batch: error: "), said
    assert all(part in said for part in parts), said


def results(folder: Path) -> dict[str, bytes]:
    """The files that a run ended with."""
    return {name: (folder / name).read_bytes() for name in RESULTS}


def rows(folder: Path) -> list[dict[str, Any]]:
    """The rows of the Parquet file."""
    from pyarrow import parquet

    found: list[dict[str, Any]] = parquet.read_table(folder / "detections.parquet").to_pylist()
    return found


def failures(folder: Path) -> list[dict[str, Any]]:
    """The list of failures."""
    found: list[dict[str, Any]] = json.loads((folder / "failures.json").read_text())
    return found


def recorded(folder: Path) -> int:
    """How many outcomes the parts hold."""
    return sum(len(part.read_text().splitlines()) - 2 for part in (folder / "parts").glob("[0-9]*.jsonl"))


def named(pids: Iterable[int], word: str) -> list[int]:
    """Those of the processes in whose command line a word stands."""
    found = []
    for pid in pids:
        try:
            line = Path(f"/proc/{pid}/cmdline").read_text()
        except OSError:
            continue
        if word in line:
            found.append(pid)
    return found
