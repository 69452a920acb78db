"""glip-bench on a tiny bundle, and its errors."""

from __future__ import annotations

import re
import shutil

import pytest
from glip_bench.cli import main
from glip_bench.cli.app import with_command
from glip_bench.reporting.results import read_result
from glip_bench.reporting.text import render
from glip_bench.subjects.profile import LAYOUT
from selection import slowly

from glip_deploy.bundle.contract import Stage

ARGUMENTS = ["--frame", "120x90", "--shortest-side", "96", "--runs", "2", "--prompt", "person. dog", "--quiet"]


@pytest.fixture(scope="module")
def file(tiny_bundle, tiny_checkpoint, tmp_path_factory):
    file = tmp_path_factory.mktemp("bench") / "result.json"
    extra = ["--checkpoint", str(tiny_checkpoint), "--threshold", "0.2"]
    assert main(["run", "--model", str(tiny_bundle), *ARGUMENTS, *extra, "--json", str(file)]) == 0
    return file


@pytest.fixture(scope="module")
def result(file):
    return read_result(file)


def test_a_result_says_what_was_measured_on_what(result):
    assert result["kind"] == "detection" and result["schema"] == 2 and result["complete"]
    assert result["shape"] == {"batch": 1, "frame": [90, 120], "network": [96, 128], "tokens": 5, "classes": 2}
    assert result["model"]["variant"] == "GLIP (custom)" and result["model"]["fusion"]
    assert len(result["model"]["checkpoint_sha256"]) == 64
    assert result["machine"]["cores"] >= 1 and "onnxruntime" in result["versions"]


def test_every_subject_is_timed_and_finds_the_same(result):
    exact = {name: facts for name, facts in result["subjects"].items() if name != "openvino-bf16"}
    assert list(exact) == ["torch-official", "torch", "onnxruntime-cpu", "openvino"]
    for facts in exact.values():
        for timing in facts["pieces_ms"].values():
            assert timing["runs"] == len(timing["samples"]) == 2
            assert 0 < timing["minimum"] <= timing["median"] <= timing["p99"] <= timing["maximum"]
        agreement = facts["agreement"]
        assert agreement["with"] == "torch-official"
        assert agreement["matched"] == agreement["of"] == agreement["found"] == facts["detections"] > 0
        assert facts["peak_resident_bytes"] > 30e6 and facts["peak_device_bytes"] is None
    assert "text branch" in result["subjects"]["torch-official"]["pieces_ms"]
    assert "text branch" not in result["subjects"]["torch"]["pieces_ms"]


def test_memory_is_of_the_subject_alone(result):
    peaks = {name: facts["peak_resident_bytes"] for name, facts in result["subjects"].items()}
    assert peaks["onnxruntime-cpu"] < peaks["torch"] / 2  # torch's libraries alone are larger


def test_every_block_of_the_network_took_time(result):
    stages = result["subjects"]["onnxruntime-cpu"]["stages_ms"]
    present = [stage for stage in Stage if stage not in (Stage.TEXT, Stage.TUNED_PROMPT)]
    assert list(stages) == [*present, LAYOUT]
    assert all(ms > 0 for ms in stages.values())
    assert stages[LAYOUT] < 0.2 * sum(stages.values())
    assert list(result["subjects"]["torch"]["stages_ms"]) == [s for s in present if s is not Stage.FUSION_SOFTMAX]


def test_a_known_prompt_costs_next_to_nothing(result):
    cost = result["prompt_ms"]
    first = cost["first prompt (loads the text branch)"]
    assert cost["first prompt again (memory)"] < first / 3
    assert cost["known from an earlier run (disk)"] < first


def test_the_table_has_every_row(result):
    shown = render(result)
    for part in ("image branch", "backbone", "second prompt", "1920x1080", "p99", "FPS", "peak resident memory"):
        assert part in shown
    found = result["subjects"]["torch"]["detections"]
    assert f"{found} of {found}" in shown
    assert re.search(r"not here: onnxruntime-tensorrt: ONNX Runtime \S+ has no TensorrtExecutionProvider here", shown)


def test_an_interrupted_run_goes_on(tiny_bundle, tmp_path, monkeypatch, capsys):
    from glip_bench.measuring import run as detection

    saved = tmp_path / "result.json"
    arguments = ["run", "--model", str(tiny_bundle), *ARGUMENTS, "--subjects", "onnxruntime-cpu", "--no-details"]
    arguments += ["--runs", "4", "--json", str(saved)]
    sleep = iter([None, None])

    def interrupt(seconds):
        if next(sleep, 0) == 0:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(detection.time, "sleep", interrupt)
        assert main(arguments) == 130
    assert "--resume continues" in capsys.readouterr().err
    partial = read_result(saved)
    assert partial["rounds_done"] == 2 and not partial["complete"]
    kept = partial["subjects"]["onnxruntime-cpu"]["pieces_ms"]["whole frame"]["samples"]
    assert "interrupted: not everything was measured" in render(partial)
    assert main([*arguments, "--resume"]) == 0
    whole = read_result(saved)
    assert whole["complete"] and whole["rounds_done"] == 4
    samples = whole["subjects"]["onnxruntime-cpu"]["pieces_ms"]["whole frame"]["samples"]
    assert len(samples) == 4 and samples[:2] == kept
    assert main([*arguments, "--resume", "--prompt", "dog"]) == 1
    assert "--resume: the run in the file is of another prompt" in capsys.readouterr().err


def test_a_camera_too_fast_loses_frames(tiny_bundle, capsys):
    arguments = ["run", "--model", str(tiny_bundle), *ARGUMENTS, "--subjects", "onnxruntime-cpu", "--no-details"]
    arguments += ["--no-memory", "--frame-rate", "1000"]
    assert main(arguments) == 0
    (row,) = (line for line in capsys.readouterr().out.splitlines() if line.endswith("   no"))
    taken, dropped = (int(cell) for cell in row.split()[1:3])
    assert taken >= 3 and taken + dropped >= 3000


