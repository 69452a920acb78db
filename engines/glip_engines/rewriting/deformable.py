"""The standard `DeformConv` of a bundle's graph, and how the plugin's kernels want its weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from glip_deploy.errors import BundleError
from glip_deploy.frames.geometry import ceil_to
from glip_engines.rewriting.edit import before_widening

if TYPE_CHECKING:
    import onnx_ir
    from numpy.typing import NDArray

__all__ = [
    "PLUGIN_DOMAIN",
    "PLUGIN_OPERATOR",
    "PLUGIN_VERSION",
    "Deformable",
    "deformable_nodes",
    "pack_weights",
]

PLUGIN_DOMAIN = "glip"
PLUGIN_OPERATOR = "ModulatedDeformConv"
PLUGIN_VERSION = 3
_CHANNEL_STEP, _OUTPUT_STEP = 32, 64
"""What packed weights pad their input and output channels to; kChannelStep and kOutputStep of plugin/deform_math.h."""


@dataclass(frozen=True)
class Deformable:
    """The parts of a standard `DeformConv` node."""

    x: onnx_ir.Value
    weight: onnx_ir.Value
    offset: onnx_ir.Value
    bias: onnx_ir.Value | None
    mask: onnx_ir.Value | None
    dtype: onnx_ir.DataType
    """Of the node as the graph has it."""
    data: onnx_ir.DataType
    """Of `x` and `weight`, before a graph in half precision widened them for this node."""
    kernel: tuple[int, int]
    strides: tuple[int, ...]
    pads: tuple[int, ...]
    dilations: tuple[int, ...]

    @property
    def attributes(self) -> tuple[tuple[int, ...], ...]:
        """Kernel, strides, pads and dilations."""
        return self.kernel, self.strides, self.pads, self.dilations

    @property
    def taps(self) -> int:
        """Number of positions the kernel reads."""
        return self.kernel[0] * self.kernel[1]

    @classmethod
    def of(cls, node: onnx_ir.Node) -> Deformable:
        """Read the parts of a node.

        Raises:
            BundleError: an attribute that engines are not built with.
        """
        import onnx_ir

        x, weight, offset, bias, mask = [*node.inputs, None, None][:5]
        assert x is not None
        assert weight is not None
        assert offset is not None

        def attribute(name: str, default: Sequence[int]) -> tuple[int, ...]:
            given = node.attributes.get(name)
            return tuple(default if given is None else given.as_ints())

        for name in ("group", "offset_group"):
            given = node.attributes.get(name)
            if given is not None and given.as_int() != 1:
                raise BundleError(
                    f"DeformConv {node.name}: {name} is {given.as_int()}, an engine takes 1 only;"
                    " export the bundle with glip-export"
                )
        sides = () if weight.shape is None else weight.shape[2:]
        kernel = attribute("kernel_shape", [side for side in sides if isinstance(side, int)])
        if len(kernel) != 2:
            raise BundleError(
                f"DeformConv {node.name}: kernel_shape is {list(kernel)}, an engine takes two known sides;"
                " export the bundle with glip-export"
            )
        dtype = x.dtype or onnx_ir.DataType.FLOAT
        data = dtype
        narrow_x, narrow_weight = before_widening(x), before_widening(weight)
        if narrow_x.dtype is not None and narrow_x.dtype == narrow_weight.dtype:
            x, weight, data = narrow_x, narrow_weight, narrow_x.dtype
        return cls(
            x,
            weight,
            offset,
            bias,
            mask,
            dtype,
            data,
            (kernel[0], kernel[1]),
            attribute("strides", (1, 1)),
            attribute("pads", (0, 0, 0, 0)),
            attribute("dilations", (1, 1)),
        )


def deformable_nodes(model: onnx_ir.Model) -> list[onnx_ir.Node]:
    """Return the standard `DeformConv` nodes of a graph, in its order."""
    return [node for node in model.graph if node.op_type == "DeformConv" and node.domain == ""]


def pack_weights(weight: NDArray[Any]) -> NDArray[Any]:
    """Return (O, I, h, w) weights as the kernels read them: (h * w, I, O), channels padded with zeros.

    The same as `glip_deform_pack_weights` of plugin/glip_deform.h.
    """
    out, channels, height, width = weight.shape
    packed = np.zeros((height * width, ceil_to(channels, _CHANNEL_STEP), ceil_to(out, _OUTPUT_STEP)), weight.dtype)
    packed[:, :channels, :out] = weight.reshape(out, channels, -1).transpose(2, 1, 0)
    return packed
