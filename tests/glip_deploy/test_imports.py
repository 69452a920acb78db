"""What ships to the target starts at once and brings no training stack with it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

HEAVY = ("torch", "onnx", "onnxruntime", "onnxscript", "tensorrt", "tensorrt_rtx", "cuda", "pycuda", "av", "PIL", "cv2")
HEAVY += (
    "transformers",
    "tokenizers",
    "tqdm",
    "textblob",
    "nltk",
    "spacy",
    "glip_export",
    "glip_engines",
    "ray",
    "pyarrow",
)
PROGRAMS = sorted(
    (entry for entry in entry_points(group="console_scripts") if entry.dist and entry.dist.name == "glip-deploy"),
    key=lambda entry: entry.name,
)


def timed(command):
    """Run it; return (result, seconds of processor time), which do not depend on what else the machine does."""
    before = os.times()
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    after = os.times()
    spent = after.children_user - before.children_user + after.children_system - before.children_system
    return done, spent


@pytest.mark.parametrize(
    "module",
    [
        "glip_deploy",
        "glip_deploy.cli.detect",
        "glip_deploy.cli.batch",
        "glip_deploy.video",
        "glip_deploy.results.drawing",
    ],
)
def test_importing_the_runtime_is_quick_and_imports_nothing_heavy(module):
    code = f"import sys, json, {module}; print(json.dumps(sorted(sys.modules)))"
    done, seconds = timed([sys.executable, "-c", code])
    loaded = {name.partition(".")[0] for name in json.loads(done.stdout)}
    assert "glip_deploy" in loaded
    assert loaded.isdisjoint(HEAVY), loaded.intersection(HEAVY)
    assert seconds < 1  # 0.2 s on a quiet machine


def test_the_programs_are_installed():
    assert {"glip-detect", "glip-export", "glip-bench"} <= {entry.name for entry in PROGRAMS}


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda entry: entry.name)
def test_every_help_is_instant(program):
    script = Path(sys.executable).with_name(program.name)
    command = [str(script)] if script.is_file() else [sys.executable, "-m", program.module]
    done, seconds = timed([*command, "--help"])
    assert done.stdout.lower().split()[:2] == ["usage:", program.name]
    assert "examples:" in done.stdout and done.stderr == ""
    assert seconds < 1.5  # 0.3 s on a quiet machine
