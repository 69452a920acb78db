"""What ships to the target starts at once and brings no training stack with it."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest

HEAVY = ("torch", "onnx", "onnxruntime", "onnxscript", "tensorrt", "tensorrt_rtx", "cuda", "pycuda", "av", "PIL", "cv2")
HEAVY += ("transformers", "tokenizers", "tqdm", "glip_export", "glip_engines")


@pytest.mark.parametrize("module", ["glip_deploy", "glip_deploy.cli", "glip_deploy.video", "glip_deploy.sinks"])
def test_importing_the_runtime_imports_nothing_heavy(module):
    code = f"import sys, json, {module}; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[0] for name in json.loads(done.stdout)}
    assert "glip_deploy" in loaded
    assert loaded.isdisjoint(HEAVY), loaded.intersection(HEAVY)


@pytest.mark.parametrize("program", ["glip_deploy.cli", "glip_export.cli", "glip_bench.cli"])
def test_every_help_is_instant(program):
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", program, "--help"], capture_output=True, text=True, check=True)
    assert time.perf_counter() - start < 3  # 0.3 s on a quiet machine
    assert "--model" in done.stdout and "examples:" in done.stdout
