"""Peak resident memory of detection, in a process that does nothing else."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from glip_deploy.errors import GlipError

__all__ = ["peak_resident_bytes"]

_PROGRAM = """
import json, sys
import numpy as np
from glip_deploy import Detector
bundle, prompt, height, width, shortest, longest, threads = json.loads(sys.argv[1])
detector = Detector.open(bundle, shortest_side=shortest, longest_side=longest, threads=threads, cache_dir=None)
frame = np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)
encoded = detector.encode(prompt)
for _ in range(2):
    detector.detect(frame, encoded, color="bgr")
if sys.platform == "linux":
    # Not getrusage: a child's ru_maxrss starts from its parent's, which holds sessions of its own.
    status = open("/proc/self/status").read()
    peak = int(status.split("VmHWM:")[1].split()[0]) * 1024
else:
    import resource
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
print(json.dumps(peak))
"""


def peak_resident_bytes(
    bundle: Path,
    prompt: str | list[str],
    frame_size: tuple[int, int],
    shortest_side: int,
    longest_side: int | None,
    threads: int | None = None,
) -> int:
    """Open the bundle, encode a prompt and detect on two frames in a fresh process; return its peak memory in bytes.

    Args:
        bundle: directory.
        prompt: what `Detector.encode` takes.
        frame_size: (height, width) of the frame, in pixels.
        shortest_side: as for `Detector.open`.
        longest_side: as for `Detector.open`.
        threads: as for `Detector.open`.

    Raises:
        GlipError: the process failed.
    """
    arguments = [str(bundle), prompt, *frame_size, shortest_side, longest_side, threads]
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, json.dumps(arguments)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
        raise GlipError(f"measuring the memory failed: {last[0][:300]}")
    return int(json.loads(done.stdout))
