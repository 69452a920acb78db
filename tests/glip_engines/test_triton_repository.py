"""`glip-build --triton`: the repository is whole, says what the model takes, and its model.py runs."""

import importlib.util
import json
import shutil
import sys

import pytest
import triton_stand_in
from glip_engines.cli import main
from glip_engines.triton_repository import write_repository

from glip_deploy.bundle.engines import EngineFile, EngineRecord, TensorRecord
from glip_deploy.bundle.manifest import Bundle
from glip_deploy.triton_model import INPUTS, OUTPUTS, PARAMETERS

text_format = pytest.importorskip("google.protobuf.text_format", reason="protobuf, of tritonclient, is not installed")
messages = pytest.importorskip("tritonclient.grpc.model_config_pb2", reason="tritonclient is not installed")


def build(capsys, *arguments):
    status = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status, captured.out.strip(), captured.err.strip()


def config_of(folder):
    """The configuration, read as strictly as Triton reads it."""
    return text_format.Parse((folder / "glip" / "config.pbtxt").read_text(), messages.ModelConfig())


def files_in(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def with_engines(tiny_bundle, tmp_path):
    """A bundle with the record of engines for up to four pictures (their bytes are made up; nothing reads them)."""
    bundle = tmp_path / "with_engines"
    shutil.copytree(tiny_bundle, bundle)
    folder = bundle / "engines" / "sm80"
    folder.mkdir(parents=True)
    (folder / "image.plan").write_bytes(b"plan")
    frames = TensorRecord("frames", "uint8", (-1, -1, -1, 3))
    shapes = {"frames": ((1, 96, 96, 3), (1, 96, 96, 3), (4, 160, 160, 3))}
    EngineRecord(
        format_version=1,
        flavour="tensorrt",
        version="10.9.0",
        compute_capability=80,
        gpu="A GPU",
        precision="fp16",
        form="native",
        plugin=None,
        manifest_sha256="0" * 64,
        options="",
        engines={"image.plan": EngineFile("0" * 64, 4, 1.0, (frames,), (), (shapes,))},
    ).write(folder)
    return bundle


def test_what_is_written(tiny_bundle, tmp_path, capsys):
    folder = tmp_path / "models"
    assert build(capsys, tiny_bundle, "--triton", folder) == (0, str(folder), "")
    files = files_in(folder)
    bundle = {name.removeprefix("glip/1/bundle/") for name in files if name.startswith("glip/1/bundle/")}
    assert bundle == {"manifest.json", *Bundle.open(tiny_bundle).files}
    assert set(files) == {"glip/config.pbtxt", "glip/1/model.py", *(f"glip/1/bundle/{name}" for name in bundle)}
    Bundle.open(folder / "glip" / "1" / "bundle")  # every hash is right
    assert [path.name for path in folder.iterdir()] == ["glip"]


def test_the_configuration(tiny_bundle, tmp_path):
    write(tiny_bundle, tmp_path)
    config = config_of(tmp_path)
    assert (config.name, config.backend, config.max_batch_size) == ("glip", "python", 1)
    for tensors, specs in ((config.input, INPUTS), (config.output, OUTPUTS)):
        assert [tensor.name for tensor in tensors] == [spec.name for spec in specs]
        for tensor, spec in zip(tensors, specs, strict=True):
            assert messages.DataType.Name(tensor.data_type) == spec.dtype
            assert tuple(tensor.dims) == spec.dims
            assert getattr(tensor, "optional", False) is spec.optional
    assert config.HasField("dynamic_batching")
    [group] = config.instance_group
    assert (group.count, messages.ModelInstanceGroup.Kind.Name(group.kind)) == (1, "KIND_CPU")
    assert {name: value.string_value for name, value in config.parameters.items()} == PARAMETERS


def test_batches_and_instances(tiny_bundle, tmp_path):
    write(tiny_bundle, tmp_path, "--batch", "6", "--instances", "2", "--backend", "onnxruntime-cuda")
    config = config_of(tmp_path)
    assert config.max_batch_size == 6
    [group] = config.instance_group
    assert (group.count, messages.ModelInstanceGroup.Kind.Name(group.kind)) == (2, "KIND_GPU")
    assert config.parameters["backend"].string_value == "onnxruntime-cuda"


def test_a_bundle_with_engines(with_engines, tmp_path, capsys):
    write(with_engines, tmp_path / "models")
    config = config_of(tmp_path / "models")
    assert config.parameters["backend"].string_value == "tensorrt" and config.max_batch_size == 4
    version = tmp_path / "models" / "glip" / "1"
    assert files_in(version / "bundle" / "engines") == files_in(with_engines / "engines")
    write(with_engines, tmp_path / "other", "--backend", "onnxruntime")
    assert not (tmp_path / "other" / "glip" / "1" / "bundle" / "engines").exists()
    status, _, error = build(capsys, with_engines, "--triton", tmp_path / "third", "--batch", "5")
    assert status == 1 and "--batch is 5, but the engines take 4 at a time" in error
    assert not (tmp_path / "third").exists()


def write(bundle, folder, *options):
    assert main([str(bundle), "--triton", str(folder), *options]) == 0


def test_its_model_runs(tiny_bundle, tmp_path, monkeypatch):
    """As Triton does it: the class of model.py, with the configuration as JSON."""
    from google.protobuf import json_format

    write(tiny_bundle, tmp_path)
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", triton_stand_in.as_module())
    spec = importlib.util.spec_from_file_location("model", tmp_path / "glip" / "1" / "model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model = module.TritonPythonModel()
    config = json_format.MessageToDict(config_of(tmp_path), preserving_proto_field_name=True)
    config["parameters"]["shortest_side"]["string_value"] = "96"
    model.initialize({"model_config": json.dumps(config)})
    assert model._detector.bundle.path == tmp_path / "glip" / "1" / "bundle"
    assert model._detector.shortest_side == 96
    model.finalize()


def test_other_models_stay_and_an_own_one_is_replaced_only_on_request(tiny_bundle, tmp_path, capsys):
    other = tmp_path / "other" / "config.pbtxt"
    other.parent.mkdir()
    other.write_text("")
    write(tiny_bundle, tmp_path)
    (tmp_path / "glip" / "config.pbtxt").write_text("changed")
    before = files_in(tmp_path)
    status, _, error = build(capsys, tiny_bundle, "--triton", tmp_path)
    assert status == 1 and error.startswith(f"glip-build: error: --triton: {tmp_path}/glip exists; add --overwrite")
    assert files_in(tmp_path) == before
    write(tiny_bundle, tmp_path, "--overwrite")
    assert config_of(tmp_path).name == "glip" and other.exists()


def test_something_else_is_never_replaced(tiny_bundle, tmp_path, capsys):
    (tmp_path / "glip").mkdir()
    (tmp_path / "glip" / "notes.txt").write_text("mine")
    status, _, error = build(capsys, tiny_bundle, "--triton", tmp_path, "--overwrite")
    assert status == 1 and "holds something else and is not replaced" in error
    assert files_in(tmp_path) == {"glip/notes.txt": b"mine"}


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        (["--precision", "fp16"], 1, "--precision is about building engines and has no effect with --triton"),
        (["--flavor", "tensorrt"], 1, "--flavor is about building engines"),
        (["--optimization-level", "3"], 1, "--optimization-level is about building engines"),
        (["--tokens", "16"], 1, "--tokens is about building engines"),
        (["--size", "96x96"], 1, "is about building engines"),
        (["--split"], 1, "--split is about building engines"),
        (["--backend", "torch"], 1, '--backend is "torch"; legal is onnxruntime,'),
        (["--backend", "tensorrt"], 1, "--backend tensorrt needs engines"),
        (["--batch", "1:2:4"], 2, "argument --batch: is 1:2:4; with --triton it is one number"),
        (["--batch", "4000"], 1, "--batch is 4000; legal is 1 to 1024"),
        (["--instances", "0"], 1, "--instances is 0; legal is 1 to 1024"),
        (["--onnx-only", "graphs"], 2, "argument --triton: not allowed with argument --onnx-only"),
    ],
)
def test_options_that_cannot_be_used(tiny_bundle, tmp_path, capsys, options, status, message):
    got, out, error = build(capsys, tiny_bundle, "--triton", tmp_path / "models", *options)
    assert (got, out) == (status, "")
    assert message in error and len(error.splitlines()) == 1
    assert not (tmp_path / "models").exists()


def test_options_that_need_it(tiny_bundle, capsys):
    for option, value in (("--backend", "openvino"), ("--instances", "2")):
        status, _, error = build(capsys, tiny_bundle, option, value)
        assert status == 2 and f"argument {option}: needs --triton DIR to have an effect" in error


def test_a_failure_leaves_nothing(tiny_bundle, tmp_path, monkeypatch):
    from glip_engines.options import BuildOptions

    from glip_deploy.errors import OutputError

    def full(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(OutputError, match="no space left"):
        write_repository(tiny_bundle, tmp_path / "models", BuildOptions())
    assert list(tmp_path.iterdir()) == []


def test_a_bundle_that_is_none(tmp_path, capsys):
    status, _, error = build(capsys, tmp_path / "nothing", "--triton", tmp_path / "models")
    assert status == 1 and "does not exist; make a bundle with glip-export" in error
    assert list(tmp_path.iterdir()) == []
