"""Pairs of GPU and TensorRT: what cannot work is refused before a build, with what can."""

from __future__ import annotations

import re

import pytest
from glip_engines.compile import ARCHITECTURES
from glip_engines.flavours import Dialect, Flavour
from glip_engines.support import SUPPORT, check_pair

from glip_deploy.errors import EngineError


def dialect(version, compute_capability, flavour=Flavour.TENSORRT):
    return Dialect(flavour, version, compute_capability)


@pytest.mark.parametrize(
    ("version", "arch", "message"),
    [
        ("10.13.3.9", 60, r"10\.13\.3\.9 is too new for My GPU \(SM60\), which TensorRT 8\.6 supports; .*==8\.6\.1"),
        (
            "10.5.0",
            70,
            r"too new for My GPU \(SM70\), which TensorRT 8\.6 to 10\.4 supports; .*tensorrt-cu12==10\.4\.0",
        ),
        ("11.1.0.106", 70, "too new"),
        ("10.7.0.post1", 120, r"too old for My GPU \(SM120\), which TensorRT 10\.8 or newer supports; pip install -U"),
        ("8.6.1", 110, "too old .* 10\\.13 or newer .* JetPack"),
        ("8.5.3", 80, "too old"),
    ],
)
def test_a_pair_that_cannot_work(version, arch, message):
    with pytest.raises(EngineError, match=message) as caught:
        check_pair(dialect(version, arch), "My GPU")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("version", "arch"),
    [
        ("8.6.1", 60),
        ("8.6.1", 70),
        ("10.4.0", 70),
        ("10.3.0", 87),
        ("8.6.1", 90),
        ("11.4.0.106", 75),
        ("10.8.0.43", 120),
    ],
)
def test_a_pair_that_works(version, arch):
    check_pair(dialect(version, arch), "My GPU")


def test_what_the_table_does_not_know_is_left_to_tensorrt():
    check_pair(dialect("8.6.1", 77), "My GPU")
    check_pair(dialect("1.7.1", 120, Flavour.RTX), "My GPU")


def test_the_table_is_in_order_and_the_plugin_has_kernels_for_all_of_it():
    assert [row.compute_capability for row in SUPPORT] == sorted({row.compute_capability for row in SUPPORT})
    assert {row.compute_capability for row in SUPPORT} <= set(ARCHITECTURES)
    for row in SUPPORT:
        check_pair(dialect(f"{row.least[0]}.{row.least[1]}.0", row.compute_capability), "My GPU")
        pinned = re.search(r"==(\d+\.\d+\.\d+)", row.install)
        if pinned:
            check_pair(dialect(pinned[1], row.compute_capability), "My GPU")
