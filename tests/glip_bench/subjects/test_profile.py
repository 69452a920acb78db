"""Kernels are counted to the right block of the network."""

import pytest
from glip_bench.subjects.profile import Stage, stage_of, sum_stages


@pytest.mark.parametrize(
    ("node", "stage"),
    [
        ("/backbone/body/layers.0/blocks.1/attn/qkv/MatMul", Stage.SWIN),
        ("/backbone/fpn/fpn_layer2/Conv_output_0_nchwc", Stage.FPN),
        ("/head/dyhead_tower.3/b_attn/attn/MatMul", Stage.FUSION),
        ("/head/dyhead_tower.3/Concat", Stage.FUSION),
        ("/head/dyhead_tower.16/intermediate/dense/MatMul", Stage.TEXT_LAYERS),
        ("/head/dyhead_tower.17/DyConv.2_1/DeformConv", Stage.DEFORM),
        ("/head/dyhead_tower.17/offset/Conv", Stage.DYCONV),
        ("/head/bbox_pred/Conv", Stage.PREDICTION),
        ("TopK_12", Stage.REST),
    ],
)
def test_stage_of_a_node(node, stage):
    assert stage_of(node, fusion=True) is stage


def test_without_fusion_every_module_of_the_tower_is_a_dyconv():
    assert stage_of("/head/dyhead_tower.0/DyConv.1/DeformConv", fusion=False) is Stage.DEFORM
    assert stage_of("/head/dyhead_tower.1/relu/fc/Gemm", fusion=False) is Stage.DYCONV


def test_only_kernels_are_summed():
    events = [
        {"cat": "Node", "name": "/backbone/body/x_kernel_time", "dur": 1500},
        {"cat": "Node", "name": "/backbone/body/y_kernel_time", "dur": 500},
        {"cat": "Node", "name": "/backbone/body/x_fence_before", "dur": 7},
        {"cat": "Session", "name": "model_run", "dur": 9000},
    ]
    sums = sum_stages(events, fusion=True)
    assert sums[Stage.SWIN] == pytest.approx(0.002)
    assert sum(sums.values()) == pytest.approx(0.002)
    assert list(sums) == list(Stage)
