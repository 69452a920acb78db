"""Kills, signals, full disks, read-only folders, closed streams, and a bundle that is replaced while it is opened.

No file that is half written may be taken for a good one, no input may be overwritten, and the exit status is the one
that is documented. Moments are drawn from a seed. A few are tried by default, many with GLIP_SLOW=1 (`make faults`).
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

from jobs import JOBS

from glip_deploy import Detector
from glip_deploy.errors import BundleError
from glip_deploy.files import _exchange

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="faults are made by means that Linux has")
LONG = os.environ.get("GLIP_SLOW") == "1"
KILLS = {"export": (1, 30), "build": (1, 30), "cache": (4, 100), "video": (1, 40), "batch": (1, 40)}
"""By job: how often it is disturbed by default, and in `make faults`."""
SIGNALS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}
SEED = 0


def times(job):
    return KILLS[job][LONG]


@pytest.fixture(scope="module")
def jobs(tiny_bundle, tiny_checkpoint, tmp_path_factory):
    """Make a job, and know how long it takes; by name."""
    durations = {}

    def make(name, folder):
        if name == "export" and not LONG:
            durations[name] = 6.0
        if name not in durations:
            durations[name] = JOBS[name](tmp_path_factory.mktemp(name), tiny_bundle, tiny_checkpoint).duration()
        return JOBS[name](folder, tiny_bundle, tiny_checkpoint), durations[name]

    return make


@pytest.mark.parametrize("name", JOBS)
def test_a_kill_at_any_moment(jobs, tmp_path, name):
    draw, states = random.Random(f"{SEED} {name} kill"), []
    for i in range(times(name)):
        job, seconds = jobs(name, tmp_path / str(i))
        with job.start() as process:
            time.sleep(draw.uniform(0, seconds))
            process.kill()
            process.communicate(timeout=60)
        states.append(job.check())
        for left in job.folder.rglob(".*"):
            os.utime(left, (0, 0))  # as if it had been left long ago
        if i % 5 == 0 and (LONG or name != "export"):
            job.prepare()
            job.duration()  # what was left is no obstacle, and goes
            if name in ("export", "build"):
                assert job.leftovers() == []
    print(f"{name}: {len(states)} kills, { ({state: states.count(state) for state in states}) }")


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("name", ["export", "build", "video", "batch"])
def test_a_signal_at_any_moment(jobs, tmp_path, name, number):
    if not LONG and (name, number) in (
        ("export", signal.SIGHUP), ("export", signal.SIGINT), ("build", signal.SIGTERM), ("build", signal.SIGHUP)
    ):  # fmt: skip
        pytest.skip("takes seconds and is as another signal; GLIP_SLOW=1 runs it")
    draw, statuses = random.Random(f"{SEED} {name} {number}"), []
    for i in range(max(1, times(name) // 3)):
        job, seconds = jobs(name, tmp_path / str(i))
        with job.start() as process:
            time.sleep(draw.uniform(0.05, seconds))
            process.send_signal(number)
            _, said = process.communicate(timeout=60)
        # Before and after the program's own code the signal itself ends the process; a shell gives the same number.
        assert process.returncode in (0, SIGNALS[number], -number), said
        assert "Traceback" not in said
        if process.returncode == SIGNALS[number]:  # the report of a job that had ended already is longer
            assert said.rstrip().count("\n") <= 12
        job.check()
        assert job.leftovers() == []
        statuses.append(process.returncode)
    print(f"{name}, {signal.Signals(number).name}: {len(statuses)} signals, statuses {sorted(set(statuses))}")


# -- disks ------------------------------------------------------------------------------------------------------------

UNSHARE = ["unshare", "--mount", *([] if os.geteuid() == 0 else ["--user", "--map-root-user"])]


def mounted(folder, mount, command, **options):
    """Run a command while something is mounted on a folder, which no other process sees; give its result.

    What is there afterwards is copied to `folder` + ".after".
    """
    folder.mkdir(exist_ok=True)
    where, after = shlex.quote(str(folder)), shlex.quote(f"{folder}.after")
    run = f"{shlex.join(map(str, command))}; status=$?; cp -a {where} {after}; exit $status"
    script = f"{mount.format(where)} || exit 99; {run}"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "GLIP_DEPLOY_CACHE": str(folder / "cache")}
    done = subprocess.run(
        [*UNSHARE, "sh", "-c", script],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=environment,
        **options,
    )
    if done.returncode in (1, 99) and "permitted" in done.stderr and "Operation not" in done.stderr:
        pytest.skip(f"nothing can be mounted here ({done.stderr.strip().splitlines()[0]})")
    return done


def run_module(module, *arguments):
    return [sys.executable, "-c", f"import sys; from {module} import main; sys.exit(main(sys.argv[1:]))", *arguments]


TMPFS = "mount -t tmpfs -o size=%dk none {}"
READ_ONLY = "mount --bind {0} {0} && mount -o remount,bind,ro {0}"


def visible(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*")) if folder.exists() else []


@pytest.mark.parametrize("size", [64, 1500, 2500] if LONG else [1500])
@pytest.mark.parametrize("name", ["export", "build"])
def test_a_full_disk_while_a_folder_is_written(tiny_bundle, tiny_checkpoint, tmp_path, name, size):
    if name == "export" and not LONG:
        pytest.skip("imports torch and traces for half a minute; GLIP_SLOW=1 runs it")
    disk = tmp_path / "disk"
    command = run_module("glip_export.cli", "--model", tiny_checkpoint, "--output", disk / "out", "--quiet")
    if name == "build":
        command = run_module("glip_engines.cli", tiny_bundle, "--onnx-only", disk / "out", "--quiet")
    done = mounted(disk, TMPFS % size, command)
    assert done.returncode == 1, done.stderr
    assert done.stderr.count("\n") == 1 and "no space left" in done.stderr, done.stderr
    assert [left for left in visible(Path(f"{disk}.after")) if not left.startswith("cache")] == []


@pytest.mark.parametrize("size", [4, 16, 40, 80] if LONG else [16])
def test_a_full_disk_while_a_video_is_written(tiny_bundle, tiny_checkpoint, tmp_path, size):
    job = JOBS["video"](tmp_path / "job", tiny_bundle, tiny_checkpoint)
    disk = tmp_path / "disk"
    outputs = ["--output", disk / "o.mp4", "--json", disk / "o.jsonl", "--coco", disk / "c.json", "--quiet"]
    arguments = [*job.arguments[: job.arguments.index("--output")], *outputs]
    done = mounted(disk, TMPFS % size, run_module("glip_deploy.cli.detect", *arguments), cwd=job.folder)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert "no space left" in done.stderr.splitlines()[-1], done.stderr
    after = Path(f"{disk}.after")
    for line in (after / "o.jsonl").read_text().splitlines() if (after / "o.jsonl").exists() else ():
        json.loads(line)
    assert not (after / "c.json").exists() or json.loads((after / "c.json").read_text()) is not None
    assert job.source.read_bytes() == job.before


@pytest.mark.parametrize("size", [8, 24, 48] if LONG else [24])
def test_a_full_disk_while_many_pictures_are_looked_at(tiny_bundle, tiny_checkpoint, tmp_path, size):
    """What is done stays; with space, the same command goes on to the same results."""
    job = JOBS["batch"](tmp_path / "job", tiny_bundle, tiny_checkpoint)
    job.duration()
    whole = (job.folder / "out" / "detections.parquet").read_bytes()
    disk = tmp_path / "disk"
    arguments = [*job.arguments[:-1], disk / "out"]
    done = mounted(disk, TMPFS % size, run_module("glip_deploy.cli.batch", *arguments), cwd=job.folder)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert "no space left" in done.stderr.splitlines()[-1], done.stderr
    shutil.rmtree(job.folder / "out")
    if (left := Path(f"{disk}.after") / "out").exists():
        left.rename(job.folder / "out")
    job.duration()
    assert (job.folder / "out" / "detections.parquet").read_bytes() == whole


@pytest.mark.parametrize("kind", ["export", "build", "picture", "json", "coco", "cache"])
def test_a_read_only_folder(tiny_bundle, tiny_checkpoint, tmp_path, kind):
    if kind == "export" and not LONG:
        pytest.skip("imports torch for seconds; GLIP_SLOW=1 runs it")
    from PIL import Image

    disk = tmp_path / "disk"
    Image.new("RGB", (48, 32)).save(tmp_path / "a.jpg")
    common = ["--model", tiny_bundle, "--prompt", "dog", "--source", tmp_path / "a.jpg", "--shortest-side", "32"]
    output = {"picture": "--output", "json": "--json", "coco": "--coco"}.get(kind)
    if kind == "export":
        command = run_module("glip_export.cli", "--model", tiny_checkpoint, "--output", disk / "out")
    elif kind == "build":
        command = run_module("glip_engines.cli", tiny_bundle, "--onnx-only", disk / "out")
    elif kind == "cache":
        command = run_module("glip_deploy.cli.detect", *common, "--json", "-", "--cache-dir", disk / "c")
    else:
        command = run_module("glip_deploy.cli.detect", *common, output, disk / "o.jpg")
    done = mounted(disk, READ_ONLY, command)
    assert "Traceback" not in done.stderr, done.stderr
    if kind == "cache":  # a cache that cannot be written is worth a warning, no more
        assert done.returncode == 0 and "cannot be kept" in done.stderr, done.stderr
    else:
        assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert visible(disk) == []


# -- two processes, one bundle ----------------------------------------------------------------------------------------


def test_a_bundle_that_is_exchanged_all_the_time_is_never_mixed(tiny_bundle, tmp_path):
    """Two bundles change places all the time; each open gives one of them, whole, or a BundleError.

    In the long run first so fast that none can be opened, then, as always, at moments that are drawn.
    """
    one, two = (shutil.copytree(tiny_bundle, tmp_path / name) for name in ("one", "two"))
    weights = two / "text.onnx.data"
    weights.write_bytes((np.frombuffer(weights.read_bytes(), np.float32) * 1.25).tobytes())
    manifest = json.loads((two / "manifest.json").read_text())
    manifest["files"]["text.onnx.data"]["sha256"] = hashlib.sha256(weights.read_bytes()).hexdigest()
    manifest["variant"] = "other"
    (two / "manifest.json").write_text(json.dumps(manifest))
    options = {"shortest_side": 32, "threads": 1}
    wanted = {}
    for path in (one, two):
        with Detector.open(path, cache_dir=None, **options) as detector:
            wanted[detector.bundle.variant] = detector.encode(["dog"]).embedding
    assert not np.array_equal(*wanted.values())
    stop, exchanged = threading.Event(), []

    def exchange():
        draw = random.Random(SEED)
        while not stop.is_set():
            assert _exchange(one, two)
            exchanged.append(1)
            time.sleep(0.001 if LONG and len(exchanged) < 5000 else draw.choice([0.001, 0.1, 3]))

    worker = threading.Thread(target=exchange)
    worker.start()
    opened: dict[str, int] = {}
    refused = 0
    try:
        for i in range(60 if LONG else 6):
            cache = tmp_path / "cache" if i % 2 else None
            try:
                with Detector.open(one, cache_dir=cache, **options) as detector:
                    found = detector.encode(["dog"]).embedding
            except BundleError:
                refused += 1
                continue
            np.testing.assert_array_equal(found, wanted[detector.bundle.variant])
            opened[detector.bundle.variant] = opened.get(detector.bundle.variant, 0) + 1
    finally:
        stop.set()
        worker.join()
    print(f"{len(exchanged)} exchanges, opened {opened}, refused {refused}")
    assert sum(opened.values()) > 0 and len(exchanged) > 1


# -- closed streams ---------------------------------------------------------------------------------------------------

CLOSED = ["<&-", ">&-", "2>&-", "<&- >&-", "<&- >&- 2>&-"]


@pytest.mark.parametrize("closed", CLOSED)
@pytest.mark.parametrize("module", ["glip_deploy.cli.detect", "glip_export.cli", "glip_engines.cli", "glip_bench.cli"])
def test_closed_streams(tmp_path, module, closed):
    """A mistake of the user: one line where there is a stream for it, and the status."""
    if not LONG and closed != CLOSED[-1]:
        pytest.skip("one of many combinations; GLIP_SLOW=1 runs it")
    arguments = {
        "glip_deploy.cli.detect": ["--model", "none", "--prompt", "dog", "--source", "none.jpg"],
        "glip_export.cli": ["--model", "none.pth", "--quiet"],
        "glip_engines.cli": ["none", "--onnx-only", "out", "--quiet"],
        "glip_bench.cli": ["compare", "none", "none"],
    }[module]
    script = f"{shlex.join(run_module(module, *arguments))} {closed}"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        script, shell=True, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False, env=environment
    )
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.count("\n") == (0 if "2>&-" in closed else 1), done.stderr
    assert visible(tmp_path) == []