def test_no_round_begins_out_of_time(tiny_bundle, tmp_path):
    from glip_bench.measuring.run import Settings, run
    from glip_bench.subjects.base import Options
    from glip_export.verify import PICTURE

    options = Options(tiny_bundle, shortest_side=96)
    settings = Settings(
        options, str(PICTURE), "dog", frame_size=(90, 120), rounds=50, budget=0.0, memory=False, details=False
    )
    assert run(settings)["rounds_done"] == 1


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        (["--picture", "none.jpg"], "none.jpg"),
        (["--json", "no/such/folder/x.json"], "does not exist"),
        (["--json", "."], "is a folder"),
        (["--prompt", " . "], "no words"),
        (["--subjects", "tflite"], '"tflite" is unknown; legal are torch-official'),
        (["--subjects", "torch"], "subject torch cannot run: it runs the released weights; name them with --check"),
        (["--subjects", ","], "no subjects are named"),
        (["--frames", "."], "holds no pictures"),
        (["--resume", "--json", "none.json"], "result none.json cannot be read"),
    ],
)
def test_errors_are_one_line(tiny_bundle, capsys, monkeypatch, tmp_path, extra, said):
    monkeypatch.chdir(tmp_path)
    assert main(["run", "--model", str(tiny_bundle), *ARGUMENTS, *extra]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("glip-bench: error: ") and said in line
    assert list(tmp_path.iterdir()) == []


def test_a_changed_bundle_is_refused(tiny_bundle, tmp_path, capsys):
    copy = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    with (copy / "image.onnx.data").open("r+b") as file:
        file.write(b"\x01\x02\x03\x04")
    assert main(["run", "--model", str(copy), *ARGUMENTS]) == 1
    assert "was changed after the export" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        (["--frame", "big"], "'big' is not a size; write width x height in pixels"),
        (["--frame", "0x5"], "'0x5' is not a size"),
        (["--runs", "0"], "'0' is not a whole number of at least 1"),
        (["--threads", "x"], "'x' is not a whole number"),
        (["--threads", "3000"], "'3000' is not a whole number of at least 1 and at most 512"),
        (["--frame-rate", "0"], "'0' is not a number of frames a second, above 0"),
        (["--threshold", "2"], "'2' is not a number in [0, 1]"),
        (["--longest-side", "-5"], "'-5' is not a whole number of at least 0"),
        (["--resume"], "name it with --json FILE"),
        (["--no-such-option"], "No such option"),
    ],
)
def test_bad_usage_is_one_line_and_status_2(capsys, extra, said):
    assert main(["run", "--model", "x", *extra]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("glip-bench: error: ") and said in line


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (["--quick"], ["run", "--quick"]),
        (["--model", "B", "--runs", "3"], ["run", "--model", "B", "--runs", "3"]),
        (["--model", "B", "--sweep", "side=64"], ["run", "--model", "B", "--sweep", "side=64"]),
        (["--model", "B", "--compare", "old.json"], ["run", "--model", "B", "--compare", "old.json"]),
        (["--compare", "old.json", "new.json"], ["compare", "old.json", "new.json"]),
        (["--compare", "a", "b", "c"], ["compare", "a", "b", "c"]),
        (["--compare", "old.json", "--model", "B"], ["run", "--compare", "old.json", "--model", "B"]),
        (["--table", "paper", "--results", "R"], ["paper", "--results", "R"]),
        (["--table=paper"], ["paper"]),
        (["--model", "B", "--floor", "A100"], ["floor", "--model", "B", "A100"]),
        (["--accuracy=a.json", "--images", "I"], ["accuracy", "a.json", "--images", "I"]),
        (["--grounding", "a.json", "--images", "I"], ["grounding", "a.json", "--images", "I"]),
        (["paper"], ["paper"]),
        (["--help"], ["--help"]),
        ([], []),
    ],
)
def test_options_alone_mean_a_command_as_before(old, new):
    assert with_command(old) == new


def test_a_table_that_does_not_exist_is_bad_usage(capsys):
    assert main(["--table", "prices"]) == 2
    assert "prices" in capsys.readouterr().err


@slowly
def test_quick_finds_what_make_demo_left(tiny_bundle, tiny_checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    small = ["--quick", "--frame", "120x90", "--shortest-side", "96", "--quiet"]
    assert main(small) == 1
    assert "run `make demo`, or name one with --model" in capsys.readouterr().err
    shutil.copytree(tiny_bundle, tmp_path / "build" / "demo" / "glip_nano")
    assert main([*small, "--no-memory"]) == 0
    assert "not here: torch-official: it runs the released weights" in capsys.readouterr().out
    (tmp_path / "examples" / "nano").mkdir(parents=True)
    shutil.copy(tiny_checkpoint, tmp_path / "examples" / "nano" / "glip_nano.pth")
    assert main([*small, "--no-memory"]) == 0
    assert "against torch-official" in capsys.readouterr().out


def test_memory_is_left_out_when_time_is_up(tiny_bundle):
    from glip_bench.measuring.run import Settings, run
    from glip_bench.subjects.base import Options
    from glip_export.verify import PICTURE

    options, said = Options(tiny_bundle, shortest_side=96), []
    settings = Settings(options, str(PICTURE), "dog", frame_size=(90, 120), rounds=1, budget=0.0, details=False)
    result = run(settings, on_step=said.append)
    assert "out of time: peak memory is left out" in said and result["complete"]
    assert "peak_resident_bytes" not in result["subjects"]["onnxruntime-cpu"]
