"""Engines that TensorRT-RTX builds with the plugin, one node at a time."""

from __future__ import annotations

import ctypes

import pytest
from engine_needs import needs_rtx, skip_without
from glip_engines.compile import build_library
from glip_engines.compilers import find_host_compiler, find_nvcc, find_tensorrt_headers
from glip_engines.flavours import Dialect, Flavour
from glip_engines.rewriting.deformable import pack_weights
from glip_engines.trt import GraphJob, Settings
from glip_engines.worker import Worker

from glip_deploy.errors import EngineError

GOOD = {"kernel_shape": [3, 3], "out_channels": 24, "pads": [1, 1, 1, 1], "strides": [1, 1]}


@pytest.fixture(scope="module")
def plugin(compiled_plugins):
    """The IPluginV3 library, for the architecture that test_builder.py also builds it for: no kernel runs here."""
    skip_without(find_nvcc, find_tensorrt_headers, find_host_compiler)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLIP_DEPLOY_CACHE", str(compiled_plugins))
        return build_library([120], tensorrt=Dialect(Flavour.RTX, "1.7", 120))


def test_exports(plugin):
    library = ctypes.CDLL(str(plugin))
    for name in ("getCreators", "setLoggerFinder", "glip_deform_launch"):
        assert getattr(library, name)
    count = ctypes.c_int32()
    library.getCreators.restype = ctypes.POINTER(ctypes.c_void_p)
    assert library.getCreators(ctypes.byref(count))[0]
    assert count.value == 1


FOUND = {"plugin_namespace": "glip", "plugin_version": "3"}


def one_node(path, attributes, data="fp16", channels=(32, 24), maps=27, levels=2, domain="glip", positions="fp32"):
    """A graph of one node whose levels are each half as large as the one before it, every size dynamic.

    Returns the profile: two levels are (8, 8) and (4, 4) at least.
    """
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper, save

    kinds = {"fp16": (TensorProto.FLOAT16, np.float16), "fp32": (TensorProto.FLOAT, np.float32)}
    kind, array = kinds[data]
    names = [f"p{i}" for i in range(levels)]
    node = helper.make_node(
        "ModulatedDeformConv", ["x", "w", "b", *names], ["y0"], domain=domain, name="dcn", **FOUND, **attributes
    )
    x = helper.make_tensor_value_info("x0", kind, [1, "locations", channels[0]])
    used = [
        helper.make_tensor_value_info(name, kinds[positions][0], [1, maps, f"height_{name}", f"width_{name}"])
        for name in names
    ]
    y = helper.make_tensor_value_info("y", kind, [1, "results", channels[1]])
    weights = [
        numpy_helper.from_array(pack_weights(np.ones((channels[1], channels[0], 3, 3), array)), "w"),
        numpy_helper.from_array(np.ones(channels[1], array), "b"),
    ]
    around = [helper.make_node("Relu", ["x0"], ["x"]), node, helper.make_node("Relu", ["y0"], ["y"])]
    graph = helper.make_graph(around, "one", [x, *used], [y], weights)
    opsets = [helper.make_opsetid("", 19), helper.make_opsetid("glip", 3)]
    save(helper.make_model(graph, opset_imports=opsets, ir_version=9), path)
    largest = ((8, 8), (32, 24), (96, 96))
    sizes = [[(side[0] >> i, side[1] >> i) for i in range(levels)] for side in largest]
    profile = {"x0": tuple((1, sum(h * w for h, w in row), channels[0]) for row in sizes)}
    return profile | {name: tuple((1, maps, *row[i]) for row in sizes) for i, name in enumerate(names)}


def build_engine(plugin, folder, **node):
    profile = one_node(folder / "one.onnx", node.pop("attributes", GOOD), **node)
    with Worker(Settings(Flavour.RTX, node.get("data", "fp16"), "SM80")) as worker:
        worker.load_plugin(plugin)
        job = GraphJob(str(folder / "one.onnx"), str(folder / "one.plan"), (profile,))
        return worker.build(job, lambda fraction, phase: None)


@needs_rtx
@pytest.mark.parametrize(
    "node",
    [
        {},
        {"data": "fp32"},
        {"levels": 1},
        {"levels": 5, "attributes": {**GOOD, "reads": 1}},
        {"levels": 3, "attributes": {**GOOD, "reads": -1, "strides": [2, 2]}},
        {"channels": (40, 72), "attributes": {**GOOD, "out_channels": 72}},
        {"domain": ""},  # TensorRT 8.6 and 10.0 to 10.9 look a plugin up by its attributes
        {"attributes": {**GOOD, "dilations": [1, 1], "group": 1, "offset_group": 1}},
    ],
    ids=str,
)
def test_tensorrt_builds_engines_with_the_plugin(plugin, tmp_path, node):
    built = build_engine(plugin, tmp_path, **node)
    assert built.outputs[0].shape == (1, -1, node.get("channels", (32, 24))[1])
    assert built.outputs[0].dtype == {"fp32": "float32"}.get(node.get("data"), "float16")
    assert b"ModulatedDeformConv" in (tmp_path / "one.plan").read_bytes()


@needs_rtx
@pytest.mark.parametrize(
    "node",
    [
        {"attributes": {**GOOD, "group": 2}},
        {"attributes": {**GOOD, "offset_group": 2}},
        {"attributes": {**GOOD, "kernel_shape": [5, 5]}},
        {"attributes": {**GOOD, "kernel_shape": [1, 3]}},
        {"attributes": {**GOOD, "out_channels": 72}},
        {"attributes": {**GOOD, "out_channels": 20}},
        {"attributes": {**GOOD, "reads": 2}},
        {"attributes": {"kernel_shape": [3, 3]}},
        {"attributes": {"out_channels": 24}},
        {"attributes": {**GOOD, "strides": [0, 1]}},
        {"attributes": {**GOOD, "pads": [1, 1, -1, 1]}},
        {"channels": (36, 24)},
        {"maps": 18},
        {"levels": 1, "attributes": {**GOOD, "reads": 1}},
        {"positions": "fp16"},
    ],
    ids=str,
)
def test_tensorrt_refuses_what_the_plugin_does_not_support(plugin, tmp_path, node):
    with pytest.raises(EngineError):
        build_engine(plugin, tmp_path, **node)
