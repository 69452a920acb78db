"""Real engines of a tiny GLIP, built by TensorRT-RTX without a GPU, and builds that fail."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path

import onnx_ir as ir
import pytest
from engine_needs import needs, needs_rtx
from glip_engines.builder import build_engines
from glip_engines.compilers import find_host_compiler, find_nvcc, find_tensorrt_headers
from glip_engines.flavours import Flavour
from glip_engines.options import BuildOptions, Range
from glip_engines.plan import Plan
from glip_engines.trt import GraphJob, Settings
from glip_engines.worker import Worker
from selection import slow
from split_bundle import unsplit

from glip_deploy.bundle.engines import EngineRecord, Machine
from glip_deploy.bundle.manifest import MANIFEST, Bundle
from glip_deploy.errors import BundleError, EngineError, OptionError, OutputError
from glip_deploy.files import sha256_of

needs_plugin = needs(find_nvcc, find_tensorrt_headers, find_host_compiler)
AS_PLUGIN = {"precision": "fp16", "form": "plugin"}

SMALL = {"height": Range.fixed(128), "width": Range.fixed(160), "tokens": (Range.fixed(16),)}
OPEN = {"height": Range(64, 128, 256), "width": Range(64, 160, 256)}


@pytest.fixture(scope="module", autouse=True)
def plugin_cache(compiled_plugins):
    """Compile plugins once for all tests; the user's own cache stays out of it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLIP_DEPLOY_CACHE", str(compiled_plugins))
        yield


def build(bundle, arch="SM80", **options):
    return build_engines(bundle, BuildOptions(flavour="tensorrt-rtx", arch=arch, **{**SMALL, **options}))


