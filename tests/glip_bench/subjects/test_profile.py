"""Kernels are counted to the block of the network that is stamped on their node."""

from dataclasses import replace

import onnx_ir
import pytest
from glip_bench.subjects.profile import LAYOUT, profile_image_branch, stage_of, sum_stages
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


def test_stamped_stages_count_and_not_names(tiny_bundle, tmp_path):
    """A graph whose nodes are all stamped alike: the tracer's names, which are still there, decide nothing."""
    model = onnx_ir.load(tiny_bundle / IMAGE_GRAPH)
    for node in model.graph:
        node.metadata_props[STAGE_KEY] = Stage.FPN.value
    onnx_ir.save(model, tmp_path / IMAGE_GRAPH, external_data="weights.data")
    assert set(stages_of(tmp_path / IMAGE_GRAPH).values()) == {Stage.FPN}
    bundle = Bundle.open(tiny_bundle)
    with Detector.open(tiny_bundle, cache_dir=None) as detector:
        prompt = detector.encode("dog")
    import numpy as np

    frames, sizes = np.zeros((1, 64, 64, 3), np.uint8), np.array([[64, 64]])
    feed = ImageInputs.of(frames, sizes, prompt.embedding, prompt.prompt.class_map).feed()
    stamped = replace(bundle, path=tmp_path)
    seconds = profile_image_branch(stamped, feed, 1)
    assert list(seconds) == [Stage.FPN, LAYOUT] and seconds[Stage.FPN] > seconds[LAYOUT]
