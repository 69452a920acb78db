"""`glip-build` as a command: one line for every mistake, nothing left behind, engines on disk."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from engine_needs import needs_rtx
from glip_engines.cli import main

RTX = ["--flavor", "tensorrt-rtx", "--arch", "SM80"]
SMALL = ["--size", "128x160", "--tokens", "16"]


@pytest.fixture
def text_bundle(bundle):
    """Return the bundle with its text graph in place of its image graph: engines take a second."""
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["io"]["image"] = manifest["io"]["text"]
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    return bundle


def run(*arguments, **options):
    command = [sys.executable, "-m", "glip_engines.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, **options)


def assert_one_line(stderr, *parts):
    line = stderr.strip().splitlines()[-1]
    assert line.startswith("glip-build: error: ")
    assert "Traceback" not in stderr
    for part in parts:
        assert part in line


def test_help_needs_nothing_heavy():
    code = (
        "import sys; from glip_engines.cli import main\n"
        "assert main(['--help']) == 0\n"
        "heavy = {'torch', 'onnx', 'onnx_ir', 'tensorrt', 'tensorrt_rtx', 'tqdm', 'onnxruntime'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.endswith("[]\n")
    assert "--tokens" in result.stdout


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--size", "801x1344"], ("--size is 801x1344", "multiples of 32", "832")),
        (["--size", "800"], ('--size is "800"', "HEIGHTxWIDTH")),
        (["--size", "64x64", "--min", "32x32"], ("--size fixes the canvas and excludes --min",)),
        (["--min", "64x64"], ("--min without --opt and --max",)),
        (["--min", "96x64", "--opt", "64x64", "--max", "96x96"], ("heights are 96, 64, 96",)),
        (["--tokens", "16,512"], ("--tokens is 512", "256 tokens at most")),
        (["--tokens", "16,1:2:3"], ("--tokens", "one range MIN:BEST:MAX")),
        (["--tokens", "x"], ('--tokens is "x"',)),
        (["--classes", "8:4:2"], ("--classes is 8:4:2", "in order")),
        (["--batch", "0"], ("--batch is 0", "the smallest is 1")),
        (["--workspace", "3X"], ("--workspace", "512M or 2G")),
        (["--optimization-level", "9"], ("--optimization-level is 9", "0 to 5")),
        (["--precision", "int8"], ('precision is "int8"', "fp32, fp16, bf16")),
        (["--form", "magic"], ('form is "magic"', "native or plugin")),
        (["--form", "plugin", "--arch", "SM53"], ("no kernels for SM53", "SM80", "--form native")),
        (["--form", "plugin", "--arch", "A100"], ('--arch is "A100"', "SM80 say")),
        (["--plugin", "/nowhere/lib.so"], ("--plugin /nowhere/lib.so is not a file", "--form plugin compiles one")),
        (["--form", "native", "--plugin", "/nowhere/lib.so"], ("--form native uses no plugin",)),
        (["--timing-cache", "cache"], ("tensorrt-rtx keeps no timing cache",)),
        (["--name", "../x"], ('--name is "../x"',)),
        (["--arch", "SM90"], ('--arch is "SM90"', "SM75, SM80, SM86, SM89, SM120")),
        (["--arch", "80"], ('--arch is "80"', "SM75, SM80")),
        (["--flavour", "onnx"], ('flavour is "onnx"', "tensorrt or tensorrt-rtx")),  # the older spelling
        (["--flavor", "onnx"], ('flavour is "onnx"', "tensorrt or tensorrt-rtx")),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
@needs_rtx
def test_mistakes(bundle, capsys, options, parts):
    assert main([str(bundle), *RTX, *options]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.strip().splitlines()) == 1
    assert_one_line(captured.err, *parts)
    assert not (bundle / "engines").exists()


@needs_rtx
def test_not_a_bundle(tmp_path, capsys):
    assert main([str(tmp_path / "none"), *RTX]) == 1
    assert_one_line(capsys.readouterr().err, "does not exist", "glip-export")
    assert main([str(tmp_path), *RTX]) == 1
    assert_one_line(capsys.readouterr().err, "is not a bundle")


@needs_rtx
def test_a_library_that_is_no_plugin(bundle, capsys):
    library = bundle.parent / "lib.so"
    library.write_text("not a library")
    assert main([str(bundle), *RTX, "--plugin", str(library)]) == 1
    assert_one_line(capsys.readouterr().err, f"plugin library {library} was refused", "build it for tensorrt-rtx")
    assert not (bundle / "engines").exists()


@needs_rtx
def test_without_a_gpu_the_target_must_be_named(bundle, capsys):
    from glip_engines.flavours import current_gpu

    if current_gpu() is not None:
        pytest.skip("there is a GPU here")
    assert main([str(bundle), "--flavor", "tensorrt-rtx"]) == 1
    assert_one_line(capsys.readouterr().err, "no NVIDIA GPU", "--arch: SM75, SM80")


def test_bad_usage_is_2(capsys):
    assert main([]) == 2
    assert "Missing argument 'BUNDLE'" in capsys.readouterr().err


@needs_rtx
def test_what_it_prints(text_bundle, capsys):
    assert main([str(text_bundle), *RTX, *SMALL, "--name", "mine"]) == 0
    captured = capsys.readouterr()
    folder = text_bundle / "engines" / "mine"
    assert captured.out == f"{folder.resolve()}\n"
    lines = captured.err.splitlines()
    assert lines[:2] == ["text engine", "image engine"]
    assert any(line.startswith("text.plan") and " MB" in line for line in lines)
    assert "fp16, native, SM80" in lines[-1]
    assert main([str(text_bundle), *RTX, *SMALL, "--name", "mine", "--overwrite", "--quiet"]) == 0
    captured = capsys.readouterr()
    assert captured.out == f"{folder.resolve()}\n"
    assert captured.err == ""


@needs_rtx
def test_the_recorded_command_builds_the_same(text_bundle, capsys):
    from glip_deploy.bundle.engines import EngineRecord

    options = ["--min", "64x64", "--opt", "64x96", "--max", "96x96", "--tokens", "8:16:32", "--classes", "3"]
    assert main([str(text_bundle), *RTX, *options, "--workspace", "1G", "--name", "a"]) == 0
    first = EngineRecord.read(text_bundle / "engines" / "a")
    assert main([str(text_bundle), *RTX, *first.options.replace("--name a", "--name b").split()]) == 0
    second = EngineRecord.read(text_bundle / "engines" / "b")
    assert second.options.replace("--name b", "--name a") == first.options
    assert second.engines["text.plan"].profiles == first.engines["text.plan"].profiles
    assert second.engines["text.plan"].sha256 == first.engines["text.plan"].sha256, "the same build, byte for byte"
    capsys.readouterr()


@needs_rtx
def test_a_full_disk(bundle):
    """A limit on the size of files stands in for the disk: the graph still fits, the engine does not."""
    limit = 400_000

    def small_disk():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    result = run(bundle, *RTX, *SMALL, preexec_fn=small_disk)
    assert result.returncode == 1
    assert_one_line(result.stderr, "cannot be written (File too large)")
    assert not (bundle / "engines").exists()


@needs_rtx
def test_an_interrupt(bundle):
    """Ctrl-C while the image engine is being built: status 130, one line, no files, no process left."""
    command = [sys.executable, "-m", "glip_engines.cli", str(bundle), *RTX, *SMALL]
    child = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stderr is not None
    assert child.stderr.readline() == "text engine\n"
    assert child.stderr.readline() == "image engine\n"
    time.sleep(0.5)
    children = workers_of(child.pid)
    child.send_signal(signal.SIGINT)
    stdout, stderr = child.communicate(timeout=60)
    assert child.returncode == 130
    assert (stdout, stderr) == ("", "glip-build: interrupted, nothing was written\n")
    assert not (bundle / "engines").exists()
    assert children
    for pid in children:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def workers_of(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