def contents(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


# -- real engines ---------------------------------------------------------------------------------------------------


@needs_rtx
@pytest.mark.parametrize(
    "sizes", [pytest.param(SMALL, id="fixed", marks=slow), pytest.param(OPEN, id="open", marks=slow)]
)
def test_the_image_branch_in_two_parts(bundle, sizes):
    """Without GLIP_SLOW=1 the parts are parsed alone, in test_inspection.py."""
    result = build(bundle, **sizes, precision="fp32", split=True)
    record = EngineRecord.read(result.path)
    assert set(record.engines) == {"text.plan", "image.plan", "backbone.plan", "head.plan"}
    assert "--split" in record.options.split()
    assert [row.name for row in record.engines["backbone.plan"].outputs] == [f"features_p{i}" for i in range(3, 8)]
    plan = Plan.of(Bundle.open(bundle), BuildOptions(**SMALL | sizes, precision="fp32", split=True), Flavour.RTX)
    for graph in plan.graphs:
        assert record.engines[f"{graph}.plan"].profiles == plan.profiles(graph)


def test_the_sizes_of_features_follow_from_those_of_frames(bundle):
    plan = Plan.of(Bundle.open(bundle), BuildOptions(**OPEN, split=True), Flavour.RTX)
    (profile,) = plan.profiles("head")
    assert profile["features_p3"] == ((1, 32, 8, 8), (1, 32, 16, 20), (1, 32, 32, 32))
    assert profile["features_p7"] == ((1, 32, 1, 1), (1, 32, 1, 2), (1, 32, 2, 2))
    (whole,) = plan.profiles("image")
    assert "features_p3" not in whole


def test_a_bundle_that_is_not_split(tiny_bundle, tmp_path):
    old = unsplit(tiny_bundle, tmp_path / "old")
    options = BuildOptions(flavour="tensorrt", split=True)
    with pytest.raises(OptionError, match=r"has no backbone\.onnx and head\.onnx for --split; export it again"):
        Plan.of(Bundle.open(old), options, Flavour.TENSORRT)


@needs_rtx
@pytest.mark.parametrize(
    ("arch", "options"),
    [
        ("SM75", {"precision": "fp16"}),
        pytest.param("SM80", {"precision": "fp32"}, marks=slow),
        pytest.param("SM120", AS_PLUGIN, marks=needs_plugin),
        *(
            pytest.param(arch, options, marks=[*slow, *([needs_plugin] if options.get("form") == "plugin" else [])])
            for arch in ("SM75", "SM80", "SM86", "SM89", "SM120")
            for options in (
                {"precision": "fp16"},
                {"precision": "bf16"},
                AS_PLUGIN,
            )
            if (arch, options["precision"]) != ("SM75", "bf16") and (arch, options) != ("SM120", AS_PLUGIN)
        ),
        pytest.param("SM80", {**OPEN, "tokens": (Range(1, 16, 64),), "batch": Range(1, 1, 2)}, marks=slow),
        pytest.param("SM80", {**OPEN, "tokens": (Range.fixed(16), Range.fixed(64))}, marks=slow),
        pytest.param(
            "SM80",
            {**OPEN, **AS_PLUGIN},
            marks=[*slow, needs_plugin],
        ),
    ],
    ids=str,
)
def test_both_branches_build(bundle, arch, options):
    before = contents(bundle)
    manifest = json.loads((bundle / MANIFEST).read_text())
    steps = []
    result = build_engines(
        bundle,
        BuildOptions(flavour="tensorrt-rtx", arch=arch, **{**SMALL, **options}),
        lambda step, fraction, phase: steps.append((step, fraction)),
    )
    precision, form = options.get("precision", "fp16"), options.get("form", "native")
    folder = result.path
    assert folder.parent == bundle.resolve() / "engines"
    assert folder.name.startswith(f"{arch.lower()}-tensorrt-rtx-")
    assert folder.name.endswith(f"-{precision}-{form}")
    library = ["libglip_deform.so"] if form == "plugin" else []
    assert contents(folder) == ["build.json", "image.plan", *library, "text.plan"]
    assert (b"ModulatedDeformConv" in (folder / "image.plan").read_bytes()) == (form == "plugin")
    assert [name for name in contents(bundle) if not name.startswith("engines")] == before
    record = EngineRecord.read(folder)
    assert record == result.record
    assert (record.compute_capability, record.gpu, record.precision) == (int(arch[2:]), None, precision)
    assert record.manifest_sha256 == sha256_of(bundle / MANIFEST)
    shapes = {**SMALL, **options}
    for graph in ("text", "image"):
        engine = record.engines[f"{graph}.plan"]
        assert (folder / f"{graph}.plan").stat().st_size == engine.size > 100_000
        for built, rows in ((engine.inputs, "inputs"), (engine.outputs, "outputs")):
            promised = manifest["io"][graph][rows]
            assert [(t.name, t.dtype, len(t.shape)) for t in built] == [
                (row["name"], row["dtype"], len(row["shape"])) for row in promised
            ]
        assert len(engine.profiles) == len(shapes["tokens"])
        for profile, bucket in zip(engine.profiles, shapes["tokens"], strict=True):
            mask = profile["attention_mask" if graph == "text" else "text_mask"]
            assert [shape[1] for shape in mask] == [bucket.least, bucket.best, bucket.most]
    frames = record.engines["image.plan"].inputs[0]
    assert frames.shape == (
        1 if options.get("batch", Range.fixed(1)).is_fixed else -1,
        *((128, 160) if shapes["height"].is_fixed else (-1, -1)),
        3,
    )
    assert {step for step, _ in steps} == {"text engine", "image engine", *(["plugin"] if form == "plugin" else [])}
    assert all(0 <= fraction <= 1 for _, fraction in steps)
    machine = Machine("tensorrt-rtx", record.version, "any", record.compute_capability)
    record.check(folder, Bundle.open(bundle), machine)


@pytest.fixture(scope="module")
def only_text(tiny_bundle, tmp_path_factory):
    """A bundle whose image graph is its text graph: engines in a second."""
    folder = tmp_path_factory.mktemp("text") / "glip"
    shutil.copytree(tiny_bundle, folder)
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["io"]["image"] = manifest["io"]["text"]
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return folder


@needs_rtx
def test_engines_are_replaced_only_when_asked(only_text):
    first = build(only_text, precision="fp16", name="mine")
    with pytest.raises(OutputError, match="exist; add --overwrite, or another --name"):
        build(only_text, precision="fp16", name="mine")
    kept = first.record.engines["text.plan"]
    second = build(only_text, precision="fp32", name="mine", overwrite=True)
    assert second.path == first.path
    assert second.record.engines["text.plan"].sha256 != kept.sha256
    assert contents(only_text / "engines") == ["mine", "mine/build.json", "mine/image.plan", "mine/text.plan"]


@needs_rtx
@pytest.mark.parametrize("side", ["inputs", "outputs"])
def test_a_manifest_that_disagrees_with_the_graphs(bundle, side):
    manifest = json.loads((bundle / MANIFEST).read_text())
    manifest["io"]["text"][side][0]["dtype"] = "int32"
    name = manifest["io"]["text"][side][0]["name"]
    (bundle / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match=rf"the text engine has {name} .* where the manifest says {name} int32"):
        build(bundle)
    assert not (bundle / "engines").exists()


@needs_rtx
def test_an_unwritable_bundle(bundle, monkeypatch):
    """As root every folder is writable, so a file stands where the folder should be."""
    (bundle / "engines").write_text("in the way")
    with pytest.raises(OutputError, match="cannot be written"):
        build(bundle)
    assert (bundle / "engines").read_text() == "in the way"


# -- the process that builds ----------------------------------------------------------------------------------------


def text_job(bundle, tmp_path, least=1, best=16, most=32):
    shapes = dict.fromkeys(("input_ids", "attention_mask"), ((1, least), (1, best), (1, most)))
    return GraphJob(str(bundle / "text.onnx"), str(tmp_path / "text.plan"), (shapes,))


@needs_rtx
def test_a_node_the_parser_refuses(tmp_path):
    value = ir.Value(name="x", shape=ir.Shape([1, 4]), type=ir.TensorType(ir.DataType.FLOAT))
    output = ir.Value(name="y", shape=ir.Shape([1, 4]), type=ir.TensorType(ir.DataType.FLOAT))
    node = ir.Node("glip", "Nonsense", [value], outputs=[output], name="/head/odd")
    model = ir.Model(
        ir.Graph([value], [output], nodes=[node], opset_imports={"": 20, "glip": 1}, name="g"), ir_version=9
    )
    ir.save(model, tmp_path / "odd.onnx")
    settings = Settings(Flavour.RTX, "fp32", "SM80")
    with Worker(settings) as worker:
        job = GraphJob(str(tmp_path / "odd.onnx"), str(tmp_path / "odd.plan"), ({"x": ((1, 4),) * 3},))
        with pytest.raises(EngineError, match=r"refuses odd\.onnx: node /head/odd \(Nonsense\): ") as caught:
            worker.build(job, lambda fraction, phase: None)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "odd.plan").exists()


