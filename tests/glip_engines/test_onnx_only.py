"""`glip-build --onnx-only`: graphs that compute what the bundle's do, and the commands that build engines of them."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from glip_engines.cli import main
from glip_engines.inspection import Expected
from glip_engines.rewriting.deformable import PLUGIN_OPERATOR

from glip_deploy.bundle.contract import ImageInputs, text_inputs

VERSIONS = ("8.6", "10.3", "10.9", "11.1")
SMALL = ["--size", "64x96", "--tokens", "8"]
FILES = ["README.md", "image.onnx", "image.onnx.data", "text.onnx", "text.onnx.data"]


def write(bundle, folder, *options):
    assert main([str(bundle), "--onnx-only", str(folder), *options]) == 0
    assert sorted(path.name for path in folder.iterdir()) == FILES
    return folder


def commands(folder):
    return re.findall(r"^    (trtexec .*)$", (folder / "README.md").read_text(), re.MULTILINE)


def run(path, feed):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {row.name: feed[row.name] for row in session.get_inputs()})


def image_feed(height=64, width=96, tokens=8, classes=3):
    rng = np.random.default_rng(3)
    return ImageInputs.of(
        rng.integers(0, 256, (1, height, width, 3), dtype=np.uint8),
        np.array([[height - 2, width - 7]]),
        rng.normal(size=(tokens, 32)).astype(np.float32),
        np.full((classes, tokens), 1 / tokens, np.float32),
    ).feed()


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_native_form_computes_what_the_bundle_does(tiny_bundle, tmp_path, capsys, version, precision):
    folder = write(tiny_bundle, tmp_path / "graphs", "--trt-version", version, "--precision", precision)
    assert capsys.readouterr().out == f"{folder}\n"
    for name in ("text.onnx", "image.onnx"):
        onnx.checker.check_model(str(folder / name), full_check=True)
        opset = onnx.load(folder / name, load_external_data=False).opset_import[0].version
        assert opset == (17 if version == "8.6" else 20)
    loose = precision == "fp16"
    ids = text_inputs(np.arange(5, 12))
    text, expected = (run(path / "text.onnx", ids)[0] for path in (folder, tiny_bundle))
    np.testing.assert_allclose(text, expected, atol=2e-2 if loose else 1e-5)
    ours, expected = (run(path / "image.onnx", image_feed()) for path in (folder, tiny_bundle))
    assert (expected[1] > 0.05).sum() > 10
    np.testing.assert_allclose(np.sort(ours[1]), np.sort(expected[1]), atol=4e-3 if loose else 1e-5)


@pytest.mark.parametrize("form", ["native", "plugin"])
def test_the_image_branch_in_two_parts(tiny_bundle, tmp_path, form):
    folder = tmp_path / "graphs"
    for more in ([], ["--overwrite"]):
        options = ["--split", "--form", form, "--precision", "fp32", *more]
        assert main([str(tiny_bundle), "--onnx-only", str(folder), *options]) == 0
    parts = ["backbone.onnx", "backbone.onnx.data", "head.onnx", "head.onnx.data"]
    assert sorted(path.name for path in folder.iterdir()) == sorted([*FILES, *parts])
    of_head = next(command for command in commands(folder) if "head.onnx" in command)
    assert "features_p3:1x32x4x4," in of_head and "text_mask:1x256" in of_head
    if form == "plugin":
        return
    feed = image_feed()
    backbone, head, whole = (folder / name for name in ("backbone.onnx", "head.onnx", "image.onnx"))
    names = [output.name for output in onnx.load(backbone, load_external_data=False).graph.output]
    features = dict(zip(names, run(backbone, feed), strict=True))
    for ours, expected in zip(run(head, {**feed, **features}), run(whole, feed), strict=True):
        np.testing.assert_allclose(np.sort(ours, axis=1), np.sort(expected, axis=1), atol=1e-3)


def test_weights_with_another_hard_link(tiny_bundle, tmp_path, capsys):
    """As backups make them; the ONNX library takes them for an attack."""
    bundle = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    (tmp_path / "backup").hardlink_to(bundle / "image.onnx.data")
    assert main([str(bundle), "--onnx-only", str(tmp_path / "graphs")]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("glip-build: error: ")
    assert "the weights of image.onnx have more than one hard link" in line and "copy the bundle (cp -r)" in line
    assert not (tmp_path / "graphs").exists()


@pytest.mark.parametrize("version", ["8.6", "10.9"])
def test_the_plugin_form(tiny_bundle, tmp_path, version):
    folder = write(tiny_bundle, tmp_path / "graphs", "--form", "plugin", "--trt-version", version)
    model = ir.load(folder / "image.onnx")
    nodes = [node for node in model.graph if node.op_type == PLUGIN_OPERATOR]
    assert len(nodes) == Expected.of(model).plugins == 6  # two layers
    assert not any(node.op_type in ("DeformConv", "GridSample") for node in model.graph)
    assert all("--dynamicPlugins=libglip_deform_tensorrt.so" in command for command in commands(folder))
    assert "cmake -S engines" in (folder / "README.md").read_text()


def test_bf16(tiny_bundle, tmp_path, capsys):
    options = ["--precision", "bf16", "--trt-version"]
    folder = write(tiny_bundle, tmp_path / "graphs", *options, "10.9")
    types = {value.dtype for value in ir.load(folder / "image.onnx").graph.initializers.values()}
    assert ir.DataType.BFLOAT16 in types
    assert main([str(tiny_bundle), "--onnx-only", str(tmp_path / "x"), *options, "8.6"]) == 1
    assert "TensorRT 8.6 has no bf16; use --precision fp16" in capsys.readouterr().err


def test_a_version_that_is_reported_to_sample_wrongly(tiny_bundle, tmp_path):
    for i, (options, warned) in enumerate(
        (
            (("--trt-version", "10.14"), True),
            (("--trt-version", "11.1", "--precision", "bf16"), True),
            (("--trt-version", "10.13"), False),
            (("--trt-version", "10.14", "--precision", "fp32"), False),
            (("--trt-version", "10.14", "--form", "plugin"), False),
        )
    ):
        readme = (write(tiny_bundle, tmp_path / str(i), *options) / "README.md").read_text()
        assert ("reported to sample wrongly" in readme) is warned


def test_the_commands_of_the_readme(tiny_bundle, tmp_path):
    """Ranges of every dynamic input, as the manifest names them; nothing about inputs whose sizes are fixed."""

    def shapes(command, which):
        return dict(pair.split(":") for pair in re.search(rf"--{which}Shapes=(\S+)", command)[1].split(","))

    folder = write(tiny_bundle, tmp_path / "a", "--trt-version", "10.9", "--classes", "1:4:9", "--tokens", "8,16,32")
    text, image = commands(folder)
    assert text.startswith("trtexec --onnx=text.onnx --saveEngine=text.plan --noTF32 --stronglyTyped --minShapes=")
    io = json.loads((tiny_bundle / "manifest.json").read_text())["io"]
    names = {graph: [row["name"] for row in rows["inputs"]] for graph, rows in io.items()}
    assert list(shapes(text, "min")) == names["text"]
    assert list(shapes(image, "max")) == [name for name in names["image"] if name != "image_sizes"]
    assert [shapes(image, which)["class_map"] for which in ("min", "opt", "max")] == ["1x1x8", "1x4x8", "1x9x32"]
    assert shapes(image, "min")["frames"] == "1x32x32x3"

    fixed = write(tiny_bundle, tmp_path / "b", *SMALL, "--classes", "3", "--trt-version", "11.1")
    text, image = commands(fixed)
    assert image == "trtexec --onnx=image.onnx --saveEngine=image.plan --noTF32"
    inputs = ir.load(fixed / "image.onnx").graph.inputs
    assert [list(value.shape) for value in inputs] == [[1, 64, 96, 3], [1, 2], [1, 8, 32], [1, 8], [1, 3, 8]]

    old = write(tiny_bundle, tmp_path / "c", "--trt-version", "8.6")
    assert all("--noTF32 --fp16 --precisionConstraints=obey" in command for command in commands(old))
    readme = (old / "README.md").read_text()
    assert "weakly typed" in readme and "| int32 |" in readme and "| int64 |" not in readme


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--trt-version", "9.3"], '--trt-version is "9.3"; legal is 8.6, or 10.0 to 11 such as 10.9'),
        (["--trt-version", "ten"], '--trt-version is "ten"'),
        (["--workspace", "2G"], "--workspace has no effect on the graphs that --onnx-only writes; leave it out"),
        (["--arch", "SM80"], "--arch has no effect"),
        (["--flavor", "tensorrt-rtx"], "--flavor has no effect"),
        (["--tokens", "300"], "--tokens is 300"),
        (["--form", "magic"], 'form is "magic"'),
    ],
    ids=" ".join,
)
def test_mistakes(tiny_bundle, tmp_path, capsys, options, words):
    assert main([str(tiny_bundle), "--onnx-only", str(tmp_path / "graphs"), *options]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("glip-build: error: ") and words in line
    assert list(tmp_path.iterdir()) == []


def test_a_version_alone_is_bad_usage(tiny_bundle, capsys):
    assert main([str(tiny_bundle), "--trt-version", "10.3"]) == 2
    assert "--trt-version: needs --onnx-only DIR to have an effect" in capsys.readouterr().err


def test_what_exists_is_replaced_only_when_asked(tiny_bundle, tmp_path, capsys):
    folder = tmp_path / "graphs"
    folder.mkdir()
    before = (write(tiny_bundle, folder) / "image.onnx").read_bytes()
    assert main([str(tiny_bundle), "--onnx-only", str(folder), *SMALL]) == 1
    assert f"--onnx-only {folder} exists; add --overwrite" in capsys.readouterr().err
    assert (folder / "image.onnx").read_bytes() == before
    assert (write(tiny_bundle, folder, *SMALL, "--overwrite") / "image.onnx").read_bytes() != before
    (folder / "notes.txt").write_text("mine")
    assert main([str(tiny_bundle), "--onnx-only", str(folder), "--overwrite"]) == 1
    assert "holds something else and is not replaced" in capsys.readouterr().err
    assert (folder / "notes.txt").read_text() == "mine"


def test_neither_tensorrt_nor_torch_is_loaded(tiny_bundle, tmp_path):
    code = (
        "import sys; from glip_engines.cli import main\n"
        f"assert main([{str(tiny_bundle)!r}, '--onnx-only', {str(tmp_path / 'g')!r}, '--quiet']) == 0\n"
        "print(sorted({'torch', 'tensorrt', 'tensorrt_rtx'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == (f"{tmp_path / 'g'}\n[]\n", "")
