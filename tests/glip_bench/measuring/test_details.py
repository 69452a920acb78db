"""The hardware's limit of each subject, on known and unknown GPUs."""

import copy

import pytest
from bench_results import result
from glip_bench.limits.hardware import HARDWARE
from glip_bench.measuring.details import add_floors
from glip_bench.reporting.text import render

from glip_deploy import Bundle


@pytest.fixture
def on_gpu():
    measured = result(4.0, device="cuda", precision="fp16")
    measured["shape"].update(network=[96, 128], tokens=6, classes=2)
    measured |= {"absent": {}, "gpus": [{"name": "NVIDIA L4", "driver": "550.54"}]}
    return measured


def test_a_known_gpu_has_its_own_limit(tiny_bundle, on_gpu):
    add_floors(on_gpu, Bundle.open(tiny_bundle))
    floor = on_gpu["subjects"]["onnxruntime-cpu"]["floor"]
    assert floor["hardware"] == "L4" and floor["flops"] == HARDWARE["L4"].half_flops and 0 < floor["share"] < 1


def test_an_unknown_gpu_has_a_line_and_no_other_gpu_s_limit(tiny_bundle, on_gpu):
    unknown = copy.deepcopy(on_gpu)
    unknown["gpus"][0]["name"] = "NVIDIA L40S"
    add_floors(unknown, Bundle.open(tiny_bundle))
    assert "floor" not in unknown["subjects"]["onnxruntime-cpu"]
    (line,) = (line for line in render(unknown).splitlines() if line.startswith("no hardware limit: "))
    assert "the limits of NVIDIA L40S are not known" in line
