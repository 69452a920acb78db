"""A network that differs from its graph stops the build in one line, before the minutes that it takes."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from types import SimpleNamespace

import onnx
import onnx_ir as ir
import pytest
from engine_needs import needs_rtx
from glip_engines.flavours import Dialect, Flavour
from glip_engines.inspection import Expected, check_network, single_tensors
from glip_engines.rewriting import rewrite, rewrite_file
from glip_engines.trt import GraphJob, Settings
from glip_engines.worker import Worker
from glip_export.onnx_export import drop_raw_outputs
from selection import SLOW, slow
from tiny_glip import HIDDEN

from glip_deploy.bundle.contract import image_contract
from glip_deploy.errors import EngineError

NEW = Dialect(Flavour.TENSORRT, "10.9.0", 80)

# -- a network by hand ----------------------------------------------------------------------------------------------


def named(name):
    return SimpleNamespace(name=name)


class FakeLayer:
    """A layer as the bindings give it: of the base class, without what its kind has."""

    def __init__(self, kind, types=("FLOAT",), mode="LINEAR", padding="FILL", align=False):
        self.type, self.name = named(kind), f"/a/{kind.lower()}"
        self._inputs = [None if t is None else SimpleNamespace(dtype=named(t)) for t in types]
        self._hidden = (named(mode), named(padding), align)

    @property
    def num_inputs(self):
        return len(self._inputs)

    def get_input(self, i):
        return self._inputs[i]


class FakeGridSampleLayer(FakeLayer):
    interpolation_mode = property(lambda self: self._hidden[0])
    sample_mode = property(lambda self: self._hidden[1])
    align_corners = property(lambda self: self._hidden[2])


def check(layers, expected, typed=True):
    network = SimpleNamespace(num_layers=len(layers), get_layer=lambda i: layers[i])
    check_network(SimpleNamespace(IGridSampleLayer=FakeGridSampleLayer), network, expected, typed=typed)


def fakes(**changes):
    """Layers of a small network that is right, by name, some of them exchanged."""
    layers = {
        "sampler": FakeLayer("GRID_SAMPLE", ("FLOAT", "FLOAT")),
        "norm": FakeLayer("NORMALIZATION", ("FLOAT",)),
        "layer norm": FakeLayer("NORMALIZATION", ("HALF",)),
        "softmax": FakeLayer("SOFTMAX", ("HALF",)),
        "product": FakeLayer("MATRIX_MULTIPLY", ("HALF",)),
        "plugin": FakeLayer("PLUGIN_V3", ("HALF", "HALF", "HALF", "FLOAT", "FLOAT")),
        "sum": FakeLayer("ELEMENTWISE", ("HALF",)),
    }
    return [layer for layer in {**layers, **changes}.values() if layer is not None]


EXPECTED = Expected(
    kinds={"GRID_SAMPLE": 1, "NORMALIZATION": 2, "SOFTMAX": 1, "MATRIX_MULTIPLY": 1},
    single={"GRID_SAMPLE": 1, "NORMALIZATION": 1},
    samplers={"LINEAR, FILL, align_corners 0": 1},
    plugins=1,
)


def test_a_network_that_matches_its_graph():
    check(fakes(), EXPECTED)
    check(fakes(plugin=FakeLayer("PLUGIN_V2", ("HALF", "HALF", "HALF", "FLOAT"))), EXPECTED)
    check(fakes(plugin=FakeLayer("PLUGIN_V3", ("HALF", "HALF", "HALF", "FLOAT", None))), EXPECTED)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"sampler": FakeLayer("GRID_SAMPLE", ("FLOAT", "FLOAT"), mode="NEAREST")},
            "reads GridSample /a/grid_sample as NEAREST, FILL, align_corners 0; the graph says LINEAR, FILL",
        ),
        ({"sampler": FakeLayer("GRID_SAMPLE", ("FLOAT", "FLOAT"), padding="CLAMP")}, "as LINEAR, CLAMP"),
        ({"sampler": FakeLayer("GRID_SAMPLE", ("FLOAT", "FLOAT"), align=True)}, "align_corners 1; the graph says"),
        ({"sampler": FakeLayer("GRID_SAMPLE", ("FLOAT", "HALF"))}, "its input 1 in HALF, the graph says fp32"),
        ({"sampler": FakeLayer("GRID_SAMPLE", ("HALF", "FLOAT"))}, "makes 0 fp32 GRID_SAMPLE layers, .* asks for 1"),
        ({"sampler": None}, "makes 0 GRID_SAMPLE layers, the graph asks for 1"),
        ({"norm": FakeLayer("NORMALIZATION", ("HALF",))}, "makes 0 fp32 NORMALIZATION layers, the graph asks for 1"),
        # TensorRT 8.6 without its native layer for InstanceNormalization
        ({"norm": FakeLayer("PLUGIN_V2")}, "makes 2 plugin layers, the graph asks for 1"),
        ({"softmax": None}, "makes 0 SOFTMAX layers, the graph asks for 1"),
        ({"softmax": FakeLayer("SOFTMAX")}, "makes 1 fp32 SOFTMAX layers, the graph asks for 0"),
        ({"plugin": None}, "makes 0 plugin layers, the graph asks for 1"),
        (
            {"plugin": FakeLayer("PLUGIN_V3", ("HALF", "HALF", "HALF", "HALF", "FLOAT"))},
            "gives /a/plugin_v3 its input 3 in HALF",
        ),
        (
            {"plugin": FakeLayer("PLUGIN_V3", ("HALF", "HALF", "HALF", "FLOAT", "BF16"))},
            "gives /a/plugin_v3 its input 4 in BF16",
        ),
        ({"loop": FakeLayer("RECURRENCE")}, r"makes a layer of kind RECURRENCE \(/a/recurrence\), which nothing"),
        ({"product": FakeLayer("TOPK")}, "makes a layer of kind TOPK"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_differences(changes, message):
    with pytest.raises(EngineError, match=message) as caught:
        check(fakes(**changes), EXPECTED)
    assert "\n" not in str(caught.value)


def test_types_are_not_compared_where_typing_is_weak():
    """The builder of TensorRT 8.6 chooses types; which it may choose is pinned, layer by layer."""
    check(fakes(softmax=FakeLayer("SOFTMAX"), norm=FakeLayer("NORMALIZATION", ("HALF",))), EXPECTED, typed=False)
    with pytest.raises(EngineError, match="NEAREST"):
        check(fakes(sampler=FakeLayer("GRID_SAMPLE", mode="NEAREST")), EXPECTED, typed=False)


# -- what is expected of a graph ------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["native", "plugin"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_what_a_graph_asks_for(tiny_bundle, form, precision):
    original = ir.load(tiny_bundle / "image.onnx")
    count = {op: sum(node.op_type == op for node in original.graph) for op in ("DeformConv", "Softmax", "TopK")}
    group_norms = sum(node.op_type == "InstanceNormalization" for node in original.graph)
    layer_norms = sum(node.op_type == "LayerNormalization" for node in original.graph)
    fusions = sum(node.metadata_props["glip.stage"] == "softmax over locations" for node in original.graph)
    assert min(*count.values(), group_norms, layer_norms, fusions) > 0
    expected = Expected.of(rewrite(original, NEW, precision=precision, form=form, pinned={}))
    native = count["DeformConv"] if form == "native" else 0
    assert expected.samplers == ({"LINEAR, FILL, align_corners 0": native} if native else {})
    assert expected.plugins == (0 if native else 3 * count["DeformConv"] // 13)
    group_norms = group_norms if native else 0  # means and variances in the plugin form
    assert expected.kinds["NORMALIZATION"] == group_norms + layer_norms
    searches = count["TopK"] + 5  # in groups first: twice on two levels, once on one (test_top_k.py)
    assert (expected.kinds["SOFTMAX"], expected.kinds["TOPK"]) == (count["Softmax"], searches)
    if precision == "fp16":  # the islands
        assert expected.single.get("NORMALIZATION", 0) == group_norms
        assert expected.single["SOFTMAX"] == fusions
    else:
        assert expected.single == expected.kinds


@pytest.mark.parametrize("form", ["native", "plugin"])
def test_the_tensors_that_a_graph_has_in_fp32(tiny_bundle, tmp_path, form):
    """Against ONNX's own inference of types, which knows all but what follows a plugin."""
    old, file = Dialect(Flavour.TENSORRT, "8.6.1", 60), tmp_path / "image.onnx"
    rewrite_file(tiny_bundle / "image.onnx", file, old, precision="fp16", form=form, pinned={})
    graph = onnx.shape_inference.infer_shapes(onnx.load(file)).graph
    made = {name for node in graph.node for name in node.output}
    known = {value.name: value.type.tensor_type.elem_type for value in graph.value_info if value.name in made}
    wanted = {name for name, kind in known.items() if kind == onnx.TensorProto.FLOAT}
    found = single_tensors(str(file))
    assert len(wanted) > 300
    assert wanted <= found
    assert not {name for name in found if known.get(name, onnx.TensorProto.FLOAT) != onnx.TensorProto.FLOAT}


