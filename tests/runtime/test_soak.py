"""The soak of the C++ runtime, in its shortest form, and what it calls flat."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import pytest
from parity_data import ROOT
from selection import slowly

SCRIPT = ROOT / "benchmarks" / "robustness" / "soak_cpp.py"
sys.path.insert(0, str(SCRIPT.parent))

from soak import Sample, verdict, verdicts  # noqa: E402

FLAT = [Sample(frames, frames / 10, 300.0 + frames % 3, 8, 4) for frames in range(100, 10_001, 100)]


@pytest.mark.parametrize(
    ("grown", "flat"),
    [
        ({}, True),
        ({"resident_mb": lambda sample: sample.resident_mb + sample.frames / 500}, False),
        ({"descriptors": lambda sample: sample.descriptors + sample.frames // 9_000}, False),
        ({"threads": lambda sample: sample.threads + sample.frames // 9_000}, False),
        ({"resident_mb": lambda sample: 300.0 + 50 * (sample.frames < 1_000)}, True),  # a warm-up may need more
    ],
    ids=["flat", "memory", "descriptors", "threads", "warm-up"],
)
def test_what_grows_is_found(grown, flat):
    samples = [replace(sample, **{name: change(sample) for name, change in grown.items()}) for sample in FLAT]
    assert verdict(samples, limit=1.0)["flat"] is flat


def test_each_backend_is_judged_by_itself():
    """A process that has them in turn needs more memory and less, as it happens; what is never freed is a leak."""
    turns = (None, "onnxruntime", "openvino")
    mixed = [
        replace(sample, backend=turns[i % 3], allocated_mb=20.0, resident_mb=(500.0, 300.0, 400.0)[i % 3])
        for i, sample in enumerate(FLAT)
    ]
    found = verdicts(mixed, limit=1.0, leak=0.2)
    assert list(found) == ["onnxruntime", "openvino", "none open"] and all(one["flat"] for one in found.values())
    leak = [replace(sample, allocated_mb=20 + sample.frames / 4_000) for sample in mixed]
    assert [one["flat"] for one in verdicts(leak, limit=1.0, leak=0.2).values()] == [True, True, False]
    grown = [replace(s, resident_mb=s.resident_mb + s.frames / 500 * (s.backend == "openvino")) for s in mixed]
    assert [one["flat"] for one in verdicts(grown, limit=1.0, leak=0.2).values()] == [True, False, True]


def test_what_goes_up_and_down_is_no_growth_until_it_is():
    waves = [replace(sample, resident_mb=300 + 40.0 * (i * 7 % 10) / 10) for i, sample in enumerate(FLAT)]
    assert verdict(waves, limit=1.0)["flat"] and verdict(waves, limit=1.0)["standard_error"] > 0.3
    grown = [replace(sample, resident_mb=sample.resident_mb + sample.frames / 400) for sample in waves]
    assert not verdict(grown, limit=1.0)["flat"]


@slowly
def test_a_short_soak(runtime, tiny_bundle, tmp_path):
    """So short that its memory says nothing: it may not fail, and descriptors and threads may not grow."""
    program, report = runtime / "glip_soak", tmp_path / "soak.json"
    command = [sys.executable, SCRIPT, tiny_bundle, "--program", program, "--frames", "120", "--limit", "1e6"]
    done = subprocess.run([*command, "--json", report], capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(report.read_text())
    assert set(found["verdict"]) == {"closed", "open"} and all(one["flat"] for one in found["verdict"].values())
    assert all(len(some) >= 5 for some in found["samples"].values())


def test_a_bundle_that_is_not_there(runtime, tmp_path):
    command = [sys.executable, SCRIPT, tmp_path / "none", "--program", runtime / "glip_soak", "--frames", "10"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1 and "glip_soak: error: " in done.stderr and "none" in done.stderr
    assert "Traceback" not in done.stderr
