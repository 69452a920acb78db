"""Other detectors beside GLIP."""

import json

import numpy as np
import pytest
from glip_bench.cli import main
from glip_bench.subjects.base import Options, Piece, SubjectName
from glip_bench.subjects.open import absence
from glip_bench.subjects.yardstick import PARAMETERS, YardstickSubject
from selection import slow

from glip_deploy import Bundle
from glip_deploy.errors import GlipError


def skip_if_absent(bundle):
    reason = absence(SubjectName.DETR_R50, Options(bundle))
    if reason:
        pytest.skip(reason)


YARDSTICKS = [
    pytest.param(name, marks=() if name is SubjectName.DETR_R50 else slow) for name in SubjectName if name.is_yardstick
]


@pytest.fixture(scope="module", params=YARDSTICKS)
def subject(request, tiny_bundle):
    skip_if_absent(tiny_bundle)
    subject = YardstickSubject(
        request.param, Options(tiny_bundle, shortest_side=256, threshold=0.0), Bundle.open(tiny_bundle)
    )
    subject.prepare("person. dog")
    yield subject
    subject.close()


def test_it_has_its_published_size(subject):
    described = subject.describe()
    assert described["parameters"] == pytest.approx(PARAMETERS[subject.name], rel=0.02)
    assert described["weights"] == "random"
    assert described["tokens"] == (0 if subject.name is SubjectName.DETR_R50 else 5)


def test_a_frame_gives_boxes_of_the_frame_and_times(subject):
    frame = np.random.default_rng(0).integers(0, 255, (90, 120, 3), dtype=np.uint8)
    found = subject.run(frame)
    assert len(found) == (100 if subject.name is SubjectName.DETR_R50 else 900)
    assert np.abs(found.boxes).max() < 300 and 0 < found.scores.min() <= found.scores.max() <= 1
    assert subject.pieces[Piece.IMAGE] > subject.pieces[Piece.SELECT] > 0


def test_another_frame_gives_other_boxes(subject):
    frames = np.random.default_rng(1).integers(0, 255, (2, 64, 64, 3), dtype=np.uint8)
    one, other = subject.run_batch(list(frames))
    assert not np.array_equal(one.scores, other.scores)


def test_too_small_a_canvas_is_said(subject):
    if subject.name is not SubjectName.GROUNDING_DINO_T:
        return
    options, subject.options = subject.options, Options(subject.options.bundle, shortest_side=64)
    with pytest.raises(GlipError, match="900 of 85 locations in 64x64"):
        subject.run(np.zeros((64, 64, 3), np.uint8))
    subject.options = options


def test_they_run_only_when_asked_for(tiny_bundle, tmp_path):
    skip_if_absent(tiny_bundle)
    file = tmp_path / "result.json"
    arguments = ["--model", str(tiny_bundle), "--frame", "96x96", "--shortest-side", "64", "--runs", "1", "--quiet"]
    short = ["--no-memory", "--no-details", "--prompt", "dog", "--json", str(file)]
    assert main([*arguments, *short, "--subjects", "onnxruntime-cpu,detr-r50"]) == 0
    facts = json.loads(file.read_text())["subjects"]
    assert list(facts) == ["onnxruntime-cpu", "detr-r50"] and "agreement" not in facts["detr-r50"]


def test_what_is_missing_is_said(tiny_bundle, monkeypatch):
    from importlib import util

    find = util.find_spec
    monkeypatch.setattr(util, "find_spec", lambda name: None if name == "transformers" else find(name))
    said = absence(SubjectName.DETR_R50, Options(tiny_bundle))
    assert said == "transformers is not installed; pip install 'glip-deploy[yardsticks]'"