# -- a real parser --------------------------------------------------------------------------------------------------


def set_attribute(operator, name, value):
    def change(model):
        node = next(node for node in model.graph if node.op_type == operator)
        node.attributes[name] = ir.Attr(
            name, ir.AttributeType.INT if isinstance(value, int) else ir.AttributeType.STRING, value
        )

    return change


@needs_rtx
@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(set_attribute("GridSample", "mode", "nearest"), "as NEAREST, FILL, align_corners 0", id="mode"),
        pytest.param(
            set_attribute("GridSample", "padding_mode", "border"),
            "as LINEAR, CLAMP, align_corners 0",
            id="padding",
            marks=slow,
        ),
        pytest.param(
            set_attribute("GridSample", "align_corners", 1),
            "as LINEAR, FILL, align_corners 1",
            id="alignment",
            marks=slow,
        ),
    ],
)
def test_a_real_parser_that_understood_something_else(tiny_bundle, tmp_path, change, message):
    """The graph is changed after it was decided what is expected of it: to the builder, the parser misread it."""
    model = rewrite_file(
        tiny_bundle / "image.onnx", tmp_path / "image.onnx", NEW, precision="fp16", form="native", pinned={}
    )
    expected = Expected.of(model)
    ir.external_data.load_to_model(model)
    change(model)
    ir.save(model, tmp_path / "image.onnx", external_data="image.onnx.data")
    job = GraphJob(str(tmp_path / "image.onnx"), str(tmp_path / "image.plan"), (), asdict(expected))
    with (
        Worker(Settings(Flavour.RTX, "fp16", "SM80")) as worker,
        pytest.raises(
            EngineError, match=rf"misread image.onnx: it reads GridSample .* {message}; .*no engine was built"
        ),
    ):
        worker.build(job, lambda fraction, phase: None)
    assert not (tmp_path / "image.plan").exists()


