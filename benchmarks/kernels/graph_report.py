r"""Count what TensorRT-RTX's parser makes of a bundle's image graph in both forms: nodes, layers, launches, bytes.

    python benchmarks/kernels/graph_report.py build/demo/glip_t --output benchmarks/results/glip_t-graph.json

Needs tensorrt-rtx, but no GPU. The graph is rewritten as glip-build does it, for fixed sizes, and parsed; nothing is
built. What is counted is the parsed network, whose tensors all have known shapes and types:

- launches, estimated: one for each layer that computes or moves data, one for each connected group of elementwise
  layers; none for views (slices, reshapes) and for arithmetic on sizes. TensorRT fuses more than that (an elementwise
  group into the product before it, say), and splits some layers; the number compares graphs, it predicts no engine.
  Casts are taken as part of what writes or reads them, and a transpose of the last two axes as the product's that
  alone reads it.
- bytes: what those launches read and write, if each tensor is read once by each and nothing stays in a cache.
- searched: the lengths of all TopK's axes, whose elements TensorRT goes through one after another.

Rows of other sizes and of another --label stay in the file, so that graphs of two versions of the rewriting can be
compared.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
# A PYTHONPATH comes first: it may name another version of the rewriting.
sys.path += [str(ROOT), *(str(ROOT / room) for room in ("export", "engines", "benchmarks"))]

from glip_deploy.bundle.manifest import MANIFEST  # noqa: E402
from glip_deploy.errors import EngineError, GlipError, OptionError  # noqa: E402
from glip_deploy.files import check_file, write_atomically  # noqa: E402

FORMS = ("native", "plugin")
SIZES = {"batch": 1, "height": 800, "width": 1344, "tokens": 16, "classes": 5}
ELEMENTWISE = frozenset({"ACTIVATION", "CAST", "ELEMENTWISE", "IDENTITY", "SCALE", "SELECT", "UNARY"})
VIEWS = frozenset({"SHAPE", "SLICE", "SQUEEZE", "UNSQUEEZE", "CONSTANT", "ASSERTION"})
PLUGINS = frozenset({"PLUGIN", "PLUGIN_V2", "PLUGIN_V3"})
SMALL = 16
"""Integers of at most this many elements are sizes, which are constants where all sizes are fixed."""


@dataclass(frozen=True)
class Tensor:
    """A tensor of a network."""

    name: str
    shape: tuple[int, ...]
    bits: int
    """Of an element."""
    integer: bool

    @property
    def bytes(self) -> int:
        """Size of the whole."""
        return math.prod(self.shape) * self.bits // 8

    @property
    def is_size(self) -> bool:
        """Whether it belongs to the arithmetic on sizes."""
        return self.integer and math.prod(self.shape) <= SMALL


@dataclass(frozen=True)
class Row:
    """A layer of a network."""

    kind: str
    moves: bool
    """Whether a SHUFFLE transposes, and so does not just look at the same memory otherwise."""
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    axis: int = 0
    """Length of the axis that a TOPK searches."""
    turns_last: bool = False
    """Whether a SHUFFLE only exchanges the last two axes."""

    @property
    def is_view(self) -> bool:
        """Whether it computes nothing and moves nothing."""
        return self.kind in VIEWS or (self.kind == "SHUFFLE" and not self.moves)


def summarize(rows: Sequence[Row]) -> dict[str, Any]:
    """Return the figures of a network."""
    kept = [row for row in rows if not all(tensor.is_size for tensor in row.outputs)]
    work = _without_operand_turns(_without_casts([row for row in kept if not row.is_view]))
    groups = _groups([row for row in work if row.kind in ELEMENTWISE])
    launches: list[Sequence[Row]] = [[row] for row in work if row.kind not in ELEMENTWISE] + groups
    kinds: Counter[str] = Counter()
    traffic: Counter[str] = Counter()
    for launch in launches:
        kind = "ELEMENTWISE GROUP" if launch[0].kind in ELEMENTWISE else launch[0].kind
        kinds[kind] += 1
        traffic[kind] += _traffic(launch)
    return {
        "layers": len(rows),
        "layers_without_sizes": len(work),
        "plugin_calls": sum(row.kind in PLUGINS for row in rows),
        "launches": len(launches),
        "launches_by_kind": dict(sorted(kinds.items())),
        "megabytes": round(traffic.total() / 1e6, 1),
        "megabytes_by_kind": {kind: round(size / 1e6, 1) for kind, size in sorted(traffic.items())},
        "searched": sum(row.axis for row in rows),
    }


def _without_casts(rows: Sequence[Row]) -> list[Row]:
    """Let readers of a widened tensor read the narrow one, and the only maker of a narrowed one write that."""
    readers = Counter(tensor.name for row in rows for tensor in row.inputs)
    read: dict[str, Tensor] = {}
    made: dict[str, Tensor] = {}
    for row in rows:
        if row.kind == "CAST":
            source, result = row.inputs[0], row.outputs[0]
            if result.bits >= source.bits:
                read[result.name] = read.get(source.name, source)
            elif readers[source.name] == 1:
                made[source.name] = result

    def ends(tensors: tuple[Tensor, ...], by: dict[str, Tensor]) -> tuple[Tensor, ...]:
        return tuple(by.get(tensor.name, tensor) for tensor in tensors)

    gone = read.keys() | {tensor.name for tensor in made.values()}
    kept = (row for row in rows if not (row.kind == "CAST" and row.outputs[0].name in gone))
    return [replace(row, inputs=ends(row.inputs, read), outputs=ends(row.outputs, made)) for row in kept]


def _without_operand_turns(rows: Sequence[Row]) -> list[Row]:
    """Leave out transposes of the last two axes whose every reader is a product."""
    readers: dict[str, set[str]] = {}
    for row in rows:
        for tensor in row.inputs:
            readers.setdefault(tensor.name, set()).add(row.kind)
    return [
        row
        for row in rows
        if not (row.kind == "SHUFFLE" and row.turns_last and readers.get(row.outputs[0].name) == {"MATRIX_MULTIPLY"})
    ]


def _groups(rows: Sequence[Row]) -> list[Sequence[Row]]:
    """Return connected groups of elementwise layers: what one makes and another of the same size reads."""
    parent = list(range(len(rows)))

    def root(i: int) -> int:
        while parent[i] != i:
            i = parent[i]
        return i

    maker = {tensor.name: i for i, row in enumerate(rows) for tensor in row.outputs}
    for i, row in enumerate(rows):
        for tensor in row.inputs:
            j = maker.get(tensor.name)
            if j is not None and tensor.shape == row.outputs[0].shape:
                parent[root(i)] = root(j)
    found: dict[int, list[Row]] = {}
    for i, row in enumerate(rows):
        found.setdefault(root(i), []).append(row)
    return list(found.values())


def _traffic(launch: Sequence[Row]) -> int:
    """Return the bytes that a launch reads and writes; what stays inside a group is neither."""
    made = {tensor.name: tensor for row in launch for tensor in row.outputs}
    read = {tensor.name: tensor for row in launch for tensor in row.inputs}
    inside = made.keys() & read.keys() if len(launch) > 1 else set()
    return sum(t.bytes for name, t in {**made, **read}.items() if name not in inside)


# -- a network ------------------------------------------------------------------------------------------------------


def parse(onnx: Path, plugin: str | None) -> list[Row]:
    """Return the layers that TensorRT-RTX's parser makes; call it in a process of its own."""
    trt: Any = import_module("tensorrt_rtx")
    log = trt.Logger(trt.Logger.ERROR)
    if plugin:
        trt.init_libnvinfer_plugins(log, "")
        trt.get_plugin_registry().load_library(plugin)
    builder = trt.Builder(log)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(onnx)):
        raise EngineError(f"tensorrt_rtx refuses {onnx.name}: {parser.get_error(0).desc()}")
    return [_row(trt, network.get_layer(i)) for i in range(network.num_layers)]


