"""The script for machines with a GPU: all of it that a CPU can run."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from glip_bench.limits.hardware import HARDWARE
from kernels import check_kernels, correctness, kernel, speed
from kernels.floors import calls
from kernels.half_model import Inputs
from kernels.timing import summary
from tiny_glip import tiny_model

from glip_deploy.errors import GlipError

ROOT = Path(__file__).resolve().parents[2]


def test_the_script_s_own_checks_hold_on_the_host(host_library, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self: self)
    rows = correctness.goldens(host_library)
    assert len(rows) >= 5 and all(row["ok"] for row in rows)
    generator = torch.Generator().manual_seed(0)
    for last in (False, True):
        case = correctness.Case(((9, 7), (1, 1), (2, 33)), 24, 40, 2, 2, 3.0)
        error = correctness.against_double(host_library, generator, case, torch.float32, last)
        assert error < correctness.TOLERANCE["fp32"]


def program(*arguments):
    script = ROOT / "benchmarks" / "kernels" / "check_kernels.py"
    return subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True, check=False)


def test_floors_need_no_gpu():
    done = program("--floors")
    assert done.returncode == 0, done.stderr
    assert "P3 100x168, stride 1" in done.stdout and "GLIP-L, all" in done.stdout
    assert all(name in done.stdout for name in HARDWARE)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, which this is not about")
def test_without_a_gpu_one_line_says_so(tmp_path):
    done = program("--output", str(tmp_path / "x.json"))
    assert done.returncode == 1 and list(tmp_path.iterdir()) == []
    assert done.stderr.startswith("check_kernels.py: error: torch ") and done.stderr.count("\n") == 1
    assert "sees no NVIDIA GPU here" in done.stderr


def test_bad_usage():
    assert program().returncode == 2
    done = program("--output", "no/such/folder/x.json")
    assert done.returncode == 1 and "output no/such/folder/x.json" in done.stderr


def test_a_library_that_is_none(tmp_path, monkeypatch):
    monkeypatch.setattr(check_kernels, "require_gpu", lambda: torch)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    (tmp_path / "lib.so").write_text("no")
    for name, said in (("none.so", "is not there"), ("lib.so", "cannot be loaded")):
        with pytest.raises(GlipError, match=said):
            check_kernels.check(tmp_path / "x.json", tmp_path / name, 1)


def made_up():
    times = {"median": 40.0, "minimum": 39.0, "maximum": 50.0, "p95": 45.0}
    shape = {"name": "P3", "out": [100, 168], "stride": 1, "a_layer": 1, "ours_us": times, "ours_nchw_us": times}
    shape |= {"torchvision_us": {**times, "median": 100.0}, "faster": 2.5}
    shape |= {"floor_us": {"arithmetic": 20.0, "bytes": 4.0}, "times_the_floor": 2.0}
    return {
        "gpu": {"name": "NVIDIA H200"},
        "versions": {"torch": "2.13"},
        "correct": [
            {"case": "golden same", "precision": "fp32", "error": 1e-6, "ok": True},
            {"case": "golden flat", "precision": "fp32", "error": 0.5, "ok": False},
        ],
        "kernels": {"shapes": [shape], "five_levels_in_one_launch_us": times, "torchvision": "0.20"},
        "image_branch": {"left_out": "--kernels-only"},
    }


def test_aims_are_judged_and_said():
    result = made_up()
    result["aims"] = check_kernels.aims(result)
    assert [aim["met"] for aim in result["aims"].values()] == [False, True, None]
    text = check_kernels.as_text(json.loads(json.dumps(result)))
    assert "1 of 2 cases right" in text and "WRONG: golden flat" in text
    assert "P3: times faster than torchvision: 2.50, aim 3, NOT met" in text
    assert "GLIP-T image branch, CUDA graph, ms: not measured, aim 8" in text


def test_times_are_summarized():
    assert summary([3.0, 1.0, 2.0]) == {"median": 2.0, "minimum": 1.0, "maximum": 3.0, "p95": 3.0}


def test_from_start_to_end_without_a_gpu(host_library, monkeypatch, tmp_path, capsys):
    """Every part of it in the order it runs, with CPU stand-ins for what only a GPU has; the times mean nothing."""

    def clocked(action, runs):
        action()
        return summary([1.0] * runs)

    def at_once(action):
        return action(), action

    graph = {"case": "in a CUDA graph", "precision": "fp32", "error": 0.0, "ok": True}
    for target, name, stand_in in (
        (check_kernels, "require_gpu", lambda: torch),
        (speed, "timed", clocked),
        (speed, "milliseconds", clocked),
        (speed, "captured", at_once),
        (speed, "find_torchvision", lambda: None),
        (correctness, "in_a_graph", lambda *_: graph),
        (correctness, "precisions", lambda: {"fp32": torch.float32}),
        (speed, "stand_in", lambda deform=None: tiny_model()),
        (kernel, "DeformLibrary", lambda file: host_library),
        (speed, "calls", lambda: calls(96, 160)),
        (Inputs, "random", lambda glip, *_: random_inputs(glip, 96, 160, 16, "cpu")),
        (torch.cuda, "get_device_capability", lambda: (9, 0)),
        (torch.cuda, "get_device_name", lambda: "NVIDIA H200"),
        (torch.cuda, "max_memory_allocated", lambda: 0),
        (torch.Tensor, "cuda", lambda self: self),
        (torch.Tensor, "half", lambda self: self),
        (torch.nn.Module, "cuda", lambda self: self),
        (torch.nn.Module, "half", lambda self: self),
    ):
        monkeypatch.setattr(target, name, stand_in)
    monkeypatch.setattr(
        correctness,
        "CASES",
        (
            correctness.Case(((9, 7), (1, 1)), 24, 40, 2, 1, 3.0),
            correctness.Case(((9, 7), (3, 64)), 16, 8, 2, 2, 3.0),
        ),
    )
    (tmp_path / "lib.so").write_text("")
    file = tmp_path / "result.json"
    assert check_kernels.main(["--output", str(file), "--library", str(tmp_path / "lib.so"), "--runs", "5"]) == 0
    result = json.loads(file.read_text())
    assert all(row["ok"] for row in result["correct"]) and len(result["kernels"]["shapes"]) == 9
    assert result["kernels"]["shapes"][0]["times_the_floor"] > 0
    assert max(result["image_branch"]["error_against_fp32"].values()) < 1e-3  # nothing is halved here
    assert result["aims"]["P3: times faster than torchvision"]["met"] is None
    said = capsys.readouterr().out
    assert "GLIP-T image branch" in said and "DyConv" in said and "not measured" in said


random_inputs = Inputs.random


def test_a_gpu_whose_limits_are_not_known_has_a_line():
    result = made_up()
    shape = result["kernels"]["shapes"][0]
    del shape["floor_us"], shape["times_the_floor"]
    result["kernels"]["no_floor"] = "the limits of NVIDIA L40S are not known"
    result["aims"] = check_kernels.aims(result)
    assert "floor: the limits of NVIDIA L40S are not known" in check_kernels.as_text(result).splitlines()
