"""glip-export as its users meet it: in a process of its own, on a terminal, interrupted."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys

import pytest
from glip_export import bundle_writer
from glip_export.cli import _with_engine_options
from selection import SLOW

from glip_deploy.backends.onnxruntime import open_session
from glip_deploy.bundle.contract import RAW_OUTPUTS

STEPS = len(bundle_writer.steps("fp32"))
PROGRAM = [sys.executable, "-m", "glip_export.cli"]


def test_help_is_instant_and_needs_no_torch():
    code = "import sys, glip_export.cli as c; print(c.main(['--help']), 'torch' in sys.modules)"
    seconds = []
    for _ in range(3):  # processor time too is longer where others have the caches
        before = os.times()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        after = os.times()
        seconds.append(after.children_user + after.children_system - before.children_user - before.children_system)
    assert min(seconds) < 1
    assert re.search(r"--model +FILE", done.stdout) and done.stdout.endswith("0 False\n")


def test_bad_usage_is_status_2():
    done = subprocess.run(PROGRAM, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "--model" in done.stderr and done.stdout == ""


@pytest.mark.parametrize(
    ("given", "read"),
    [
        (["--engine"], ["--engine="]),
        (["--engine", "--quiet", "--model", "x"], ["--engine=", "--quiet", "--model", "x"]),
        (["--engine", "--size 64x64", "--quiet"], ["--engine=--size 64x64", "--quiet"]),
        (["--engine", "", "--quiet"], ["--engine=", "--quiet"]),
        (["--engine=--size 64x64"], ["--engine=--size 64x64"]),
        (["--model", "x"], ["--model", "x"]),
    ],
)
def test_the_options_of_engine_may_be_left_out(given, read):
    assert _with_engine_options(given) == read


def test_a_whole_run_with_raw_outputs(tmp_path, tiny_checkpoint):
    target = tmp_path / "made" / "for it"
    command = [*PROGRAM, "--model", tiny_checkpoint, "--output", target, "--raw-outputs"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{target}\n"
    lines = done.stderr.splitlines()
    assert lines[:STEPS] == [f"[{i}/{STEPS}] {step}" for i, step in enumerate(bundle_writer.steps("fp32"), 1)]
    rows = [line for line in lines[STEPS:] if re.match(r"(text|image|backbone|head)\.onnx +\S.* \d\.\de[+-]\d\d", line)]
    manifest = json.loads((target / "manifest.json").read_text())
    assert len(rows) == len(manifest["parity"]) == 17
    # Nothing else: what was ignored, the header, the rows, a summary; no warning of a library.
    assert len(lines) == STEPS + 1 + 1 + len(rows) + 1
    assert re.fullmatch(r"GLIP \(custom\): \d+ MB in \d+ s", lines[-1])
    promised = [tensor["name"] for tensor in manifest["io"]["image"]["outputs"]]
    assert promised == ["boxes", "scores", "labels", *(tensor.name for tensor in RAW_OUTPUTS)]
    session = open_session(target / "image.onnx")
    assert [output.name for output in session.get_outputs()] == promised


def test_engines_in_the_same_run(tmp_path, tiny_checkpoint):
    from glip_engines.flavours import Flavour, installed

    target = tmp_path / "glip"
    command = [*PROGRAM, "--model", tiny_checkpoint, "--output", target, "--quiet", "--engine"]
    bad = subprocess.run([*command, "--flavor tensorrt-rt"], capture_output=True, text=True, check=False)
    assert bad.returncode == 1
    assert bad.stderr.startswith('glip-export: error: flavour is "tensorrt-rt"; legal is tensorrt or tensorrt-rtx')
    bad = subprocess.run([*command, "--size '64x64"], capture_output=True, text=True, check=False)
    assert bad.returncode == 1
    assert "close the quotation mark" in bad.stderr
    assert not target.exists()
    if not SLOW:
        pytest.skip("tests/glip_engines builds engines too, of more kinds: GLIP_SLOW=1 runs it")
    if not installed(Flavour.RTX):
        pytest.skip("tensorrt-rtx is not installed: pip install 'glip-deploy[tensorrt-rtx]'")
    options = "--flavor tensorrt-rtx --arch SM80 --size 64x64 --tokens 16 --name here"
    done = subprocess.run([*command, options], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{target / 'engines' / 'here'}\n"
    assert sorted(file.name for file in (target / "engines" / "here").iterdir()) == [
        "build.json",
        "image.plan",
        "text.plan",
    ]


@pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX")
@pytest.mark.parametrize(("step", "number", "status"), [(2, "SIGINT", 130), (3, "SIGINT", 130), (3, "SIGTERM", 143)])
def test_an_interrupted_export_leaves_nothing(tmp_path, tiny_checkpoint, step, number, status):
    command = [*PROGRAM, "--model", tiny_checkpoint, "--output", tmp_path / "new" / "out"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            for line in process.stderr:
                if line.startswith(f"[{step}/"):
                    break
            assert list((tmp_path / "new").iterdir()), "there is something to clean up"
            process.send_signal(getattr(signal, number))
            out, err = process.communicate(timeout=120)
        finally:
            process.kill()
    # Where the interrupt meets code that torch runs from C++, Python ends with the signal itself: the same to a shell.
    assert process.returncode in (status, -getattr(signal, number)), err
    assert err.splitlines()[-1] == "glip-export: interrupted, nothing was written" and "Traceback" not in err
    assert out == "" and list(tmp_path.iterdir()) == []
