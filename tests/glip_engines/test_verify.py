"""A wrong engine is never delivered: engines run and compared with their graphs, on a simulated TensorRT."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from glip_engines import builder
from glip_engines.cli import main
from glip_engines.flavours import Dialect, Flavour, Gpu
from glip_engines.rewriting import rewrite_file
from glip_engines.trt import BuiltGraph
from glip_engines.verify import verify_engines
from glip_engines.worker import Environment
from glip_export.precision import to_precision
from simulated_tensorrt import VERSION, SimulatedCuda, simulated_tensorrt, write_engines

from glip_deploy.backends import tensorrt
from glip_deploy.backends.tensorrt import TensorRTBackend
from glip_deploy.bundle.engines import EngineRecord, TensorRecord
from glip_deploy.bundle.manifest import Bundle
from glip_deploy.errors import EngineError

NEW = Dialect(Flavour.TENSORRT, VERSION, 80)
SMALL = {"sizes": ((96, 96, 96), (128, 128, 128)), "tokens": ((8, 8, 8), (16, 16, 16)), "classes": (1, 4, 16)}


@pytest.fixture
def bundle(tiny_bundle, tmp_path, monkeypatch):
    monkeypatch.setattr(tensorrt, "_RUNTIMES", {})
    shutil.copytree(tiny_bundle, tmp_path / "glip")
    return Bundle.open(tmp_path / "glip")


@pytest.fixture(scope="module")
def graphs(tiny_bundle, tmp_path_factory):
    """What engines may compute instead of the bundle's graphs, by name."""
    folder = tmp_path_factory.mktemp("graphs")
    nearest = rewrite_file(
        tiny_bundle / "image.onnx", folder / "image.onnx", NEW, precision="fp32", form="native", pinned={}
    )
    ir.external_data.load_to_model(nearest)
    for node in nearest.graph:  # what TensorRT 10 made of "linear"
        if node.op_type == "GridSample":
            node.attributes["mode"] = ir.AttrString("mode", "nearest")
    ir.save(nearest, folder / "nearest.onnx", external_data="nearest.onnx.data")
    for graph in ("text", "image"):
        half = to_precision(ir.load(tiny_bundle / f"{graph}.onnx"), "fp16", rounded=True)
        ir.save(half, folder / f"{graph}_half.onnx", external_data=f"{graph}_half.onnx.data")
    return {
        "nearest": folder / "nearest.onnx",
        "text in half": folder / "text_half.onnx",
        "image in half": folder / "image_half.onnx",
    }


def opened(bundle, precision="fp32", split=False, **exchanged):
    """Engines of the bundle, some of which compute another graph."""
    folder = write_engines(bundle, precision=precision, graphs=exchanged, split=split, **SMALL)
    cuda = SimulatedCuda()
    return folder, TensorRTBackend.open(bundle, folder, cuda=cuda, trt=simulated_tensorrt(cuda))


def test_right_engines(bundle):
    rows = verify_engines(bundle, *opened(bundle))
    assert [row.graph for row in rows] == ["text"] * 2 + ["image"] * 4  # of both prompt lengths
    assert all(row.error <= row.tolerance for row in rows)
    assert {row.tolerance for row in rows} == {1e-4, 0.1, 1e-3}  # those of the parity report


def test_right_engines_of_both_parts(bundle):
    rows = verify_engines(bundle, *opened(bundle, split=True))
    of_a_profile = ["image"] * 2 + ["backbone and head"] * 4  # boxes and scores, of two prompts with the parts
    assert [row.graph for row in rows] == ["text"] * 2 + of_a_profile * 2
    assert all(row.error <= row.tolerance for row in rows)


def test_right_engines_in_half(bundle, graphs):
    folder, backend = opened(bundle, "fp16", text=graphs["text in half"], image=graphs["image in half"])
    rows = verify_engines(bundle, folder, backend)
    assert all(0 < row.error <= row.tolerance for row in rows)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_an_engine_that_samples_the_nearest_pixel(bundle, graphs, precision):
    folder, backend = opened(bundle, precision, image=graphs["nearest"])
    with pytest.raises(
        EngineError, match=r"the image engine computes something else .*: \w+.* differ by .*, more than"
    ):
        verify_engines(bundle, folder, backend)


@pytest.mark.parametrize("prompt", [0, 1])
def test_parts_that_compute_something_else(bundle, monkeypatch, prompt):
    folder, backend = opened(bundle, split=True)
    detect_prompts = backend.detect_prompts

    def one_wrong(inputs):
        found = detect_prompts(inputs)
        found[prompt] = replace(found[prompt], scores=found[prompt].scores * np.float32(1.1))
        return found

    monkeypatch.setattr(backend, "detect_prompts", one_wrong)
    with pytest.raises(EngineError, match=r"the backbone and head engine computes something else .*: \w+.* differ by"):
        verify_engines(bundle, folder, backend)


