"""The comparison of C++ with Python, in its shortest form: what it measures, and what it refuses to call a result."""

from __future__ import annotations

import json
import subprocess
import sys

from parity_data import ROOT
from selection import slowly

SCRIPT = ROOT / "benchmarks" / "runtime" / "compare.py"


def compare(*arguments):
    command = [sys.executable, SCRIPT, *arguments, "--side", "64", "--threads", "1", "--rounds", "3", "--frames", "1"]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


@slowly
def test_each_subject_is_measured_in_turn(runtime, tiny_bundle, tmp_path):
    done = compare(tiny_bundle, "--program", runtime / "glip_pace", "--json", tmp_path / "found.json")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["frames"] == 3 and found["picture"]["network"] == [64, 82]
    assert list(found["subjects"]) == ["C++, OpenVINO", "Python, OpenVINO", "Python, ONNX Runtime"]
    for facts in found["subjects"].values():
        low, high = facts["frame_ms_quartiles"]
        assert 0 < facts["least_ms"] <= low <= facts["frame_ms"] <= high
        assert facts["open_ms"] > 0 and facts["encode_ms"] > 0 and facts["peak_mb"] > 10


def test_a_bundle_that_is_not_there(runtime, tmp_path):
    done = compare(tmp_path / "none", "--program", runtime / "glip_pace")
    assert done.returncode == 1 and "glip_pace: error: bundle" in done.stderr and "none" in done.stderr
    assert "Traceback" not in done.stderr


def test_other_boxes_are_no_result(runtime, tiny_bundle, tmp_path):
    """A program that finds other boxes is not the same runtime: its times say nothing."""
    other = tmp_path / "glip_pace"
    other.write_text(
        f"#!{sys.executable}\n"
        "import sys\n"
        'print(\'{"open_ms": 1, "encode_ms": 1}\', flush=True)\n'
        "for line in sys.stdin:\n"
        '    print(\'{"ms": [1.0], "found": 12345, "peak_mb": 1}\', flush=True)\n'
    )
    other.chmod(0o755)
    done = compare(tiny_bundle, "--program", other, "--json", tmp_path / "found.json")
    assert done.returncode == 1 and "the numbers of boxes differ" in done.stderr
    assert not (tmp_path / "found.json").exists()
