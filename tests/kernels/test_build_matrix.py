"""The matrix of engine builds: its report, what is repeated, and failures. The builds are simulated."""

import json

import pytest
from kernels import build_matrix
from kernels.processes import Measured


@pytest.fixture
def calls(monkeypatch):
    """glip-build fails for SM120 and is too slow for the plugin; otherwise `build` gives a row."""
    seen = []

    def run(command, limit):
        arch, form = (command[command.index(option) + 1] for option in ("--arch", "--form"))
        seen.append((arch, form))
        return Measured(None if form == "plugin" else 1, "glip-build: error: SM120 is not known\n", 0)

    monkeypatch.setattr(build_matrix, "run_measured", run)
    return seen


def test_failures_are_rows_and_are_tried_again(tiny_bundle, tmp_path, calls, capsys):
    output = tmp_path / "matrix.json"
    arguments = [str(tiny_bundle), "--arch", "SM120", "--output", str(output)]
    assert build_matrix.main(arguments) == 1
    builds = json.loads(output.read_text())["builds"]
    assert builds["SM120, native, fp16"] == {"error": "glip-build: error: SM120 is not known"}
    assert builds["SM120, plugin, fp16"] == {"error": "not done after 1800 s"}
    assert build_matrix.main(arguments) == 1 and len(calls) == 4


def test_a_build_that_is_there_is_not_repeated(tiny_bundle, tmp_path, calls):
    output = tmp_path / "matrix.json"
    arguments = [str(tiny_bundle), "--arch", "SM120", "--output", str(output)]
    build_matrix.main(arguments)
    report = json.loads(output.read_text())
    report["builds"] = {key: {"seconds": {"image": 1.0}} for key in report["builds"]}
    output.write_text(json.dumps(report))
    calls.clear()
    assert build_matrix.main(arguments) == 0 and calls == []


@pytest.mark.parametrize(
    ("content", "said"),
    [("{", "is not a report of this program"), ('{"manifest_sha256": "0"}', "is about another bundle")],
)
def test_another_file_is_not_overwritten(tiny_bundle, tmp_path, calls, capsys, content, said):
    output = tmp_path / "matrix.json"
    output.write_text(content)
    assert build_matrix.main([str(tiny_bundle), "--output", str(output)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("build_matrix.py: error: ") and said in line
    assert output.read_text() == content and calls == []


def test_what_is_not_a_bundle_is_refused(tmp_path, calls, capsys):
    assert build_matrix.main([str(tmp_path), "--output", str(tmp_path / "x.json")]) == 1
    assert "is not a bundle" in capsys.readouterr().err and list(tmp_path.iterdir()) == []
