"""Two results held against each other."""

import copy
import json

import pytest
from bench_results import result, timing
from glip_bench.cli import main
from glip_bench.reporting.compare import compare, render_comparison, uncertainty
from glip_bench.subjects.base import Piece
from hypothesis import given
from hypothesis import strategies as st

from glip_deploy.errors import GlipError


def worse(old, new):
    return {change.figure for change in compare(old, new)[0] if change.worse}


def test_the_same_is_not_worse():
    changes, remarks = compare(result(), result())
    assert [change.ratio for change in changes] == [1.0] * len(changes) and not remarks
    assert not any(change.worse or change.better for change in changes)


def test_a_slower_run_is_worse_and_a_faster_one_better():
    assert worse(result(), result(110)) == {"image branch", "whole frame"}
    changes, _ = compare(result(), result(90))
    assert {change.figure for change in changes if change.better} == {"image branch", "whole frame"}


def test_noise_hides_what_it_must():
    assert worse(result(spread=12), result(110, spread=12)) == set()


def test_memory_and_lost_boxes_are_worse():
    assert worse(result(), result(peak_resident_bytes=1.2e9)) == {"peak memory"}
    agreement = {"with": "torch-official", "matched": 81, "of": 81, "found": 81}
    assert worse(result(agreement=agreement), result(agreement={**agreement, "matched": 80})) == {"boxes matched"}


def test_a_tiny_piece_is_shown_only():
    old, new = result(), result()
    old["subjects"]["onnxruntime-cpu"]["pieces_ms"][Piece.SELECT] = timing([0.1] * 6)
    new["subjects"]["onnxruntime-cpu"]["pieces_ms"][Piece.SELECT] = timing([0.9] * 6)
    assert worse(old, new) == set()
    assert "threshold and NMS" in render_comparison(*compare(old, new), "old.json")


def test_differences_of_machine_are_said():
    new = result()
    new["machine"] = {"cpu": "Other CPU, 2.60 GHz", "cores": 4}
    new["versions"] = {"onnxruntime": "1.26"}
    remarks = compare(result(), new)[1]
    assert remarks == ["processor: Some CPU -> Other CPU", "cores: 2 -> 4", "onnxruntime 1.25 -> 1.26"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda r: r["shape"].update(tokens=256), "shape tokens 14, the new one 256"),
        (lambda r: r["model"].update(variant="GLIP-L"), "model variant GLIP-T, the new one GLIP-L"),
        (lambda r: r.update(subjects={"torch": r["subjects"]["onnxruntime-cpu"]}), "no subject in common"),
    ],
)
def test_what_cannot_be_compared_is_refused(change, said):
    new = copy.deepcopy(result())
    change(new)
    with pytest.raises(GlipError, match=said):
        compare(result(), new)


@given(st.lists(st.floats(1, 1e4), min_size=5, max_size=40))
def test_uncertainty_does_not_depend_on_the_unit(samples):
    one, thousand = uncertainty(timing(samples)), uncertainty(timing([1e3 * ms for ms in samples]))
    assert one >= 0 and one == pytest.approx(thousand, rel=0.02, abs=1e-3)


def test_the_program_exits_with_3(tmp_path, capsys):
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    old.write_text(json.dumps(result()))
    new.write_text(json.dumps(result(120)))
    assert main(["compare", str(old), str(new)]) == 3
    out = capsys.readouterr().out
    assert "1.20" in out and "WORSE" in out
    assert out.splitlines()[-1] == "worse beyond noise: onnxruntime-cpu image branch, onnxruntime-cpu whole frame"
    assert main(["compare", str(new), str(old)]) == 0
    assert "nothing is worse beyond noise" in capsys.readouterr().out
    old.write_text("{")
    assert main(["compare", str(old), str(new)]) == 1
    assert "is not JSON" in capsys.readouterr().err


def test_three_results_are_bad_usage(capsys):
    assert main(["compare", "a", "b", "c"]) == 2
    assert capsys.readouterr().err.startswith("glip-bench: error: ")
