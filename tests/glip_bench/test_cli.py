"""glip-bench on a tiny bundle, and its errors."""

from __future__ import annotations

import json
import shutil

import pytest
from glip_bench.cli import main, render
from glip_bench.stages import Stage

ARGUMENTS = ["--frame", "120x90", "--shortest-side", "96", "--runs", "2", "--prompt", "person. dog", "--quiet"]


@pytest.fixture(scope="module")
def result(tiny_bundle, tmp_path_factory):
    file = tmp_path_factory.mktemp("bench") / "result.json"
    assert main(["--model", str(tiny_bundle), *ARGUMENTS, "--json", str(file)]) == 0
    return json.loads(file.read_text())


def test_a_result_says_what_was_measured_on_what(result):
    assert result["kind"] == "detection" and result["schema"] == 1
    assert result["shape"] == {"batch": 1, "frame": [90, 120], "network": [96, 128], "tokens": 5, "classes": 2}
    assert result["subject"]["variant"] == "GLIP (custom)" and len(result["subject"]["checkpoint_sha256"]) == 64
    assert result["machine"]["cores"] >= 1 and "onnxruntime" in result["versions"]
    for timing in result["frame_ms"].values():
        assert timing["runs"] == 2 and 0 < timing["minimum"] <= timing["median"] <= timing["maximum"]
    whole = result["frame_ms"]["whole frame"]["median"]
    assert whole > result["frame_ms"]["threshold and NMS"]["minimum"]
    assert 30e6 < result["peak_resident_bytes"] < 2e9


def test_every_stage_of_the_network_took_time(result):
    stages = result["image_branch_stage_ms"]
    assert list(stages) == [stage.value for stage in Stage]
    assert all(ms > 0 for ms in stages.values())


def test_a_known_prompt_costs_next_to_nothing(result):
    cost = result["prompt_ms"]
    first = cost["first prompt (loads the text branch)"]
    assert cost["first prompt again (memory)"] < first / 3
    assert cost["known from an earlier run (disk)"] < first


def test_the_table_has_every_row(result):
    shown = render(result)
    for part in ("image branch", "Swin", "second prompt", "1920x1080", "frames per second", "peak resident memory"):
        assert part in shown


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        (["--picture", "none.jpg"], "none.jpg"),
        (["--json", "no/such/folder/x.json"], "does not exist"),
        (["--json", "."], "is a folder"),
        (["--prompt", " . "], "no words"),
        (["--longest-side", "-5"], "longest_side is -5"),
    ],
)
def test_errors_are_one_line(tiny_bundle, capsys, monkeypatch, tmp_path, extra, said):
    monkeypatch.chdir(tmp_path)
    assert main(["--model", str(tiny_bundle), *ARGUMENTS, *extra]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("glip-bench: error: ") and said in line
    assert list(tmp_path.iterdir()) == []


def test_a_changed_bundle_is_refused(tiny_bundle, tmp_path, capsys):
    copy = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    with (copy / "image.onnx.data").open("r+b") as file:
        file.write(b"\x01\x02\x03\x04")
    assert main(["--model", str(copy), *ARGUMENTS]) == 1
    assert "was changed after the export" in capsys.readouterr().err


@pytest.mark.parametrize("extra", [["--frame", "big"], ["--frame", "0x5"], ["--runs", "0"], ["--threads", "x"]])
def test_bad_usage_is_status_2(capsys, extra):
    with pytest.raises(SystemExit) as caught:
        main(["--model", "x", *extra])
    assert caught.value.code == 2
