"""Kernels are counted to the block of the network that is stamped on their node."""

from dataclasses import replace

import numpy as np
import onnx_ir
import pytest
from glip_bench.subjects.profile import LAYOUT, profile_image_branch, profile_openvino, stage_of, sum_rows, sum_stages
from glip_export.stages import stages_of

from glip_deploy import Bundle, Detector
from glip_deploy.bundle.contract import IMAGE_GRAPH, STAGE_KEY, ImageInputs, Stage

STAGES = {"a": Stage.INPUT, "a/b": Stage.BACKBONE, "a/b_1": Stage.FPN}


@pytest.mark.parametrize(
    ("node", "stage"),
    [
        ("a/b", Stage.BACKBONE),
        ("a/b_1", Stage.FPN),
        ("a/b_1/GeluFusion/", Stage.FPN),
        ("a/b_output_0_nchwc", Stage.BACKBONE),
        ("a/c", Stage.INPUT),
        ("ReorderInput_token_3", None),
    ],
)
def test_an_optimized_node_has_the_stage_of_the_node_it_is_named_after(node, stage):
    assert stage_of(node, STAGES) is stage


def test_only_kernels_are_summed():
    events = [
        {"cat": "Node", "name": "a/b_kernel_time", "dur": 1500},
        {"cat": "Node", "name": "a/b_nchwc_kernel_time", "dur": 500},
        {"cat": "Node", "name": "ReorderInput_kernel_time", "dur": 100},
        {"cat": "Node", "name": "a/b_fence_before", "dur": 7},
        {"cat": "Session", "name": "model_run", "dur": 9000},
    ]
    sums = sum_stages(events, STAGES)
    assert sums == {
        Stage.INPUT: 0,
        Stage.BACKBONE: pytest.approx(0.002),
        Stage.FPN: 0,
        LAYOUT: pytest.approx(0.0001),
    }


def test_openvino_s_operations_are_summed_by_name_and_two_of_them_by_type():
    rows = [
        ("a/b", "Convolution", 0.5),
        ("a/b_1/something", "MatMul", 0.25),
        ("DeformableConvolution_17", "DeformableConvolution", 2.0),
        ("a/b_abcd_acdb_reorder", "Reorder", 0.125),
        ("Constant_3", "Transpose", 0.125),
    ]
    sums = sum_rows(rows, STAGES | {"a/d": Stage.DEFORMABLE})
    assert sums == {Stage.INPUT: 0, Stage.BACKBONE: 0.5, Stage.FPN: 0.25, Stage.DEFORMABLE: 2.0, LAYOUT: 0.25}


def feed_of(tiny_bundle):
    """The inputs of the image graph for a small canvas."""
    with Detector.open(tiny_bundle, cache_dir=None) as detector:
        prompt = detector.encode("dog")
    frames, sizes = np.zeros((1, 64, 64, 3), np.uint8), np.array([[64, 64]])
    return ImageInputs.of(frames, sizes, prompt.embedding, prompt.prompt.class_map).feed()


def test_openvino_tells_the_same_blocks_as_onnxruntime(tiny_bundle):
    pytest.importorskip("openvino", reason="openvino is not installed")
    bundle, feed = Bundle.open(tiny_bundle), feed_of(tiny_bundle)
    seconds = profile_openvino(bundle, feed, 2, threads=1)
    assert list(seconds) == list(profile_image_branch(bundle, feed, 1))
    for stage in (Stage.BACKBONE, Stage.FPN, Stage.FUSION, Stage.OFFSETS, Stage.DEFORMABLE, Stage.DYHEAD):
        assert seconds[stage] > 0, stage
    # Its every operation is found by its name or its type.
    assert seconds[LAYOUT] < 0.3 * sum(seconds.values())


def test_stamped_stages_count_and_not_names(tiny_bundle, tmp_path):
    """A graph whose nodes are all stamped alike: the tracer's names, which are still there, decide nothing."""
    model = onnx_ir.load(tiny_bundle / IMAGE_GRAPH)
    for node in model.graph:
        node.metadata_props[STAGE_KEY] = Stage.FPN.value
    onnx_ir.save(model, tmp_path / IMAGE_GRAPH, external_data="weights.data")
    assert set(stages_of(tmp_path / IMAGE_GRAPH).values()) == {Stage.FPN}
    stamped = replace(Bundle.open(tiny_bundle), path=tmp_path)
    seconds = profile_image_branch(stamped, feed_of(tiny_bundle), 1)
    assert list(seconds) == [Stage.FPN, LAYOUT] and seconds[Stage.FPN] > seconds[LAYOUT]
