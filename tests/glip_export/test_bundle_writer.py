"""All or nothing: what glip-export leaves behind, whatever happens on the way."""

from __future__ import annotations

import concurrent.futures
import errno
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from glip_export import bundle_writer, verify
from glip_export.cli import main
from tiny_glip import tiny_state, write_tiny

from glip_deploy import Bundle, files
from glip_deploy.bundle.contract import GraphContract
from glip_deploy.errors import OutputError, ParityError

GRAPHS = {"text.onnx", "image.onnx", "backbone.onnx", "head.onnx"}
FILES = {*GRAPHS, "image.onnx.data", "text.onnx.data", "manifest.json", "tokenizer.json"}


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
    parts = [write("backbone.onnx"), write("head.onnx")]
    monkeypatch.setattr(export, "split_image", lambda model, image, folder: [part(model, folder) for part in parts])
    monkeypatch.setattr(export, "drop_raw_outputs", lambda contract, directory: contract)
    row = verify.ParityRow("text.onnx", "text_embedding", 1e-6, 1e-6, 1e-4)
    monkeypatch.setattr(verify, "verify_text", lambda *args: [row])
    monkeypatch.setattr(verify, "verify_image", lambda *args: [row])
    monkeypatch.setattr(verify, "verify_split", lambda *args: [row])


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
    assert shown.err.count("[") >= len(bundle_writer.steps("fp32"))


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
        ("verify_image", ParityError("image.onnx: logits differs from torch by 3"), 1, "differs from torch"),
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
    with pytest.raises(ParityError, match=r"deltas differs from torch by 0.005, more than 0.001"):
        verify.check(rows)
    with pytest.raises(ParityError, match="logits"):
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
    monkeypatch.setattr(export, "split_image", lambda model, image, directory: (None, None))
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


def test_folders_made_for_a_bundle_go_with_it_if_it_fails(tmp_path, tiny_checkpoint, no_tracing, monkeypatch):
    arguments = ["--model", str(tiny_checkpoint), "--output", str(tmp_path / "a" / "b" / "out"), "--quiet"]
    (tmp_path / "a").mkdir()
    assert main(["--model", str(tmp_path / "none.pth"), *arguments[2:]]) == 1
    assert list((tmp_path / "a").iterdir()) == []
    with monkeypatch.context() as patched:
        patched.setattr(verify, "verify_image", failing(OSError(errno.ENOSPC, "No space left on device")))
        assert main(arguments) == 1
    assert list((tmp_path / "a").iterdir()) == []
    assert main(arguments) == 0
    assert (tmp_path / "a" / "b" / "out" / "manifest.json").is_file()


