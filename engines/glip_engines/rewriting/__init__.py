"""A bundle's portable graph as a version of TensorRT can read it and computes it well.

The bundle stays standard ONNX. `rewrite` puts a graph into a precision (`glip_export.precision`), expresses deformable
convolution by the plugin's operator (channels_last.py) or by TensorRT's own (sampling.py), avoids what a parser does
not know (parsers.py), and computes long products and the best candidates side by side (products.py, top_k.py). edit.py
has the small steps these are made of.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from glip_deploy.errors import BundleError
from glip_engines.rewriting.channels_last import use_plugin
from glip_engines.rewriting.parsers import for_parser
from glip_engines.rewriting.products import over_locations_in_parts, products_as_sums
from glip_engines.rewriting.sampling import use_native_ops
from glip_engines.rewriting.top_k import top_k_in_groups

if TYPE_CHECKING:
    import onnx_ir

    from glip_engines.flavours import Dialect

__all__ = ["rewrite", "rewrite_file"]


def rewrite(
    model: onnx_ir.Model, dialect: Dialect, *, precision: str, form: str, pinned: Mapping[str, int]
) -> onnx_ir.Model:
    """Return a graph as an engine is built from it; the argument is changed and must not be used again.

    Args:
        model: a text or image graph of a bundle.
        dialect: the TensorRT that will read it, and its target.
        precision: what to lower an fp32 graph to; "fp32" leaves the types as they are.
        form: of the deformable convolution, "native" or "plugin".
        pinned: named axes of the inputs that have one size, with that size.

    Raises:
        BundleError: a node that engines are not built with.
    """
    import onnx_ir
    from glip_export.precision import to_precision
    from glip_export.stages import stamp

    def size(side: int | onnx_ir.SymbolicDim) -> int | str | None:
        if isinstance(side, int):
            return side
        return pinned.get(side.value, side.value) if side.value is not None else None

    for value in model.graph.inputs:
        value.shape = onnx_ir.Shape([size(side) for side in value.shape or ()])
    model = to_precision(stamp(model), precision)
    model = use_plugin(model) if form == "plugin" else use_native_ops(model)
    model = for_parser(model, dialect)
    if dialect.multiplies_half_only:
        model = products_as_sums(model)
    model = top_k_in_groups(over_locations_in_parts(model))
    return model


def rewrite_file(
    source: Path, target: Path, dialect: Dialect, *, precision: str, form: str, pinned: Mapping[str, int]
) -> onnx_ir.Model:
    """Read a graph, `rewrite` it, and write it with its weights in one file beside it ("image.onnx.data").

    Raises:
        BundleError: a node that engines are not built with, or weights that the ONNX library does not read.
        OSError: the graph cannot be read or written.
    """
    import onnx_ir

    try:
        model = rewrite(onnx_ir.load(source), dialect, precision=precision, form=form, pinned=pinned)
        onnx_ir.save(model, target, external_data=f"{target.name}.data", size_threshold_bytes=1024)
    except ValueError as error:
        if "hard link" not in str(error):
            raise
        raise BundleError(
            f"the weights of {source.name} have more than one hard link, and the ONNX library reads no such file;"
            " copy the bundle (cp -r) and use the copy"
        ) from None
    return model
