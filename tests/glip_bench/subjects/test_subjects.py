"""The subjects: all find the same boxes; one that cannot run says why."""

from __future__ import annotations

import numpy as np
import pytest
from glip_bench.measuring.frames import crop_to
from glip_bench.quality.agreement import compare_boxes
from glip_bench.subjects.base import Options, Piece, SubjectName
from glip_bench.subjects.open import absence, choose, open_subjects

from glip_deploy.bundle.contract import Stage
from glip_deploy.errors import GlipError
from glip_deploy.frames.load import load_image
from glip_deploy.results.detections import Detections

HERE = (SubjectName.TORCH_OFFICIAL, SubjectName.TORCH, SubjectName.ONNXRUNTIME_CPU)


@pytest.fixture(scope="module")
def frame():
    from glip_export.verify import PICTURE

    return crop_to(load_image(PICTURE), (90, 120))


@pytest.fixture(scope="module")
def opened(tiny_bundle, tiny_checkpoint):
    options = Options(tiny_bundle, tiny_checkpoint, shortest_side=96, threshold=0.2)
    subjects = {subject.name: subject for subject, _ in open_subjects(HERE, options)}
    for subject in subjects.values():
        subject.prepare("person. red car. dog")
    yield subjects
    for subject in subjects.values():
        subject.close()


def test_all_find_the_same_boxes(opened, frame):
    reference = opened[SubjectName.TORCH_OFFICIAL].run(frame)
    assert len(reference) > 3
    for name in HERE[1:]:
        agreement = compare_boxes(reference, opened[name].run(frame))
        assert agreement.same, f"{name}: {agreement}"


def test_only_the_official_form_encodes_text_in_a_frame(opened, frame):
    common = {Piece.RESIZE, Piece.IMAGE, Piece.SELECT}
    for name, subject in opened.items():
        subject.run(frame)
        official = name is SubjectName.TORCH_OFFICIAL
        assert set(subject.pieces) == (common | {Piece.TEXT} if official else common)
        assert all(seconds > 0 for seconds in subject.pieces.values())
        assert subject.describe()["tokens"] == (256 if official else 8)


def test_every_subject_here_takes_a_batch(opened, frame):
    for name, subject in opened.items():
        one = subject.run(frame)
        for found in subject.run_batch([frame, frame]):
            assert compare_boxes(one, found).same, name


def test_every_subject_here_tells_its_blocks(opened, frame):
    for subject in opened.values():
        stages = subject.profile(frame, 1)
        assert stages[Stage.BACKBONE] > 0 and stages[Stage.FUSION] > 0
        assert all(seconds >= 0 for seconds in stages.values())
    assert not opened[SubjectName.TORCH]._model.backbone.body._forward_hooks


def test_unknown_subjects_are_listed_against(tiny_bundle):
    with pytest.raises(GlipError, match='"tflite" is unknown; legal are torch-official, torch, onnxruntime-cpu'):
        choose(["tflite"], Options(tiny_bundle))


def test_a_subject_asked_for_must_run(tiny_bundle):
    with pytest.raises(GlipError, match=r"torch-official cannot run: .*--checkpoint"):
        choose(["torch-official"], Options(tiny_bundle))


def test_every_absence_is_one_line(tiny_bundle):
    present, absent = choose(None, Options(tiny_bundle))
    assert SubjectName.ONNXRUNTIME_CPU in present
    assert set(present) | set(absent) == {name for name in SubjectName if not name.is_yardstick}
    assert "--checkpoint" in absent["torch"]
    assert all(reason and "\n" not in reason for reason in absent.values())


def test_a_missing_provider_is_named(tiny_bundle, monkeypatch):
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    said = absence(SubjectName.ONNXRUNTIME_CUDA, Options(tiny_bundle))
    assert "has no CUDAExecutionProvider here; pip uninstall onnxruntime, then pip install" in said


