"""Official YAML files beside a checkpoint."""

from __future__ import annotations

import pytest
from glip_export.model.config import GlipConfig
from glip_export.official_config import apply_official_config

from glip_deploy.errors import OptionError

OFFICIAL = """\
MODEL:
  META_ARCHITECTURE: "GeneralizedVLRCNN"
  RPN_ARCHITECTURE: "VLDYHEAD"
  SWINT:
    EMBED_DIM: 96
    DEPTHS: (2, 2, 6, 2)
    NUM_HEADS: (3, 6, 12, 24)
    WINDOW_SIZE: 7
  LANGUAGE_BACKBONE:
    MODEL_TYPE: "bert-base-uncased"
    MAX_QUERY_LEN: 200
  RPN:
    ANCHOR_SIZES: (64, 128, 256, 512, 1024)
    ANCHOR_STRIDE: (8, 16, 32, 64, 128)
    ASPECT_RATIOS: (1.0,)
  ATSS:
    INFERENCE_TH: 0.1
    PRE_NMS_TOP_N: 500
    NMS_TH: 0.5
    DETECTIONS_PER_IMG: 300
  DYHEAD:
    NUM_CONVS: 6
    FUSE_CONFIG:
      EARLY_FUSE_ON: True
INPUT:
  PIXEL_MEAN: [ 103.530, 116.280, 123.675 ]
  PIXEL_STD: [ 57.375, 57.120, 58.395 ]
  MIN_SIZE_TEST: 640
  MAX_SIZE_TEST: 1000
"""


@pytest.fixture
def write(tmp_path):
    def _write(text):
        path = tmp_path / "glip.yaml"
        path.write_text(text)
        return path

    return _write


def test_thresholds_and_sizes_are_taken_over(write):
    config = apply_official_config(GlipConfig(), write(OFFICIAL))
    head = config.head
    assert (head.score_threshold, head.candidates_per_level, head.nms_iou, head.max_detections) == (0.1, 500, 0.5, 300)
    assert (config.input.shortest_side, config.input.longest_side, config.input.max_tokens) == (640, 1000, 200)
    assert config.swin == GlipConfig().swin


def test_what_the_file_does_not_say_stays(write):
    assert apply_official_config(GlipConfig(), write("MODEL: {}\n")) == GlipConfig()


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("EMBED_DIM: 96", "EMBED_DIM: 192", "EMBED_DIM = 192, but the checkpoint has 96"),
        ("(2, 2, 6, 2)", "(2, 2, 18, 2)", "DEPTHS"),
        ("EARLY_FUSE_ON: True", "EARLY_FUSE_ON: False", "EARLY_FUSE_ON"),
        ("NUM_CONVS: 6", "NUM_CONVS: 8", "NUM_CONVS = 8, but the checkpoint has 6"),
        ('"VLDYHEAD"', '"FCOS"', "RPN_ARCHITECTURE = 'FCOS' is not supported"),
        ("(1.0,)", "(0.5, 1.0, 2.0)", "ASPECT_RATIOS"),
        ("(64, 128, 256, 512, 1024)", "(32, 64, 128, 256, 512)", "ANCHOR_SIZES"),
    ],
)
def test_contradictions_and_what_is_not_supported(write, old, new, said):
    assert old in OFFICIAL
    with pytest.raises(OptionError) as caught:
        apply_official_config(GlipConfig(), write(OFFICIAL.replace(old, new)))
    assert said in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [1,", "is not YAML"),
        ("[" * 5000, "is not YAML"),
        ("a: 2026-13-45\n", "is not YAML"),
        ("\x00", "is not YAML"),
        ("", "not a GLIP configuration"),
        ("- 1\n- 2\n", "not a GLIP configuration"),
    ],
)
def test_files_of_another_kind(write, text, said):
    with pytest.raises(OptionError, match=said):
        apply_official_config(GlipConfig(), write(text))


def test_a_missing_file(tmp_path):
    with pytest.raises(OptionError, match="does not exist"):
        apply_official_config(GlipConfig(), tmp_path / "none.yaml")
    with pytest.raises(OptionError, match="is a folder"):
        apply_official_config(GlipConfig(), tmp_path)


def error_of(path, config=None):
    with pytest.raises(OptionError) as caught:
        apply_official_config(config or GlipConfig(), path)
    message = str(caught.value)
    assert "\n" not in message and str(path) in message
    return message


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("INPUT.PIXEL_MEAN", "[1, 2]", "not three numbers"),
        ("INPUT.PIXEL_MEAN", "[.nan, 1, 2]", "finite numbers"),
        ("INPUT.PIXEL_STD", "[57.4, 0, 58.4]", "above 0"),
        ("INPUT.MIN_SIZE_TEST", "many", "not a whole number"),
        ("INPUT.MIN_SIZE_TEST", "yes", "not a whole number"),
        ("INPUT.MIN_SIZE_TEST", "0", "legal is 1 or more"),
        ("INPUT.MAX_SIZE_TEST", ".inf", "not a whole number"),
        ("MODEL.LANGUAGE_BACKBONE.MAX_QUERY_LEN", "200.5", "not a whole number"),
        ("MODEL.LANGUAGE_BACKBONE.MAX_QUERY_LEN", "513", "legal is 3 to 512"),
        ("MODEL.ATSS.INFERENCE_TH", ".nan", "not a number"),
        ("MODEL.ATSS.INFERENCE_TH", "5", "legal is 0 to 1"),
        ("MODEL.ATSS.NMS_TH", "-0.6", "legal is 0 to 1"),
        ("MODEL.ATSS.PRE_NMS_TOP_N", "0", "legal is 1 or more"),
        ("MODEL.ATSS.DETECTIONS_PER_IMG", "-1", "legal is 1 or more"),
    ],
)
def test_values_that_cannot_be(write, name, value, said):
    message = error_of(write(f"{name.replace('.', ': {')}: {value}{'}' * name.count('.')}\n"))
    assert said in message and f"{name} = " in message


def test_the_last_legal_values_are_accepted(write):
    text = "MODEL: {ATSS: {INFERENCE_TH: 0, NMS_TH: 1}, LANGUAGE_BACKBONE: {MAX_QUERY_LEN: 512}}\n"
    config = apply_official_config(GlipConfig(), write(text))
    assert (config.head.score_threshold, config.head.nms_iou, config.input.max_tokens) == (0.0, 1.0, 512)


def test_a_tuned_prompt_limits_the_length(write):
    path = write("MODEL: {LANGUAGE_BACKBONE: {MAX_QUERY_LEN: 256}}\n")
    assert "legal is 3 to 200" in error_of(path, GlipConfig(tunable_tokens=200))


def test_nothing_in_a_file_is_executed(write, tmp_path):
    trace = tmp_path / "executed"
    assert "is not YAML" in error_of(write(f"a: !!python/object/apply:os.mkdir ['{trace}']\n"))
    assert not trace.exists()


def test_tuples_are_written_as_strings(write):
    mean = apply_official_config(GlipConfig(), write("INPUT: {PIXEL_MEAN: '(1, 2.5, 3)'}\n")).input.pixel_mean
    assert mean == (1.0, 2.5, 3.0)
    assert "DEPTHS = 2, but" in error_of(write("MODEL: {SWINT: {DEPTHS: '(2)'}}\n"))
