"""All or nothing: what glip-export leaves behind, whatever happens on the way."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from glip_export import bundle_writer, verify
from glip_export.cli import main
from glip_export.onnx_export import GraphContract
from tiny_glip import tiny_state, write_tiny

from glip_deploy.errors import GlipError

FILES = {"image.onnx", "image.onnx.data", "manifest.json", "text.onnx", "text.onnx.data", "tokenizer.json"}


@pytest.fixture
def no_tracing(monkeypatch):
    """Replace the slow steps: what is tested here is the file handling around them."""
    import glip_export.onnx_export as export

    def write(name):
        def _write(model, directory):
            (directory / name).write_bytes(b"graph")
            return GraphContract(name, (), ())

        return _write

    monkeypatch.setattr(export, "export_text", write("text.onnx"))
    monkeypatch.setattr(export, "export_image", write("image.onnx"))
    monkeypatch.setattr(export, "drop_raw_outputs", lambda contract, directory: contract)
    row = verify.ParityRow("text.onnx", "text_embedding", 1e-6, 1e-6, 1e-4)
    monkeypatch.setattr(verify, "verify_text", lambda *args: [row])
    monkeypatch.setattr(verify, "verify_image", lambda *args: [row])


def test_a_bundle_is_complete_and_says_what_it_is(tiny_bundle, tiny_checkpoint):
    assert {file.name for file in tiny_bundle.iterdir()} == FILES
    manifest = json.loads((tiny_bundle / "manifest.json").read_text())
    assert manifest["variant"] == "GLIP (custom)" and manifest["precision"] == "fp32"
    assert manifest["checkpoint"]["sha256"] == hashlib.sha256(tiny_checkpoint.read_bytes()).hexdigest()
    assert set(manifest["files"]) == FILES - {"manifest.json"}
    for name, record in manifest["files"].items():
        content = (tiny_bundle / name).read_bytes()
        assert record == {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    outputs = [row["output"] for row in manifest["parity"]]
    assert {"text_embedding", "logits", "deltas", "centerness", "scores"} <= set(outputs)
    assert all(row["max_abs"] <= row["tolerance"] for row in manifest["parity"])
    assert {"torch", "onnx", "onnxruntime", "python"} <= set(manifest["tools"])


def test_files_can_be_read_by_others(tiny_bundle):
    assert tiny_bundle.stat().st_mode & 0o777 == 0o755
    assert {file.stat().st_mode & 0o777 for file in tiny_bundle.iterdir()} == {0o644}


@pytest.mark.parametrize("kind", ["a full folder", "a file", "an old bundle"])
def test_what_exists_is_not_touched(tmp_path, capsys, tiny_checkpoint, tiny_bundle, kind):
    target = tmp_path / "out"
    if kind == "a file":
        target.write_text("mine")
    elif kind == "a full folder":
        target.mkdir()
        (target / "mine.txt").write_text("mine")
    else:
        shutil.copytree(tiny_bundle, target)
    before = sorted((p, p.read_bytes()) for p in tmp_path.rglob("*") if p.is_file())
    assert main(["--model", str(tiny_checkpoint), "--output", str(target)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("glip-export: error: --output") and str(target) in line
    assert sorted((p, p.read_bytes()) for p in tmp_path.rglob("*") if p.is_file()) == before


def test_overwrite_replaces_a_bundle_but_nothing_else(tmp_path, capsys, tiny_checkpoint, no_tracing):
    target = tmp_path / "out"
    target.mkdir()
    (target / "mine.txt").write_text("mine")
    arguments = ["--model", str(tiny_checkpoint), "--output", str(target), "--overwrite"]
    assert main(arguments) == 1
    assert "is not a bundle and will not be replaced" in capsys.readouterr().err
    (target / "mine.txt").unlink()
    (target / "manifest.json").write_text("{}")
    (target / "old.onnx").write_text("old")
    assert main(arguments) == 0
    assert not (target / "old.onnx").exists() and (target / "image.onnx").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_the_path_is_on_stdout_and_the_table_on_stderr(tmp_path, capsys, tiny_checkpoint, no_tracing):
    target = tmp_path / "new" / "out"
    assert main(["--model", str(tiny_checkpoint), "--output", str(target)]) == 0
    shown = capsys.readouterr()
    assert shown.out == f"{target}\n"
    assert re.search(r"text_embedding\s+1.0e-06\s+1.0e-06\s+1e-04", shown.err)
    assert shown.err.count("[") >= len(bundle_writer.STEPS)


def test_quiet_leaves_only_the_files(tmp_path, capsys, tiny_checkpoint, no_tracing):
    assert main(["--model", str(tiny_checkpoint), "--output", str(tmp_path / "out"), "--quiet"]) == 0
    shown = capsys.readouterr()
    assert shown.out == shown.err == ""
    assert (tmp_path / "out" / "manifest.json").is_file()


def failing(error):
    def _fail(*args, **kwargs):
        raise error

    return _fail


@pytest.mark.parametrize(
    ("name", "error", "status", "said"),
    [
        ("verify_image", GlipError("image.onnx: logits differs from torch by 3"), 1, "differs from torch"),
        ("verify_image", OSError(errno.ENOSPC, "No space left on device"), 1, "nothing was written"),
        ("verify_text", KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_a_failure_leaves_the_old_bundle_and_nothing_else(
    tmp_path, capsys, tiny_checkpoint, tiny_bundle, no_tracing, monkeypatch, name, error, status, said
):
    target = tmp_path / "out"
    shutil.copytree(tiny_bundle, target)
    before = {p.name: p.read_bytes() for p in target.iterdir()}
    monkeypatch.setattr(verify, name, failing(error))
    assert main(["--model", str(tiny_checkpoint), "--output", str(target), "--overwrite", "--quiet"]) == status
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
    assert {p.name: p.read_bytes() for p in target.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_an_error_beyond_tolerance_is_a_failure():
    rows = [
        verify.ParityRow("image.onnx", "logits", 2e-3, 1e-3, 1e-3),
        verify.ParityRow("image.onnx", "deltas", 5e-3, 1e-3, 1e-3),
    ]
    with pytest.raises(GlipError, match=r"deltas differs from torch by 0.005, more than 0.001"):
        verify.check(rows)
    with pytest.raises(GlipError, match="logits"):
        verify.check([verify.ParityRow("image.onnx", "logits", float("nan"), 0, 1e-3)])
    verify.check([verify.ParityRow("image.onnx", "logits", 1e-3, 0, 1e-3)])


def test_a_graph_that_computes_something_else_is_not_delivered(tmp_path, capsys, tiny_checkpoint, monkeypatch):
    """The verification itself, not a stand-in for it: the graph is written from other weights than torch runs."""
    import glip_export.onnx_export as export

    plain = export.export_text

    def bent(model, directory):
        model.language_backbone.body.model.embeddings.LayerNorm.bias += 0.01
        contract = plain(model, directory)
        model.language_backbone.body.model.embeddings.LayerNorm.bias -= 0.01
        return contract

    monkeypatch.setattr(export, "export_text", bent)
    monkeypatch.setattr(export, "export_image", lambda model, directory: GraphContract("image.onnx", (), ()))
    assert main(["--model", str(tiny_checkpoint), "--output", str(tmp_path / "out"), "--quiet"]) == 1
    assert "text_embedding differs from torch" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("model", "said"),
    [("none.pth", "does not exist"), ("text.pth", "corrupt"), ("nan.pth", "NaN or infinite")],
)
def test_bad_checkpoints_through_the_command(tmp_path, capsys, model, said):
    (tmp_path / "text.pth").write_text("not weights")
    state = tiny_state()
    write_tiny(tmp_path / "nan.pth", {**state, "rpn.head.bias0": state["rpn.head.bias0"] * float("nan")})
    target = tmp_path / "out"
    assert main(["--model", str(tmp_path / model), "--output", str(target), "--quiet"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("glip-export: error: checkpoint ") and said in line
    assert not target.exists()


def test_a_vocabulary_that_must_travel_but_does_not(tmp_path, capsys):
    path = write_tiny(tmp_path / "m.pth", vocabulary=None)
    assert main(["--model", str(path), "--output", str(tmp_path / "out"), "--quiet"]) == 1
    assert "bert-base-uncased has 30522; it must carry its own" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["m.pth"]


def test_a_parent_that_cannot_be_made(tmp_path, capsys, tiny_checkpoint):
    (tmp_path / "file").write_text("x")
    target = tmp_path / "file" / "below" / "out"
    assert main(["--model", str(tiny_checkpoint), "--output", str(target), "--quiet"]) == 1
    assert "cannot be created" in capsys.readouterr().err


FULL_DISK = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write beyond the limit then fails as on a full disk
resource.setrlimit(resource.RLIMIT_FSIZE, (700_000, 700_000))
from glip_export.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="file size limits are POSIX")
def test_a_full_disk(tmp_path, tiny_checkpoint):
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, "--model", tiny_checkpoint, "--output", tmp_path / "out", "--quiet"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("glip-export: error: --output") and "nothing was written" in line
    assert list(tmp_path.iterdir()) == []


def test_help_is_instant_and_needs_no_torch():
    code = "import sys, glip_export.cli as c\ntry: c.main(['--help'])\nexcept SystemExit: print('torch' in sys.modules)"
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert time.perf_counter() - start < 3
    assert "--model FILE" in done.stdout and done.stdout.endswith("False\n")


def test_bad_usage_is_status_2():
    done = subprocess.run([sys.executable, "-m", "glip_export.cli"], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "--model" in done.stderr


def test_the_default_output_is_named_after_the_checkpoint(tmp_path, monkeypatch, no_tracing, tiny_checkpoint):
    monkeypatch.chdir(tmp_path)
    os.link(tiny_checkpoint, tmp_path / "glip_x.pth")
    assert main(["--model", "glip_x.pth", "--quiet"]) == 0
    assert Path("glip_x/manifest.json").is_file()


def test_a_terminal_gets_a_bar(tmp_path, capsys, tiny_checkpoint, no_tracing, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert main(["--model", str(tiny_checkpoint), "--output", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().err
    assert "\r" in shown and bundle_writer.STEPS[-1] in shown
    assert f"/{len(bundle_writer.STEPS)} |" in shown and "[1/" not in shown
