"""A short campaign over every area, from a fixed seed, and every kept case. `make fuzz` runs a long one."""

from __future__ import annotations

import random
import sys
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).resolve().parent))

from areas import AREAS
from campaign import kept_cases, try_one

COUNTS = {"prompts": 60, "bundles": 4, "checkpoints": 4, "configurations": 20, "command lines": 25, "videos": 60}
"""Inputs of an area: those that take longest have fewer."""
SECONDS = 4.0
"""Of CPU, after which an area makes no more inputs."""
TEXTS = ("prompts", "COCO categories", "manifests", "engines")
"""Areas that hypothesis gives any bytes to."""


@pytest.fixture
def area(request, tiny_bundle, tmp_path):
    return AREAS[request.param](tiny_bundle, tmp_path)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("area", AREAS, indirect=True)
def test_a_short_campaign(area):
    draw, began, outcomes = random.Random(f"{area.name} default"), time.process_time(), []
    for _ in range(COUNTS.get(area.name, 150)):
        outcomes.append(try_one(area, area.make(draw)))
        if time.process_time() - began > SECONDS:
            break
    print(f"{area.name}: {outcomes.count('accepted')} accepted, {outcomes.count('refused')} refused")
    assert outcomes


KEPT = [pytest.param(name, case, id=f"{name}, {case.name}") for name in AREAS for case in kept_cases(name)]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("area", "case"), KEPT, indirect=["area"])
def test_a_kept_case(area, case):
    assert try_one(area, case.read_bytes()) in ("accepted", "refused")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("area", TEXTS, indirect=True)
@settings(max_examples=30, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=400) | st.text(max_size=200).map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_any_bytes(area, data):
    try_one(area, data)
