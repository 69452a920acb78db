"""Every error that is raised on purpose has a class that says what the caller can do about it."""

from __future__ import annotations

import ast

import pytest
from parity_data import ROOT

ROOMS = ("glip_deploy", "export", "engines", "benchmarks", "examples")


@pytest.mark.parametrize("room", ROOMS)
def test_no_room_raises_the_base_class(room):
    files = sorted((ROOT / room).rglob("*.py"))
    assert files
    found = [
        f"{file.relative_to(ROOT)}:{node.lineno}"
        for file in files
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if (isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", None)) == "GlipError")
        or (isinstance(node, ast.Raise) and getattr(node.exc, "id", None) == "GlipError")
    ]
    assert found == [], "raise a fitting subclass (glip_deploy/errors.py)"
