"""Graphs with the plugin's nodes, executed: the nodes by the plugin's own code on a CPU, the rest by ONNX Runtime."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from glip_engines.compile import plugin_sources
from glip_engines.compilers import cuda_headers, find_host_compiler, find_tensorrt_headers
from glip_engines.rewriting.deformable import PLUGIN_DOMAIN
from glip_export.model.deform import deform_conv2d, flat_read
from numpy.typing import NDArray
from onnx_ir.passes import common
from tiny_glip import HIDDEN

from glip_deploy.backends.onnxruntime import open_session

Array = NDArray[Any]
Compute = Callable[[ir.Node, list[Array]], Array]


def plugin_nodes(model: ir.Model) -> list[Any]:
    return [node for node in model.graph if node.domain == PLUGIN_DOMAIN]


def feeds_for(size: tuple[int, int], batch: int = 1) -> dict[str, Array]:
    """Inputs of the tiny image graph: pictures of this height and width, three classes of two tokens each."""
    rng = np.random.default_rng(7)
    embedding = rng.normal(size=(batch, 6, HIDDEN)).astype(np.float32)
    embedding[-1] *= 0.5  # pictures that differ, so that mixing them shows
    return {
        "frames": rng.integers(0, 256, (batch, *size, 3), dtype=np.uint8),
        "image_sizes": np.array([[size[0] - 3, size[1] - 5]] * batch),
        "text_embedding": embedding,
        "text_mask": np.ones((batch, 6), np.int64),
        "class_map": np.repeat(np.eye(3, dtype=np.float32), 2, axis=1)[None].repeat(batch, 0) / 2,
    }


def integers(node: ir.Node) -> dict[str, Any]:
    """The attributes of a plugin node, without those by which parsers look it up."""
    return {name: a.value for name, a in node.attributes.items() if not name.startswith("plugin_")}


def build_harness(folder: Path) -> ctypes.CDLL:
    """Compile glip_engines/plugin_harness.cpp."""
    command = [str(find_host_compiler()), "-std=c++17", "-O2", "-fPIC", "-shared", "-fvisibility=hidden"]
    includes = [find_tensorrt_headers(), cuda_headers()]
    source = Path(__file__).with_name("glip_engines") / "plugin_harness.cpp"
    command += [f"-I{plugin_sources()}", *(word for path in includes for word in ("-isystem", str(path)))]
    library = folder / "libharness.so"
    done = subprocess.run(
        [*command, "-o", str(library), str(source), "-ldl"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    loaded = ctypes.CDLL(str(library))
    loaded.harness_create.restype = ctypes.c_void_p
    loaded.harness_timing_id.restype = ctypes.c_char_p
    return loaded


class Plugin:
    """One plugin of the harness, with the integer attributes of a node."""

    def __init__(self, harness: ctypes.CDLL, **attributes: Any) -> None:
        self.harness = harness
        names = [name.encode() for name in attributes]
        arrays = [np.atleast_1d(np.asarray(value, np.int64)) for value in attributes.values()]
        self.pointer = ctypes.c_void_p(
            harness.harness_create(
                len(names),
                (ctypes.c_char_p * len(names))(*names),
                (ctypes.c_void_p * len(names))(*(array.ctypes.data for array in arrays)),
                (ctypes.c_int * len(names))(*(array.size for array in arrays)),
            )
        )

    def __del__(self) -> None:
        self.harness.harness_destroy(self.pointer)

    def accepts(self, types: Sequence[int], formats: Sequence[int], position: int) -> bool:
        """Return whether a tensor may have its type and format, given those before it."""
        count = len(types)
        pointers = ((ctypes.c_int * count)(*types), (ctypes.c_int * count)(*formats))
        return bool(self.harness.harness_accepts(self.pointer, position, count - 1, *pointers))

    def run(self, inputs: Sequence[Array], shape: Sequence[int]) -> tuple[int, Array]:
        """Return the status and the fp32 result of a shape."""
        inputs = [np.ascontiguousarray(array, np.float32) for array in inputs]
        result = np.full(shape, np.nan, np.float32)
        dims = [np.asarray(array.shape, np.int64) for array in (*inputs, result)]
        status = self.harness.harness_run(
            self.pointer,
            len(inputs),
            (ctypes.c_int * len(dims))(*(len(sides) for sides in dims)),
            (ctypes.c_void_p * len(dims))(*(sides.ctypes.data for sides in dims)),
            (ctypes.c_void_p * len(inputs))(*(array.ctypes.data for array in inputs)),
            ctypes.c_void_p(result.ctypes.data),
        )
        return status, result


def by_plugin(harness: ctypes.CDLL) -> Compute:
    """Compute nodes by the harness, in fp32."""

    def compute(node: ir.Node, inputs: list[Array]) -> Array:
        attributes = integers(node)
        status, result = Plugin(harness, **attributes).run(inputs, expected_shape(inputs, **attributes))
        assert status == 0
        return result.astype(inputs[0].dtype)

    return compute


def expected_shape(inputs: list[Array], *, out_channels: int, reads: int = 0, **rest: Any) -> tuple[int, ...]:
    """The shape of a node's output."""
    x, largest = inputs[0], inputs[3]
    return x.shape[0], x.shape[1] - (largest.shape[2] * largest.shape[3] if reads else 0), out_channels


