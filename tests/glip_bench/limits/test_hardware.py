"""GPUs are recognized by the exact name of the product."""

import math

import pytest
from glip_bench.limits.hardware import HARDWARE, hardware, hardware_of, measure_cpu

from glip_deploy.errors import OptionError


@pytest.mark.parametrize("name", ["rtx 4090", "RTX-4090", "RTX4090"])
def test_a_gpu_is_known_in_any_spelling(name):
    assert hardware(name).name == "RTX 4090"


@pytest.mark.parametrize(
    ("gpu", "row"),
    [
        ("Tesla P100-SXM2-16GB", "P100"),
        ("Tesla V100-SXM2-16GB", "V100"),
        ("Tesla V100-SXM2-32GB", "V100"),
        ("Tesla T4", "T4"),
        ("NVIDIA T4", "T4"),
        ("A100-SXM4-80GB", "A100"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("GeForce RTX 4090", "RTX 4090"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H200", "H200"),
    ],
)
def test_the_product_of_a_row_has_that_row(gpu, row):
    assert hardware_of(gpu) is HARDWARE[row]


@pytest.mark.parametrize(
    "gpu",
    [
        "NVIDIA L40",
        "NVIDIA L40S",
        "NVIDIA L20",
        "NVIDIA T400",
        "NVIDIA T400 4GB",
        "NVIDIA T4G",
        "NVIDIA T1000",
        "NVIDIA A10",
        "NVIDIA A10G",
        "NVIDIA A16",
        "NVIDIA A40",
        "NVIDIA A100-PCIE-40GB",
        "NVIDIA A100-SXM4-40GB",
        "NVIDIA A100 80GB PCIe",
        "NVIDIA A100-SXM4-80GB MIG 1g.10gb",
        "NVIDIA A800-SXM4-80GB",
        "NVIDIA RTX A1000",
        "NVIDIA RTX A1000 6GB Laptop GPU",
        "NVIDIA RTX A4000",
        "NVIDIA H100 PCIe",
        "NVIDIA H100 NVL",
        "NVIDIA H200 NVL",
        "NVIDIA H800",
        "NVIDIA H20",
        "NVIDIA GH200 480GB",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA RTX 4000 Ada Generation",
        "NVIDIA GeForce RTX 4080",
        "Tesla P100-PCIE-16GB",
        "Tesla P100-PCIE-12GB",
        "Quadro P1000",
        "Tesla P40",
        "Tesla V100-PCIE-16GB",
        "Tesla V100S-PCIE-32GB",
        "Orin (nvgpu)",
        "",
    ],
)
def test_any_other_product_has_no_row(gpu):
    with pytest.raises(OptionError, match="are not known; known are those of P100-SXM2-16GB, ") as caught:
        hardware_of(gpu)
    assert "\n" not in str(caught.value) and gpu in str(caught.value)


def test_the_cpu_is_measured():
    cpu = measure_cpu(0.05)
    assert cpu.half_flops == cpu.single_flops > 1e9 and cpu.bytes_per_second > 1e8
    assert math.isfinite(cpu.single_flops)