@needs_rtx
def test_a_profile_the_builder_refuses(tiny_bundle, tmp_path):
    with (
        Worker(Settings(Flavour.RTX, "fp32", "SM80")) as worker,
        pytest.raises(EngineError, match=r"tensorrt-rtx .*text") as caught,
    ):
        worker.build(text_job(tiny_bundle, tmp_path, least=32, best=16, most=8), lambda fraction, phase: None)
    assert "\n" not in str(caught.value)


@needs_rtx
def test_a_worker_that_dies(tiny_bundle, tmp_path):
    with Worker(Settings(Flavour.RTX, "fp32", "SM80")) as worker:
        os.kill(worker._child.pid, signal.SIGABRT)
        with pytest.raises(EngineError, match=r"tensorrt-rtx ended the build \(SIGABRT\).*; try other shapes"):
            worker.build(text_job(tiny_bundle, tmp_path), lambda fraction, phase: None)


@needs_rtx
def test_an_interrupt_ends_the_worker_and_leaves_nothing(bundle):
    pids = []
    original = Worker.build

    def interrupt(step, fraction, phase):
        if step == "image engine" and fraction > 0:
            raise KeyboardInterrupt

    def spy(self, job, on_progress):
        pids.append(self._child.pid)
        return original(self, job, on_progress)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Worker, "build", spy)
        build_engines(bundle, BuildOptions(flavour="tensorrt-rtx", arch="SM80", **SMALL), interrupt)
    assert not (bundle / "engines").exists()
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


@needs_rtx
def test_the_unnumbered_library_is_offered_to_the_parser_of_plugins(tmp_path):
    """Without it tensorrt_rtx aborts the process as soon as a plugin is registered."""
    worker = Worker(Settings(Flavour.RTX, "fp16", "SM80"))
    worker._folder = tmp_path
    first = worker._library_path()["LD_LIBRARY_PATH"].split(os.pathsep)[0]
    link = Path(first) / "libtensorrt_rtx.so"
    assert link.is_symlink()
    assert link.resolve().name.startswith("libtensorrt_rtx.so.")


# -- options --------------------------------------------------------------------------------------------------------


@needs_rtx
def test_a_bundle_in_half_is_not_built_in_single(bundle):
    manifest = json.loads((bundle / MANIFEST).read_text())
    manifest["precision"] = "fp16"
    (bundle / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(OptionError, match=r"was exported in fp16 and cannot be built in fp32; .*export again"):
        build(bundle, precision="fp32")


@needs_rtx
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_turing_is_for_fp16(bundle, precision):
    with pytest.raises(OptionError, match=rf"builds for SM75 in fp16 only, not in {precision}; use --precision fp16"):
        build(bundle, arch="sm75", precision=precision)


@needs_rtx
def test_starting_and_refusing_is_quick(bundle):
    started = time.process_time()
    with pytest.raises(OptionError, match="SM75, SM80"):
        build(bundle, arch="SM90")
    assert time.process_time() - started < 5