def _row(trt: Any, layer: Any) -> Row:
    def tensor(value: Any) -> Tensor:
        shape = tuple(int(side) for side in value.shape)
        if min(shape, default=0) < 0:
            raise EngineError(f"{value.name} has no known shape; fix every size")
        kind = value.dtype.name
        return Tensor(value.name, shape, 8 * value.dtype.itemsize if kind != "BOOL" else 8, kind.startswith("INT"))

    inputs = (layer.get_input(i) for i in range(layer.num_inputs))
    read = tuple(tensor(value) for value in inputs if value is not None)
    made = tuple(tensor(layer.get_output(i)) for i in range(layer.num_outputs))
    kind, moves, axis, turns_last = layer.type.name, False, 0, False
    if kind == "SHUFFLE":
        layer.__class__ = trt.IShuffleLayer
        orders = [_order(order, len(read[0].shape)) for order in (layer.first_transpose, layer.second_transpose)]
        turns = [order for order in orders if list(order) != sorted(order)]
        moves = bool(turns)
        last = (*range(len(read[0].shape) - 2), len(read[0].shape) - 1, len(read[0].shape) - 2)
        turns_last = turns == [last] and sorted(made[0].shape) == sorted(read[0].shape)
    elif kind == "TOPK":
        layer.__class__ = trt.ITopKLayer
        axis = read[0].shape[int(layer.axes).bit_length() - 1]
    return Row(kind, moves, read, made, axis, turns_last)


