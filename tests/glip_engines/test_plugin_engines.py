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
def plugin(tmp_path_factory):
    """The IPluginV3 library, for one architecture."""
    skip_without(find_nvcc, find_tensorrt_headers, find_host_compiler)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLIP_DEPLOY_CACHE", str(tmp_path_factory.mktemp("plugin")))
        return build_library([80], tensorrt=Dialect(Flavour.RTX, "1.7", 80))


def test_exports(plugin):
    library = ctypes.CDLL(str(plugin))
    for name in ("getCreators", "setLoggerFinder", "glip_deform_launch"):
        assert getattr(library, name)
    count = ctypes.c_int32()
    library.getCreators.restype = ctypes.POINTER(ctypes.c_void_p)
    assert library.getCreators(ctypes.byref(count))[0]
    assert count.value == 1


FOUND = {"plugin_namespace": "glip", "plugin_version": "2"}


def one_node(path, attributes, data="fp16", channels=(32, 24), offsets=18, inputs="xwobm", domain="glip"):
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper, save

    kind, array = {"fp16": (TensorProto.FLOAT16, np.float16), "fp32": (TensorProto.FLOAT, np.float32)}[data]
    node = helper.make_node(
        "ModulatedDeformConv", list(inputs), ["y0"], domain=domain, name="dcn", **FOUND, **attributes
    )
    sides = ["height", "width"]
    values = [
        helper.make_tensor_value_info(name, of, [1, size, *sides])
        for name, of, size in (
            ("x0", kind, channels[0]),
            ("o", TensorProto.FLOAT, offsets),
            ("m", TensorProto.FLOAT, 9),
            ("y", kind, channels[1]),
        )
    ]
    weights = [
        numpy_helper.from_array(pack_weights(np.ones((channels[1], channels[0], 3, 3), array)), "w"),
        numpy_helper.from_array(np.ones(channels[1], array), "b"),
    ]
    around = [helper.make_node("Relu", ["x0"], ["x"]), node, helper.make_node("Relu", ["y0"], ["y"])]
    used = [value for value in values[:3] if value.name == "x0" or value.name in inputs]
    graph = helper.make_graph(around, "one", used, values[3:], [w for w in weights if w.name in inputs])
    opsets = [helper.make_opsetid("", 19), helper.make_opsetid("glip", 2)]
    save(helper.make_model(graph, opset_imports=opsets, ir_version=9), path)
    return {
        value.name: tuple(
            (1, value.type.tensor_type.shape.dim[1].dim_value, *hw) for hw in ((8, 8), (20, 24), (99, 99))
        )
        for value in used
    }


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
        {"attributes": {"kernel_shape": [3, 3], "out_channels": 24}},
        {"inputs": "xwo"},
        {"inputs": "xwob"},
        {"channels": (12, 10), "attributes": {**GOOD, "out_channels": 10}},
        {"domain": ""},  # TensorRT 8.6 and 10.0 to 10.9 look a plugin up by its attributes
        {"attributes": {**GOOD, "strides": [2, 2], "dilations": [1, 1], "group": 1, "offset_group": 1}},
    ],
    ids=str,
)
def test_tensorrt_builds_engines_with_the_plugin(plugin, tmp_path, node):
    built = build_engine(plugin, tmp_path, **node)
    assert built.outputs[0].shape == (1, node.get("channels", (32, 24))[1], -1, -1)
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
        {"attributes": {**GOOD, "out_channels": 65}},
        {"attributes": {"kernel_shape": [3, 3]}},
        {"attributes": {"out_channels": 24}},
        {"attributes": {**GOOD, "strides": [0, 1]}},
        {"attributes": {**GOOD, "pads": [1, 1, -1, 1]}},
        {"offsets": 20},
    ],
    ids=str,
)
def test_tensorrt_refuses_what_the_plugin_does_not_support(plugin, tmp_path, node):
    with pytest.raises(EngineError):
        build_engine(plugin, tmp_path, **node)
