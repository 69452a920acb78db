"""The paper's table, with what result files add to it."""

import json

import pytest
from bench_results import result, timing
from glip_bench.cli import main
from glip_bench.reporting.paper import MACHINES, Row, measured_rows, paper_table


@pytest.fixture
def folder(tmp_path):
    ours = result(400.0)
    ours["subjects"]["torch-official"] = {
        **ours["subjects"]["onnxruntime-cpu"],
        "pieces_ms": {"image branch": timing([4000] * 3), "whole frame": timing([5000] * 3)},
        "precision": "fp32",
        "tokens": 256,
        "device": "cpu",
    }
    (tmp_path / "a.json").write_text(json.dumps(ours))
    on_gpu = result(4.0, 0.0, device="cuda", precision="fp16", peak_device_bytes=1.5e9)
    on_gpu["gpus"] = [{"name": "Tesla P100-PCIE-16GB", "driver": "535"}]
    on_gpu["model"].update(variant="GLIP-L")
    (tmp_path / "b.json").write_text(json.dumps(on_gpu))
    small = result()
    small["shape"].update(network=[320, 544])
    (tmp_path / "c.json").write_text(json.dumps(small))
    (tmp_path / "engines.json").write_text(json.dumps({"builds": {}}))
    return tmp_path


def test_the_paper_alone(tmp_path, capsys):
    assert main(["paper", "--results", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    for fps, memory in (("4.84", "1.0"), ("2.52", "2.4"), ("0.54", "4.8"), ("0.32", "7.7")):
        assert any(fps in line and f" {memory} " in line and "P100" in line for line in out.splitlines())
    assert out.count("not measured yet") == 4


def test_measured_rows_stand_beside_the_paper(folder, capsys):
    assert main(["paper", "--results", str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    (official,) = (line for line in lines if "torch-official" in line)
    assert "Some CPU, 2 cores" in official and "256 tokens" in official and " 0.20 " in official
    (engine,) = (line for line in lines if "Tesla P100" in line)
    assert "GLIP-L" in engine and " 111.11 " in engine and " 1.5 " in engine and "b.json" in engine
    (missing,) = (line for line in lines if "not measured" in line and "GLIP-L" in line and " with " in line)
    assert "V100, A100" in missing and "P100" not in missing
    assert lines[-1] == "left out: c.json: its canvas is 544x320, the table is for 1344x800"


def test_a_damaged_file_is_said_and_survived(folder):
    (folder / "broken.json").write_text("{")
    rows, left_out = measured_rows(folder)
    assert len(rows) == 3 and any("broken.json is not JSON" in reason for reason in left_out)


def test_a_gpu_with_a_longer_name_does_not_count_as_measured(folder):
    other = json.loads((folder / "b.json").read_text())
    other["gpus"][0]["name"] = "NVIDIA RTX A1000"
    (folder / "b.json").write_text(json.dumps(other))
    rows, _ = measured_rows(folder)
    lines = paper_table(rows).splitlines()
    assert any("NVIDIA RTX A1000" in line for line in lines)
    assert all("P100, V100, A100" in line for line in lines if "not measured yet" in line)


def test_nothing_is_missing_where_all_was_measured():
    rows = [Row("GLIP-T", True, f"Tesla {gpu}-SXM2-16GB", "tensorrt", 9.0, 1.0, "x") for gpu in MACHINES]
    lines = paper_table(rows).splitlines()
    assert not any("not measured" in line for line in lines if "GLIP-T" in line and " with " in line)
    assert any("not measured" in line for line in lines if "GLIP-T" in line and " without " in line)


def test_no_such_folder(capsys):
    assert main(["paper", "--results", "nowhere"]) == 1
    assert "--results nowhere is not a folder" in capsys.readouterr().err
