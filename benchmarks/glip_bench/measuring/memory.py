"""Peak memory of a subject, in a process that does nothing else."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from glip_bench.machine.gpus import DeviceMemory
from glip_bench.subjects.base import Options, SubjectName
from glip_bench.subjects.open import open_subjects
from glip_deploy.errors import BackendError

__all__ = ["Peak", "measure_peak", "resident"]


@dataclass(frozen=True)
class Peak:
    """Most memory a subject took, in bytes."""

    resident: int
    """Of the host, shared libraries included."""
    device: int | None
    """Of the GPU, CUDA's own context included; None where there is none."""


def measure_peak(name: SubjectName, options: Options, prompt: str | list[str], frame_size: tuple[int, int]) -> Peak:
    """Load a subject in a fresh process, prepare a prompt, detect in two frames, and return what that took at most.

    Args:
        name: the subject.
        options: see `Options`.
        prompt: what `Subject.prepare` takes.
        frame_size: (height, width) of the frames, in pixels.

    Raises:
        BackendError: the process failed.
    """
    given = {key: str(value) if isinstance(value, Path) else value for key, value in asdict(options).items()}
    arguments = json.dumps([name, given, prompt, frame_size])
    done = subprocess.run([sys.executable, "-m", __name__, arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
        raise BackendError(f"measuring the memory of {name} failed: {last[0][:300]}")
    return Peak(**json.loads(done.stdout))


def _measure(arguments: str) -> Peak:
    """Do what the fresh process is for."""
    import numpy as np

    name, given, prompt, (height, width) = json.loads(arguments)
    options = Options(**given)
    options = replace(
        options,
        bundle=Path(options.bundle),
        checkpoint=None if options.checkpoint is None else Path(options.checkpoint),
    )
    frame = np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)
    with DeviceMemory() as device:
        ((subject, _),) = open_subjects([SubjectName(name)], options)
        subject.prepare(prompt)
        for _ in range(2):
            subject.run(frame)
        on_device = subject.describe()["device"] != "cpu"
    return Peak(resident(), device.peak if on_device else None)


def resident() -> int:
    """Return the most memory that this process has taken so far, in bytes, shared libraries included."""
    if sys.platform == "linux":
        # Not getrusage: a child's ru_maxrss starts from its parent's, which holds subjects of its own.
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    import resource

    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    sys.stdout.write(json.dumps(asdict(_measure(sys.argv[1]))))