@pytest.mark.parametrize(("gpus", "said"), [([], "no NVIDIA GPU"), (["a GPU"], "glip-build .* --flavor tensorrt-rtx")])
def test_why_engines_cannot_run(tiny_bundle, monkeypatch, gpus, said):
    import re
    from types import SimpleNamespace

    monkeypatch.setattr("importlib.util.find_spec", lambda name: SimpleNamespace(origin="x"))
    monkeypatch.setattr("glip_bench.machine.gpus.describe_gpus", lambda: gpus)
    assert re.search(said, absence(SubjectName.TENSORRT_RTX, Options(tiny_bundle)))


def test_an_untrusted_bundle_runs_no_engines(tiny_bundle):
    untrusted = Options(tiny_bundle, trusted=False)
    for name in (SubjectName.TENSORRT, SubjectName.TENSORRT_RTX, SubjectName.ONNXRUNTIME_TENSORRT):
        assert "runs native code that comes with the bundle, which is not trusted" in absence(name, untrusted)
    assert absence(SubjectName.ONNXRUNTIME_CPU, untrusted) is None


def test_another_checkpoint_is_refused(tiny_bundle, tmp_path):
    from tiny_glip import tiny_state, write_tiny

    other = write_tiny(tmp_path / "other.pth", tiny_state(seed=1))
    with pytest.raises(GlipError, match=r"is not the one .* was exported from"):
        list(open_subjects([SubjectName.TORCH], Options(tiny_bundle, other)))


def boxes(*rows):
    array = np.array(rows, np.float32).reshape(-1, 6)
    return Detections(array[:, :4], array[:, 4], array[:, 5].astype(int), ["x"] * len(array))


def test_boxes_match_by_label_place_and_score():
    reference = boxes((0, 0, 100, 100, 0.9, 0), (50, 50, 90, 90, 0.8, 1), (0, 0, 10, 10, 0.7, 1))
    shifted = boxes((1, 0, 101, 100, 0.905, 0), (50, 50, 90, 90, 0.8, 0), (0, 0, 10, 10, 0.65, 1))
    agreement = compare_boxes(reference, shifted)
    assert (agreement.matched, agreement.of, agreement.found) == (1, 3, 3)
    assert str(agreement) == "1 of 3, 2 more" and not agreement.same
    assert agreement.worst_iou == pytest.approx(100 * 101 / (102 * 101))


def test_a_box_one_pixel_wide_is_a_box():
    one = boxes((5, 0, 5, 10, 0.9, 0), (0, 7, 0, 7, 0.8, 0))
    assert compare_boxes(one, one).same


def test_a_box_has_one_partner():
    one, two = boxes((0, 0, 10, 10, 0.9, 0)), boxes((0, 0, 10, 10, 0.9, 0), (0, 0, 10, 10, 0.9, 0))
    assert str(compare_boxes(one, two)) == "1 of 1, 1 more"
    assert str(compare_boxes(boxes(), boxes())) == "0 of 0"


def test_several_prompts_of_a_frame_give_what_each_gives_alone(opened, frame):
    prompts = ["person. red car", ["dog", "cat", "bus"], "person. red car. dog"]
    for name in HERE[1:]:
        together = opened[name].run_prompts(frame, prompts)
        for prompt, found in zip(prompts, together, strict=True):
            opened[name].prepare(prompt)
            assert compare_boxes(opened[name].run(frame), found).same, (name, prompt)


def test_a_limit_of_boxes_holds_in_every_form(opened, tiny_bundle, tiny_checkpoint, frame):
    options = Options(tiny_bundle, tiny_checkpoint, shortest_side=96, threshold=0.2, max_detections=2)
    for subject, _ in open_subjects(HERE[1:], options):
        subject.prepare("person. red car. dog")
        found, all_of_them = subject.run(frame), opened[subject.name].run(frame)
        subject.close()
        assert len(found) == 2 < len(all_of_them)
        np.testing.assert_allclose(found.scores, all_of_them.scores[:2], atol=1e-5)