def _order(order: Any, rank: int) -> tuple[int, ...]:
    """Return a permutation's places, as many as there are axes."""
    return tuple(int(order[i]) for i in range(rank))


# -- the program ----------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; return its exit status."""
    given = list(sys.argv[1:] if argv is None else argv)
    if given[:1] == ["--parse"]:  # the process that `report` starts
        print(json.dumps(summarize(parse(Path(given[1]), given[2] if len(given) > 2 else None))))
        return 0
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, metavar="BUNDLE")
    parser.add_argument("--output", type=Path, required=True, metavar="JSON")
    parser.add_argument("--label", default="now", help="name of the rows, which replace those of that name (now)")
    parser.add_argument("--precision", default="fp16", choices=("fp32", "fp16", "bf16"))
    for name, size in SIZES.items():
        parser.add_argument(f"--{name}", type=int, default=size, metavar="N", help=f"default {size}")
    args = parser.parse_args(given)
    sizes = {name: getattr(args, name) for name in SIZES}
    try:
        result = _open(args.output, args.bundle, args.precision)
        for form in FORMS:
            key = f"{form}, {args.height}x{args.width}, {args.tokens} tokens, {args.classes} classes, {args.label}"
            result["graphs"][key] = row = report(args.bundle, form, args.precision, sizes)
            write_atomically(args.output, json.dumps(result, indent=1) + "\n")
            print(f"{key}: {row}", flush=True)
    except GlipError as error:
        print(f"graph_report.py: error: {error}", file=sys.stderr)
        return 1
    print(as_table(result))
    return 0


def _open(output: Path, bundle: Path, precision: str) -> dict[str, Any]:
    check_file(output)
    if not (bundle / MANIFEST).is_file():
        raise OptionError(f"{bundle} is not a bundle; make one with glip-export")
    header = {"bundle": bundle.name, "precision": precision}
    if output.exists():
        try:
            known = json.loads(output.read_text(encoding="utf-8"))
            same = {name: known[name] for name in header} == header and isinstance(known["graphs"], dict)
        except (ValueError, KeyError, TypeError):
            same = False
        if not same:
            raise OptionError(f"{output} is no report about this bundle in this precision; name another --output")
        return dict(known)
    return {"schema": 1, "kind": "graph", **header, "graphs": {}}


def report(bundle: Path, form: str, precision: str, sizes: dict[str, int]) -> dict[str, Any]:
    """Rewrite a bundle's image graph and return the figures of what the parser makes of it.

    Raises:
        GlipError: no TensorRT-RTX or no compiler, or the parser refused.
    """
    from glip_engines.compile import build_library
    from glip_engines.flavours import Dialect, Flavour, choose_flavour, library_folder
    from glip_engines.rewriting import rewrite_file

    choose_flavour(Flavour.RTX)
    version = str(import_module("tensorrt_rtx").__version__)
    dialect = Dialect(Flavour.RTX, version, 80)
    library = build_library([80], tensorrt=dialect) if form == "plugin" else None
    with tempfile.TemporaryDirectory(prefix="glip-graph-") as folder:
        onnx = Path(folder) / "image.onnx"
        model = rewrite_file(bundle / "image.onnx", onnx, dialect, precision=precision, form=form, pinned=sizes)
        nodes = len(list(model.graph))
        del model
        libraries = library_folder(Flavour.RTX)
        if libraries is not None:  # its parser opens this name once a plugin is loaded, and the wheel lacks it
            for file in libraries.glob("libtensorrt_rtx.so.*"):
                (Path(folder) / "libtensorrt_rtx.so").symlink_to(file.resolve())
        paths = [folder, *([str(libraries)] if libraries is not None else [])]
        done = subprocess.run(
            [sys.executable, __file__, "--parse", str(onnx), *([] if library is None else [str(library)])],
            env={**os.environ, "LD_LIBRARY_PATH": os.pathsep.join([*paths, os.environ.get("LD_LIBRARY_PATH", "")])},
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode:
        raise EngineError(f"the {form} graph could not be parsed: {done.stderr.strip().splitlines()[-1:]}")
    return {"tensorrt_rtx": version, "sizes": sizes, "nodes": nodes, **json.loads(done.stdout.splitlines()[-1])}


def as_table(result: dict[str, Any]) -> str:
    """Return the report for a terminal."""
    columns = ("nodes", "layers", "layers_without_sizes", "plugin_calls", "launches", "megabytes", "searched")
    lines = [f"{'':<56}" + "".join(f"{name:>22}" for name in columns)]
    for name, row in result["graphs"].items():
        lines.append(f"{name:<56}" + "".join(f"{row[column]:>22,}" for column in columns))
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