def by_torch(
    inputs: list[Array],
    *,
    kernel_shape: Sequence[int],
    out_channels: int,
    reads: int = 0,
    strides: Sequence[int] = (1, 1),
    **rest: Any,
) -> Array:
    """What a node computes, by the exporter's own deformable convolution, level by level."""
    x, weight, bias, *maps = (torch.from_numpy(np.array(array, np.float32)) for array in inputs)
    channels, taps = x.shape[2], len(weight)
    weight = weight[:, :channels, :out_channels].permute(2, 1, 0).reshape(out_channels, channels, *kernel_shape)
    sizes = [tuple(positions.shape[2:]) for positions in maps]
    levels: Sequence[torch.Tensor] = torch.split(x, [height * width for height, width in sizes], dim=1)
    results = []
    for i, positions in enumerate(maps):
        if not 0 <= i + reads < len(maps):
            continue
        height, width = sizes[max(i, i + reads)]
        offset = flat_read(positions[:, : 2 * taps], height, width)
        mask = flat_read(positions[:, 2 * taps :].sigmoid(), height, width)
        source = levels[i + reads].transpose(1, 2).reshape(-1, channels, *sizes[i + reads])
        result = deform_conv2d(source, offset, mask, weight, bias, strides[0])
        results.append(result.flatten(2).transpose(1, 2))
    joined: Array = torch.cat(results, dim=1).numpy()
    return joined


def run_with_plugin(model: Any, feeds: Mapping[str, Array], compute: Compute) -> list[Array]:
    """Return the graph's outputs; `compute` makes the output of a plugin node from the node and its inputs.

    The graph is run in as many parts as plugin nodes follow one another.
    """
    known: dict[str, Array] = dict(feeds)
    constants = {name: value.const_value.numpy() for name, value in model.graph.initializers.items()}
    waiting = plugin_nodes(model)
    while waiting:
        depth = _depths(model, {node.outputs[0].name for node in plugin_nodes(model)} - set(known))
        ready = [node for node in waiting if all(not depth.get(v.name) for v in node.inputs)]
        assert ready, "plugin nodes wait for each other"
        names = list({v.name for node in ready for v in node.inputs if v.name not in constants})
        known.update(zip(names, _run_part(model, known, names), strict=True))
        for node in ready:
            result = compute(node, [known[v.name] if v.name in known else constants[v.name] for v in node.inputs])
            known[node.outputs[0].name] = result
        waiting = [node for node in waiting if node not in ready]
    return _run_part(model, known, [value.name for value in model.graph.outputs])


def _depths(model: Any, open_ends: set[str]) -> dict[str, int]:
    """By value, 1 where it depends on one of these."""
    found: dict[str, int] = {}
    for node in model.graph:
        depends = any(v is not None and (found.get(v.name) or v.name in open_ends) for v in node.inputs)
        for value in node.outputs:
            found[value.name] = int(depends or value.name in open_ends)
    return found


def _run_part(model: ir.Model, known: Mapping[str, Array], names: list[str]) -> list[Array]:
    """Compute some values of a graph from others, which are known."""
    part = model.clone()
    values = {v.name: v for v in part.graph.inputs} | {v.name: v for node in part.graph for v in node.outputs}
    for name, array in known.items():
        value = values[name]
        if value.producer() is None:
            continue
        given = ir.Value(name=f"{name}_known", type=ir.TensorType(ir.tensor(array).dtype), shape=ir.Shape(array.shape))
        for user, index in list(value.uses()):
            user.replace_input_with(index, given)
        part.graph.inputs.append(given)
        values[name] = given
    part.graph.outputs.clear()
    part.graph.outputs.extend(values[name] for name in names if values[name].producer() is not None)
    part = common.RemoveUnusedNodesPass()(part).model
    left = [node.name for node in plugin_nodes(part)]
    assert not left, left
    session = open_session(ir.serde.serialize_model(part).SerializeToString(), threads=1)
    wanted = {item.name for item in session.get_inputs()}
    feeds = {name: known[name.removesuffix("_known")] for name in wanted}
    found = iter(session.run(None, feeds))
    return [np.asarray(next(found)) if values[name].producer() is not None else known[name] for name in names]