def test_an_engine_of_other_text(bundle, monkeypatch):
    folder, backend = opened(bundle)
    encode = backend.encode_text
    monkeypatch.setattr(backend, "encode_text", lambda ids: encode(ids) + np.float32(2e-4))
    with pytest.raises(EngineError, match="the text engine computes something else"):
        verify_engines(bundle, folder, backend)
    monkeypatch.setattr(backend, "encode_text", lambda ids: encode(ids) * np.float32("nan"))
    with pytest.raises(EngineError, match="differ by nan"):
        verify_engines(bundle, folder, backend)


# -- the build ------------------------------------------------------------------------------------------------------


class SimulatedWorker:
    """`glip_engines.worker.Worker` on a machine with the simulated GPU; `graphs` are what its engines compute."""

    graphs: dict = {}  # noqa: RUF012

    dialect = NEW

    def __init__(self, settings):
        self.environment = Environment(self.dialect, "Simulated GPU")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def build(self, job, on_progress):
        name = Path(job.onnx).stem
        bundle = Bundle.open(Path(job.plan).parents[2])
        with Path(job.plan).open("w") as file:
            file.write(repr((job.profiles, str(self.graphs.get(name, bundle.path / f"{name}.onnx")))))
        pinned = {"batch": 1, "height": 96, "width": 128, "tokens": 8}

        def rows(tensors):
            return tuple(
                TensorRecord(
                    t.name, t.dtype, tuple(pinned.get(side, -1) if isinstance(side, str) else side for side in t.shape)
                )
                for t in tensors
            )

        contract = bundle.manifest.io[name]
        return BuiltGraph(rows(contract.inputs), rows(contract.outputs), 1.0)

    def verify(self, bundle, folder):
        cuda = SimulatedCuda()
        opened = Bundle.open(bundle)
        return verify_engines(
            opened, folder, TensorRTBackend.open(opened, folder, cuda=cuda, trt=simulated_tensorrt(cuda))
        )


@pytest.fixture
def machine(monkeypatch):
    """A machine with the simulated GPU and TensorRT."""
    monkeypatch.setattr("glip_engines.worker.Worker", SimulatedWorker)
    monkeypatch.setattr(SimulatedWorker, "graphs", {})
    monkeypatch.setattr(builder, "choose_flavour", lambda wanted: Flavour.TENSORRT)
    monkeypatch.setattr(builder, "current_gpu", lambda: Gpu("Simulated GPU", 80))
    return SimulatedWorker


OPTIONS = ["--precision", "fp32", "--size", "96x128", "--tokens", "8", "--classes", "1:4:16", "--name", "mine"]


def test_a_wrong_engine_is_not_delivered(bundle, machine, graphs, capsys):
    machine.graphs["image"] = graphs["nearest"]
    assert main([str(bundle.path), *OPTIONS]) == 1
    said = capsys.readouterr()
    lines = [line for line in said.err.splitlines() if "engine" not in line.split(":")[0]]
    assert lines[-1].startswith("glip-build: error: the image engine computes something else than the bundle's graph")
    assert "nothing was delivered" in lines[-1] and said.out == ""
    assert not (bundle.path / "engines").exists()
    assert main([str(bundle.path), *OPTIONS, "--no-verify"]) == 0
    assert EngineRecord.read(bundle.path / "engines" / "mine").precision == "fp32"


def test_a_right_engine_is_delivered_with_what_was_found(bundle, machine, monkeypatch, capsys):
    assert main([str(bundle.path), *OPTIONS]) == 0
    said = capsys.readouterr()
    assert "image: boxes (pixels) differ by" in said.err and "0.1 is allowed" in said.err
    monkeypatch.setattr(builder, "current_gpu", lambda: None)
    assert main([str(bundle.path), *OPTIONS, "--overwrite"]) == 0
    assert "not verified: there is no GPU here that runs these engines" in capsys.readouterr().err


def test_versions_that_are_reported_to_sample_wrongly_are_always_verified(bundle, machine, monkeypatch, capsys):
    """pytorch/TensorRT issue 4074: fp32 sampling in an fp16 network, since 10.14.1."""
    options = [str(bundle.path), "--precision", "fp16", *OPTIONS[2:], "--no-verify"]
    newer = Dialect(Flavour.TENSORRT, "10.14.1", 80)
    monkeypatch.setattr(machine, "dialect", newer)
    assert main(options) == 1
    said = capsys.readouterr().err
    assert "--no-verify: tensorrt 10.14.1 is reported to sample wrongly in fp16 engines of the native form" in said
    assert not (bundle.path / "engines").exists()


def test_the_process_that_builds_is_asked_to_verify(bundle, monkeypatch):
    """The worker's own method, whose other side needs a GPU."""
    from glip_engines.worker import Worker

    asked = []
    row = {"graph": "text", "output": "x", "error": 0.5, "tolerance": 1.0}
    worker = Worker.__new__(Worker)
    monkeypatch.setattr(worker, "_ask", lambda question, on_progress: asked.append(question) or {"checked": [row]})
    (checked,) = worker.verify(bundle.path, bundle.path / "engines" / "x")
    assert checked.ok and checked.error == 0.5
    assert asked == [{"verify": str(bundle.path / "engines" / "x"), "bundle": str(bundle.path)}]
