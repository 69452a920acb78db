"""`glip-bench classes`: what it times, and what it calculates where it times only some prompts."""

from __future__ import annotations

import json

import pytest
from glip_bench.cli.app import main
from split_bundle import unsplit

NAMES = [f"{word} with a {letter}" for letter in "bcdefghij" for word in ("person", "red car", "dog", "cat")]
SMALL = ["--shortest-side", "64", "--frame", "96x64", "--runs", "2", "--quiet"]


@pytest.fixture
def names(tmp_path):
    file = tmp_path / "names.txt"
    file.write_text("\n".join(NAMES))
    return file


def test_a_long_list(tiny_bundle, names, tmp_path, capsys):
    result = tmp_path / "result.json"
    options = ["--model", str(tiny_bundle), "--classes-per-prompt", "8", "--json", str(result)]
    assert main(["classes", str(names), *options, *SMALL]) == 0
    shown = capsys.readouterr().out
    found = json.loads(result.read_text())
    assert (found["kind"], found["classes"], found["prompts"]) == ("classes", 36, 5)
    assert found["timed_tokens"] == found["tokens"] and len(found["tokens"]) == 5
    for kind in ("wall", "processor"):
        seconds, totals = (
            {name: found["seconds"][name][kind] for name in found["seconds"]},
            found["frame_seconds"][kind],
        )
        assert all(len(values) == 2 and min(values) > 0 for values in seconds.values())
        # All were timed, so that nothing is calculated.
        assert totals["together"]["minimum"] == pytest.approx(min(seconds["together"]), abs=2e-3)
        assert totals["apart"]["minimum"] == pytest.approx(min(seconds["apart"]), abs=2e-3)
    assert found["peak_resident_bytes"] > 1e7
    assert "36 classes in 5 prompts" in shown and "5 of 5 prompts timed" in shown and "calculated" not in shown


def test_a_sample_of_the_prompts(tiny_bundle, names, tmp_path, capsys):
    result = tmp_path / "result.json"
    options = ["--model", str(tiny_bundle), "--classes-per-prompt", "8", "--sample", "2", "--json", str(result)]
    assert main(["classes", str(names), *options, *SMALL]) == 0
    assert "2 of 5 prompts timed; the figures for all are calculated" in capsys.readouterr().out
    found = json.loads(result.read_text())
    assert found["timed_tokens"] == [found["tokens"][1], found["tokens"][3]]
    seconds = {name: found["seconds"][name]["wall"] for name in found["seconds"]}
    pairs = zip(seconds["one"], seconds["together"], strict=True)
    expected = [several + 3 * (several - one) for one, several in pairs]
    assert found["frame_seconds"]["wall"]["together"]["minimum"] == pytest.approx(min(expected), abs=0.02)
    apart = min(seconds["apart"]) / 2 * 5
    assert found["frame_seconds"]["wall"]["apart"]["minimum"] == pytest.approx(apart, abs=0.02)


def test_what_it_cannot_measure(tiny_bundle, names, tmp_path, capsys):
    old = unsplit(tiny_bundle, tmp_path / "old")
    assert main(["classes", str(names), "--model", str(old), *SMALL]) == 1
    assert "lacks backbone.onnx and head.onnx; export it again" in capsys.readouterr().err
    names.write_text("a [red car] in the street")
    assert main(["classes", str(names), "--model", str(tiny_bundle), *SMALL]) == 1
    assert "holds a caption; a list of class names is needed" in capsys.readouterr().err
