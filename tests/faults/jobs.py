"""Jobs that are disturbed: commands that write something, and what must hold of it whatever happened to them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from pathlib import Path

import numpy as np

from glip_deploy import Bundle

START = """
import sys
from {module} import main
print("begun", file=sys.stderr, flush=True)
sys.exit(main(sys.argv[1:]))
"""


class Job(ABC):
    """A command in a folder of its own."""

    name: str
    module: str

    def __init__(self, folder: Path, bundle: Path, checkpoint: Path) -> None:
        self.folder, self.bundle, self.checkpoint = folder, bundle, checkpoint
        folder.mkdir(parents=True, exist_ok=True)
        self.prepare()

    @abstractmethod
    def prepare(self) -> None:
        """Make what the command reads or replaces."""

    @property
    @abstractmethod
    def arguments(self) -> list[str]:
        """Its arguments."""

    @abstractmethod
    def check(self) -> str:
        """Check what is there; return what it is, "nothing" or "whole" for instance."""

    @property
    def program(self) -> str:
        """The program, which says that it has begun."""
        return START.format(module=self.module)

    def start(self) -> subprocess.Popen[str]:
        """Start it, and return when its imports are done and its own code begins."""
        command = [sys.executable, "-c", self.program, *self.arguments]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "2"}
        environment["GLIP_DEPLOY_CACHE"] = str(self.folder / "cache")
        process = subprocess.Popen(
            command,
            cwd=self.folder,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stderr is not None
        assert process.stderr.readline() == "begun\n", process.stderr.read()
        return process

    def duration(self) -> float:
        """Run it undisturbed; return the seconds it took."""
        began = time.monotonic()
        with self.start() as process:
            _, said = process.communicate(timeout=300)
        assert process.returncode == 0, said
        assert self.check() in ("whole", "new"), self.check()
        return time.monotonic() - began

    def leftovers(self) -> list[str]:
        """Return hidden files and folders: what is not complete."""
        return sorted(str(path.relative_to(self.folder)) for path in self.folder.rglob(".*"))


class Export(Job):
    """`glip-export` over a bundle that is there; its manifest is told apart by a line at its end."""

    name, module = "export", "glip_export.cli"

    def prepare(self) -> None:
        """See `Job.prepare`."""
        self.target = self.folder / "out"
        shutil.rmtree(self.target, ignore_errors=True)
        shutil.copytree(self.bundle, self.target)
        with (self.target / "manifest.json").open("a") as manifest:
            manifest.write("\n\n")

    @property
    def arguments(self) -> list[str]:
        """See `Job.arguments`."""
        return ["--model", str(self.checkpoint), "--output", "out", "--overwrite"]

    def check(self) -> str:
        """See `Job.check`."""
        Bundle.open(self.target)  # at any moment a whole bundle is there
        return "old" if (self.target / "manifest.json").read_text().endswith("\n\n") else "new"


class OnnxOnly(Job):
    """`glip-build --onnx-only`."""

    name, module = "build", "glip_engines.cli"

    def prepare(self) -> None:
        """See `Job.prepare`."""
        shutil.rmtree(self.folder / "graphs", ignore_errors=True)

    @property
    def arguments(self) -> list[str]:
        """See `Job.arguments`."""
        return [str(self.bundle), "--onnx-only", "graphs", "--precision", "fp32"]

    def check(self) -> str:
        """See `Job.check`."""
        import onnx

        target = self.folder / "graphs"
        if not target.exists():
            return "nothing"
        assert (target / "README.md").is_file()
        for graph in ("text", "image"):
            onnx.load(target / f"{graph}.onnx")
        return "whole"


class Cache(Job):
    """A process that fills the prompt cache with many entries, over and over."""

    name, module = "cache", "none"
    COUNT = 24

    @property
    def program(self) -> str:
        """See `Job.program`."""
        return (
            "import sys, numpy as np\n"
            "from glip_deploy.prompts.cache import PromptCache\n"
            "print('begun', file=sys.stderr, flush=True)\n"
            "for turn in range(10):\n"
            "    cache = PromptCache('cache', 'b' * 64, memory_items=0, disk_bytes=2_000_000)\n"
            f"    for i in range({self.COUNT}):\n"
            "        cache.put(f'key{i}', np.full((64, 128), i, np.float32))\n"
        )

    def prepare(self) -> None:
        """See `Job.prepare`."""

    @property
    def arguments(self) -> list[str]:
        """See `Job.arguments`."""
        return []

    def check(self) -> str:
        """See `Job.check`."""
        from glip_deploy.prompts.cache import PromptCache

        cache = PromptCache(self.folder / "cache", "b" * 64, memory_items=0)
        found = [cache.get(f"key{i}") for i in range(self.COUNT)]
        for i, embedding in enumerate(found):
            assert embedding is None or np.array_equal(embedding, np.full((64, 128), i, np.float32))
        return "whole" if all(embedding is not None for embedding in found) else "some"


class Video(Job):
    """`glip-detect` on a video, with every kind of output."""

    name, module = "video", "glip_deploy.cli.detect"
    FRAMES = 30

    def prepare(self) -> None:
        """See `Job.prepare`."""
        for name in ("o.mp4", "o.jsonl", "c.json"):
            (self.folder / name).unlink(missing_ok=True)
        self.source = self.folder / "v.mp4"
        if not self.source.exists():
            import av

            with av.open(str(self.source), "w") as container:
                stream = container.add_stream("mpeg4", rate=10)
                stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
                for i in range(self.FRAMES):
                    picture = av.VideoFrame.from_ndarray(np.full((48, 64, 3), i * 8, np.uint8), format="rgb24")
                    for packet in stream.encode(picture):
                        container.mux(packet)
                for packet in stream.encode():
                    container.mux(packet)
        self.before = self.source.read_bytes()

    @property
    def arguments(self) -> list[str]:
        """See `Job.arguments`."""
        where = ["--source", "v.mp4", "--output", "o.mp4", "--json", "o.jsonl", "--coco", "c.json"]
        return ["--model", str(self.bundle), "--prompt", "person. dog", "--shortest-side", "64", *where]

    def check(self) -> str:
        """See `Job.check`."""
        assert self.source.read_bytes() == self.before
        lines = self.folder / "o.jsonl"
        count = 0
        if lines.exists():
            text = lines.read_text()
            assert text.endswith("\n") or not text
            count = len([json.loads(line) for line in text.splitlines()])
        if (self.folder / "c.json").exists():
            json.loads((self.folder / "c.json").read_text())
        if (self.folder / "o.mp4").exists() and (self.folder / "o.mp4").stat().st_size:
            assert self.playable() >= 0
        return "whole" if count == self.FRAMES and self.playable() == self.FRAMES else "some"

    def playable(self) -> int:
        """Return how many frames of the annotated video can be decoded; -1 where it cannot be opened."""
        import av

        try:
            with av.open(str(self.folder / "o.mp4")) as container:
                return sum(1 for _ in container.decode(video=0))
        except (av.FFmpegError, OSError):
            return -1


class Batch(Job):
    """`glip-batch` in one process, on a folder of pictures that it may go on with."""

    name, module = "batch", "glip_deploy.cli.batch"
    PICTURES = 60

    def prepare(self) -> None:
        """See `Job.prepare`."""
        from PIL import Image

        shutil.rmtree(self.folder / "out", ignore_errors=True)
        self.pictures = self.folder / "pictures"
        self.pictures.mkdir(exist_ok=True)
        for i in range(self.PICTURES):
            Image.new("RGB", (48, 64), (4 * i, 90, 250 - 4 * i)).save(self.pictures / f"{i}.png")
        self.before = self._bytes()

    @property
    def arguments(self) -> list[str]:
        """See `Job.arguments`."""
        what = ["--model", str(self.bundle), "--prompt", "person. dog", "--shortest-side", "64", "--quiet"]
        return [*what, "--source", "pictures", "--output", "out"]

    def check(self) -> str:
        """See `Job.check`."""
        assert self._bytes() == self.before
        results = self.folder / "out"
        for name in ("coco.json", "failures.json"):
            if (results / name).exists():
                found = json.loads((results / name).read_text())
                assert name == "coco.json" or found == []
        if not (results / "detections.parquet").exists():
            return "some" if results.exists() else "nothing"
        from pyarrow import parquet

        rows = parquet.read_table(results / "detections.parquet").to_pylist()
        assert sorted(Path(row["source"]).name for row in rows) == sorted(path.name for path in self.pictures.iterdir())
        return "whole"

    def _bytes(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in self.pictures.iterdir()}


JOBS = {job.name: job for job in (Export, OnnxOnly, Cache, Video, Batch)}