def test_a_folder_one_may_not_write_to(tmp_path, capsys, tiny_checkpoint, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # tests may run as root, who may do anything
    assert main(["--model", str(tiny_checkpoint), "--output", str(tmp_path / "out"), "--quiet"]) == 1
    assert f"{tmp_path} is not writable" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_name_no_disk_takes(tmp_path, capsys, tiny_checkpoint):
    assert main(["--model", str(tiny_checkpoint), "--output", str(tmp_path / ("x" * 300)), "--quiet"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "cannot be used" in line
    assert list(tmp_path.iterdir()) == []


def test_a_link_is_followed(tmp_path, tiny_checkpoint, no_tracing):
    real, link = tmp_path / "disk" / "real", tmp_path / "link"
    real.mkdir(parents=True)
    (real / "manifest.json").write_text("{}")
    link.symlink_to(real)
    assert main(["--model", str(tiny_checkpoint), "--output", str(link), "--overwrite", "--quiet"]) == 0
    assert link.is_symlink() and (real / "image.onnx").is_file()
    assert sorted(p.name for p in (*tmp_path.iterdir(), *real.parent.iterdir())) == ["disk", "link", "real"]


def test_links_in_a_loop(tmp_path, capsys, tiny_checkpoint):
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    assert main(["--model", str(tiny_checkpoint), "--output", str(tmp_path / "a"), "--quiet"]) == 1
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), KeyboardInterrupt()])
def test_an_end_between_the_two_renames_brings_the_old_bundle_back(
    tmp_path, tiny_checkpoint, tiny_bundle, no_tracing, monkeypatch, error
):
    target = tmp_path / "out"
    shutil.copytree(tiny_bundle, target)
    before = {p.name: p.read_bytes() for p in target.iterdir()}
    monkeypatch.setattr(files, "_exchange", lambda one, other: False)  # as on a disk that cannot
    plain, renamed = Path.rename, []

    def rename(self, other):
        renamed.append(self.name)
        if len(renamed) == 2:
            assert not target.exists()
            raise error
        return plain(self, other)

    monkeypatch.setattr(Path, "rename", rename)
    assert main(["--model", str(tiny_checkpoint), "--output", str(target), "--overwrite", "--quiet"]) in (1, 130)
    assert len(renamed) == 3
    assert {p.name: p.read_bytes() for p in target.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_two_exports_to_one_place(tmp_path, tiny_checkpoint, no_tracing, monkeypatch, overwrite):
    """Both are ready at the same moment: a whole bundle results, and without --overwrite only one succeeds."""
    both = threading.Barrier(2, timeout=60)
    row = verify.ParityRow("image.onnx", "logits", 0, 0, 1)
    monkeypatch.setattr(verify, "verify_text", lambda *args: both.wait() in (0, 1) and [row])
    target = tmp_path / "out"

    def export(_):
        try:
            bundle_writer.export_bundle(tiny_checkpoint, target, overwrite=overwrite)
        except OutputError as error:
            return str(error)
        return "done"

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        answers = sorted(pool.map(export, range(2)), reverse=True)
    assert "done" in answers
    if not overwrite:
        assert answers.count("done") == 1
        assert any("exists" in answer or "not empty" in answer for answer in answers)
    assert {p.name for p in target.iterdir()} == {*GRAPHS, "manifest.json", "tokenizer.json"}
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_what_appears_during_an_export_is_not_replaced(tmp_path, capsys, tiny_checkpoint, no_tracing, monkeypatch):
    target = tmp_path / "out"
    row = verify.ParityRow("image.onnx", "logits", 0, 0, 1)

    def other(*_):
        target.mkdir(exist_ok=True)
        (target / "mine.txt").write_text("mine")
        return [row]

    monkeypatch.setattr(verify, "verify_image", other)
    for more in ([], ["--overwrite"]):
        shutil.rmtree(target, ignore_errors=True)
        assert main(["--model", str(tiny_checkpoint), "--output", str(target), "--quiet", *more]) == 1
        assert f"--output {target}" in capsys.readouterr().err
        assert [p.name for p in target.iterdir()] == ["mine.txt"]
        assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_configuration_reaches_the_manifest(tmp_path, capsys, tiny_checkpoint, no_tracing):
    yaml, target = tmp_path / "glip.yaml", tmp_path / "out"
    arguments = ["--model", str(tiny_checkpoint), "--output", str(target), "--config", str(yaml), "--quiet"]
    yaml.write_text("MODEL: {SWINT: {EMBED_DIM: 96}}\n")
    assert main(arguments) == 1
    assert "EMBED_DIM = 96, but the checkpoint has 16" in capsys.readouterr().err
    assert not target.exists()
    yaml.write_text(
        "MODEL: {SWINT: {EMBED_DIM: 16, DEPTHS: '(2, 2, 2, 2)'}, LANGUAGE_BACKBONE: {MAX_QUERY_LEN: 99},\n"
        "        ATSS: {INFERENCE_TH: 0.125, NMS_TH: 0.5, PRE_NMS_TOP_N: 7, DETECTIONS_PER_IMG: 11}}\n"
        "INPUT: {MIN_SIZE_TEST: 640}\n"
    )
    assert main(arguments) == 0
    config = json.loads((target / "manifest.json").read_text())["config"]
    head = [config["head"][name] for name in ("score_threshold", "nms_iou", "candidates_per_level", "max_detections")]
    assert head == [0.125, 0.5, 7, 11]
    assert (config["input"]["shortest_side"], config["input"]["max_tokens"]) == (640, 99)
    opened = Bundle.open(target)
    assert (opened.score_threshold, opened.nms_iou, opened.max_detections, opened.max_tokens) == (0.125, 0.5, 11, 99)


FULL_DISK = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write beyond the limit then fails as on a full disk
limit = int(sys.argv.pop(1))
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
from glip_export.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="file size limits are POSIX")
@pytest.mark.parametrize("limit", [1_000, 700_000], ids=["at the first file", "at the large one"])
def test_a_full_disk(tmp_path, tiny_checkpoint, limit):
    command = [sys.executable, "-c", FULL_DISK, limit, "--model", tiny_checkpoint, "--output", tmp_path / "new" / "out"]
    done = subprocess.run(
        [*map(str, command), "--quiet"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("glip-export: error: --output") and "nothing was written" in line
    assert list(tmp_path.iterdir()) == []


def test_the_default_output_is_named_after_the_checkpoint(tmp_path, monkeypatch, no_tracing, tiny_checkpoint):
    monkeypatch.chdir(tmp_path)
    os.link(tiny_checkpoint, tmp_path / "glip_x.pth")
    assert main(["--model", "glip_x.pth", "--quiet"]) == 0
    assert Path("glip_x/manifest.json").is_file()


def test_a_terminal_gets_a_bar(tmp_path, capsys, tiny_checkpoint, no_tracing, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert main(["--model", str(tiny_checkpoint), "--output", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().err
    assert "\r" in shown and bundle_writer.steps("fp32")[-1] in shown
    assert f"/{len(bundle_writer.steps('fp32'))}" in shown and "[1/" not in shown
