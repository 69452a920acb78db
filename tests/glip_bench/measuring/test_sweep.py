"""Cost curves."""

import pytest
from glip_bench.cli import main
from glip_bench.measuring import sweep as sweeping
from glip_bench.measuring.sweep import Axis, parse_sweep, prompt_of
from glip_bench.reporting.plots import bars
from glip_bench.reporting.results import read_result
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from selection import slowly

from glip_deploy import Bundle
from glip_deploy.errors import GlipError
from glip_deploy.prompts.tokens import parse_prompt

ARGUMENTS = ["--frame", "120x90", "--shortest-side", "96", "--runs", "2", "--prompt", "person. dog", "--quiet"]


@pytest.fixture(scope="module")
def tokenizer(tiny_bundle):
    return Bundle.open(tiny_bundle).tokenizer()


@given(data=st.data(), classes=st.integers(1, 20))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
def test_a_prompt_has_exactly_the_length_asked_for(tokenizer, data, classes):
    tokens = data.draw(st.integers(2 * classes + 1, 256))
    prompt = parse_prompt(prompt_of(tokenizer, tokens, classes), tokenizer)
    assert (len(prompt.input_ids), len(prompt)) == (tokens, classes)


def test_a_prompt_too_short_for_its_classes(tokenizer):
    with pytest.raises(GlipError, match="5 classes need a prompt of 11 tokens or more, not 10"):
        prompt_of(tokenizer, 10, 5)


def test_values_are_sorted_and_once():
    sweep = parse_sweep("tokens=32, 8,8")
    assert (sweep.axis, sweep.values) == (Axis.TOKENS, (8, 32))
    assert parse_sweep("bundle=b/,a/").values == ("b/", "a/")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("color=1", "the axis is one of tokens, classes, side, batch, bundle"),
        ("tokens", "no values"),
        ("tokens=", "no values"),
        ("tokens=8,many", '"many" is not a whole number from 8 to 256'),
        ("tokens=512", '"512" is not a whole number from 8 to 256'),
        ("batch=0", "from 1 to 64"),
    ],
)
def test_a_bad_sweep_is_one_line(tiny_bundle, capsys, text, said):
    assert main(["sweep", text, "--model", str(tiny_bundle), *ARGUMENTS]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("glip-bench: error: ") and said in line


@pytest.fixture(scope="module")
def swept(tiny_bundle, tmp_path_factory):
    folder = tmp_path_factory.mktemp("swept")
    sweeps = [f"bundle={tiny_bundle}", "tokens=8,64", "classes=1,4", "side=64,96", "batch=1,2"]
    file = folder / "result.json"
    output = ["--json", str(file), "--report", str(folder / "report")]
    assert main(["sweep", *sweeps, "--model", str(tiny_bundle), *ARGUMENTS, *output]) == 0
    return read_result(file), folder / "report"


def test_every_value_is_what_it_says(swept):
    bundle, tokens, classes, side, batch = swept[0]["sweeps"]
    assert [p["tokens"] for p in tokens["points"]] == [8, 64] and {p["classes"] for p in tokens["points"]} == {3}
    assert [p["classes"] for p in classes["points"]] == [1, 4] and {p["tokens"] for p in classes["points"]} == {16}
    assert [p["network"] for p in side["points"]] == [[64, 96], [96, 128]]
    assert [p["batch"] for p in batch["points"]] == [1, 2]
    assert [p["precision"] for p in bundle["points"]] == ["fp32"]
    for sweep in swept[0]["sweeps"]:
        for point in sweep["points"]:
            timing = point["subjects"]["onnxruntime-cpu"]["image_ms"]
            assert timing["runs"] == 3 and timing["median"] > 0


def test_subjects_are_opened_once_for_all_sweeps_and_closed(monkeypatch):
    steps = []

    class Watched:
        def close(self):
            steps.append("closed")

    def open_subjects(names, options, on_step):
        steps.append("opened")
        yield Watched(), 1.0

    monkeypatch.setattr(sweeping, "choose", lambda names, options: (names, {}))
    monkeypatch.setattr(sweeping, "open_subjects", open_subjects)
    with sweeping.opened_once(["onnxruntime-cpu"], None) as opened:
        assert steps == []
        assert opened() is opened()
        assert steps == ["opened"]
    assert steps == ["opened", "closed"]


def test_a_sweep_leaves_out_what_run_measures_besides(swept):
    facts = swept[0]["subjects"]["onnxruntime-cpu"]
    assert "peak_resident_bytes" not in facts and "stages_ms" not in facts and facts["pieces_ms"]


@slowly
def test_run_sweeps_too(tiny_bundle, tmp_path):
    file = tmp_path / "result.json"
    extra = ["--no-memory", "--no-details", "--sweep", "batch=1,2", "--json", str(file)]
    assert main(["run", "--model", str(tiny_bundle), *ARGUMENTS, *extra]) == 0
    assert [point["batch"] for sweep in read_result(file)["sweeps"] for point in sweep["points"]] == [1, 2]


def test_the_report_can_be_opened(swept):
    from PIL import Image

    text = (swept[1] / "report.md").read_text()
    assert "# GLIP (custom)" in text and "| onnxruntime-cpu |" in text and "prompt length, tokens" in text
    for axis in ("tokens", "classes", "side", "batch", "bundle"):
        assert f"({axis}.png)" in text
        with Image.open(swept[1] / f"{axis}.png") as picture:
            assert picture.size == (840, 480)
            assert len(picture.convert("RGB").getcolors(1 << 20)) > 10


def test_a_size_that_an_engine_does_not_take_is_shown():
    sweep = {
        "label": "prompt length, tokens",
        "points": [
            {"value": 8, "batch": 1, "subjects": {"tensorrt": {"image_ms": {"median": 4.0}}}},
            {"value": 16, "batch": 2, "subjects": {"tensorrt": {"image_ms": {"median": 16.0}}}},
            {"value": 64, "batch": 1, "subjects": {"tensorrt": {"error": "64 tokens; legal is 16 to 32"}}},
        ],
    }
    lines = bars(sweep)
    assert lines[2].count("█") * 2 == lines[3].count("█") == 44  # 16 ms for two frames is 8 ms for one
    assert lines[4].endswith("64 tokens; legal is 16 to 32")


def test_a_report_where_a_file_lies(tiny_bundle, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["run", "--model", str(tiny_bundle), *ARGUMENTS, "--report", str(tmp_path / "file")]) == 1
    assert "is a file; choose another name" in capsys.readouterr().err
