"""The GPU script's checks of the TensorRT backend, on a simulated GPU."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from kernels import engine_checks
from kernels.engine_checks import check_detector, plan, sanitizer
from simulated_tensorrt import SimulatedCuda, SimulatedDeviceArray, simulated_tensorrt, write_engines

from glip_deploy import Bundle, Detector
from glip_deploy.backends import tensorrt
from glip_deploy.backends.tensorrt import TensorRTBackend

ROOT = Path(__file__).resolve().parents[2]
MAKERS = {
    "numpy's": ("numpy", SimulatedDeviceArray),
    "a library that is not here": ("no_such_package", SimulatedDeviceArray),
}


@pytest.fixture
def detector(tiny_bundle, tmp_path, monkeypatch):
    monkeypatch.setattr(tensorrt, "_RUNTIMES", {})
    monkeypatch.setattr(engine_checks, "FRAMES", 4)
    shutil.copytree(tiny_bundle, tmp_path / "glip")
    bundle, cuda = Bundle.open(tmp_path / "glip"), SimulatedCuda()
    write_engines(bundle)
    backend = TensorRTBackend.open(bundle, cuda=cuda, trt=simulated_tensorrt(cuda))
    with Detector(bundle, backend, shortest_side=96, longest_side=160) as opened:
        yield opened


PICTURE = np.random.default_rng(3).integers(0, 256, (90, 120, 3), dtype=np.uint8)


def test_a_right_backend(detector):
    rows = check_detector(detector, PICTURE, MAKERS)
    assert tuple(row["case"] for row in rows)[:4] == engine_checks.OF_DETECTORS
    assert all(row["ok"] for row in rows), rows
    assert rows[-1]["left_out"] == "no_such_package is not installed"


def test_frames_that_are_read_too_early(detector):
    def torn(picture):
        half = picture.copy()
        half[::2] = 255 - half[::2]
        return SimulatedDeviceArray(half)

    row = check_detector(detector, PICTURE, {"torn": ("numpy", torn)})[-1]
    assert not row["ok"] and row["distance"] > 1


def test_a_prompt_that_is_not_uploaded(detector, monkeypatch):
    monkeypatch.setattr(engine_checks, "PROMPTS", ("red cat", "big dog"))  # of one length, so that they share buffers
    monkeypatch.setattr(TensorRTBackend, "_stage", at_first(TensorRTBackend._stage))
    (row,) = [row for row in check_detector(detector, PICTURE, {}) if row["case"] == "a prompt changed in mid-stream"]
    assert not row["ok"]


def test_planes_that_are_mixed_up(detector, monkeypatch):
    resize = SimulatedCuda.resize

    def mixed_up(self, frame, *rest):
        resize(self, replace(frame, chroma=frame.address) if frame.chroma else frame, *rest)

    monkeypatch.setattr(SimulatedCuda, "resize", mixed_up)
    rows = {row["case"]: row["ok"] for row in check_detector(detector, PICTURE, {})}
    assert rows["frames of the host"] and not rows["frames of the host in NV12"]


def at_first(stage):
    """Stage the inputs of a shape twice only, for the results that are wanted."""

    def staged(self, bound, feed):
        if bound.runs < 2:
            stage(self, bound, feed)

    return staged


def test_an_error_is_a_row(detector):
    def broken(picture):
        raise RuntimeError("no memory\nand more")

    assert check_detector(detector, PICTURE, {"x": ("numpy", broken)})[-1]["error"] == "no memory"


def test_the_plan_says_what_is_missing():
    script = ROOT / "benchmarks" / "kernels" / "check_kernels.py"
    done = subprocess.run([sys.executable, script, "--plan"], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert "two clones under load: needs --bundle" in lines and "frames of PyCUDA: needs --bundle" in lines
    assert lines == plan(None)
    assert "two clones under load" in plan(Path("glip_t"))


def test_memory_errors(monkeypatch, tmp_path):
    monkeypatch.setattr(engine_checks.shutil, "which", lambda name: None)
    assert sanitizer(["x.py"]) == {"case": "compute-sanitizer", "ok": True, "left_out": "it is not on the PATH"}
    tool = tmp_path / "compute-sanitizer"
    tool.write_text("#!/bin/sh\necho ERROR SUMMARY: 1 error; exit 9\n")
    tool.chmod(0o755)
    monkeypatch.setattr(engine_checks.shutil, "which", lambda name: str(tool))
    row = sanitizer(["x.py"])
    assert not row["ok"] and row["error"].startswith("ERROR SUMMARY")