@needs_rtx
def test_layer_norms_that_are_written_out(tiny_bundle, tmp_path):
    """The graph for TensorRT 10.3, read by another parser: nothing in it is unknown or read otherwise."""
    file, old = tmp_path / "image.onnx", Dialect(Flavour.TENSORRT, "10.3.0", 80)
    model = rewrite_file(tiny_bundle / file.name, file, old, precision="fp16", form="native", pinned={})
    assert not any(node.op_type == "LayerNormalization" for node in model.graph)
    with Worker(Settings(Flavour.RTX, "fp16", "SM80")) as worker:
        assert_accepted(worker, file, Expected.of(model))


@needs_rtx
@pytest.mark.parametrize("mode", [pytest.param(mode, marks=slow) for mode in (None, "linear", "bilinear")])
def test_how_tensorrt_rtx_reads_a_mode(tiny_bundle, tmp_path, mode):
    """In a graph of opset 20; without a mode, as graphs are written, every parser reads its default, bilinear."""
    model = rewrite(ir.load(tiny_bundle / "image.onnx"), NEW, precision="fp32", form="native", pinned={})
    expected = Expected.of(model)
    for node in model.graph:
        if node.op_type == "GridSample" and mode is not None:
            node.attributes["mode"] = ir.AttrString("mode", mode)
    ir.save(model, tmp_path / "image.onnx", external_data="image.onnx.data")
    with Worker(Settings(Flavour.RTX, "fp32", "SM80")) as worker:
        assert_accepted(worker, tmp_path / "image.onnx", expected)


@pytest.fixture(scope="module", params=[{"fusion": False}, {"tunable_tokens": 64}], ids=["no fusion", "tuned prompt"])
def other_graphs(request, tiny_graphs, tmp_path_factory):
    """Graphs of another variant: GLIP-T (A) and (B) have no fusion, a prompt-tuned model adds to its text."""
    folder = tmp_path_factory.mktemp("other")
    shutil.copytree(tiny_graphs(**request.param), folder, dirs_exist_ok=True)
    drop_raw_outputs(image_contract(HIDDEN, raw_outputs=True), folder)
    return folder


@needs_rtx
@pytest.mark.parametrize("graph", ["text", "image"])
def test_variants(other_graphs, tmp_path, graph, request):
    """Kinds of layers are listed from what graphs of all variants make."""
    if "tuned prompt-image" in request.node.name and not SLOW:
        pytest.skip("a tuned prompt is in the text graph; GLIP_SLOW=1 reads the image graph of that model too")
    file = tmp_path / f"{graph}.onnx"
    model = rewrite_file(other_graphs / file.name, file, NEW, precision="fp16", form="native", pinned={})
    with Worker(Settings(Flavour.RTX, "fp16", "SM80")) as worker:
        assert_accepted(worker, file, Expected.of(model))


@needs_rtx
@pytest.mark.parametrize("graph", ["backbone", "head"])
def test_the_two_parts_of_the_image_branch(tiny_bundle, tmp_path, graph):
    file = tmp_path / f"{graph}.onnx"
    model = rewrite_file(tiny_bundle / file.name, file, NEW, precision="fp16", form="native", pinned={})
    with Worker(Settings(Flavour.RTX, "fp16", "SM80")) as worker:
        assert_accepted(worker, file, Expected.of(model))


def assert_accepted(worker, file, expected):
    """The network passes; then the builder refuses, because there are no profiles for its dynamic shapes."""
    job = GraphJob(str(file), f"{file}.plan", (), asdict(expected))
    with pytest.raises(EngineError, match="could not build"):
        worker.build(job, lambda fraction, phase: None)
