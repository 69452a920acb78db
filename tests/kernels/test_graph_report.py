"""What is counted of a parsed network, and the program around it."""

from __future__ import annotations

import json

from engine_needs import needs_rtx
from kernels import graph_report
from kernels.graph_report import Row, Tensor, summarize


def half(name, *shape):
    return Tensor(name, shape, 16, integer=False)


def single(name, *shape):
    return Tensor(name, shape, 32, integer=False)


def size(name):
    return Tensor(name, (2,), 64, integer=True)


def row(kind, inputs, outputs, **more):
    return Row(kind, more.pop("moves", False), tuple(inputs), tuple(outputs), **more)


def test_elementwise_layers_that_follow_one_another_are_one_launch():
    a, b, c, d = (half(name, 10, 100) for name in "abcd")
    found = summarize([row("ELEMENTWISE", [a, a], [b]), row("ACTIVATION", [b], [c]), row("ELEMENTWISE", [c, a], [d])])
    assert (found["layers"], found["launches"]) == (3, 1)
    assert found["megabytes"] == round(2 * 2000 / 1e6, 1)  # a is read and d written, once each
    apart = summarize([row("ELEMENTWISE", [a, a], [b]), row("SOFTMAX", [b], [c]), row("UNARY", [c], [d])])
    assert apart["launches"] == 3
    assert apart["launches_by_kind"] == {"ELEMENTWISE GROUP": 2, "SOFTMAX": 1}


def test_bytes_are_those_of_launches():
    x, w, y = half("x", 1000, 1000), half("w", 1000, 1000), half("y", 1000, 1000)
    assert summarize([row("MATRIX_MULTIPLY", [x, w], [y])])["megabytes"] == 6.0
    wide, result = single("wide", 1000, 1000), single("result", 1000, 1000)
    casts = [
        row("CAST", [x], [wide]),  # read as the product reads it: as x
        row("MATRIX_MULTIPLY", [wide, w], [result]),
        row("CAST", [result], [y]),  # written as the product writes it: as y
    ]
    assert (summarize(casts)["launches"], summarize(casts)["megabytes"]) == (1, 6.0)
    other = row("SOFTMAX", [result], [single("other", 1000, 1000)])  # which wants the wide one: then both are written
    assert summarize([*casts, other])["launches"] == 3


def test_views_sizes_and_turned_operands_are_no_launches():
    x, y, z = half("x", 30, 20), half("y", 20, 30), half("z", 30, 30)
    rows = [
        row("SHAPE", [x], [size("s")]),
        row("ELEMENTWISE", [size("s"), size("s")], [size("t")]),
        row("SLICE", [x], [half("part", 10, 20)]),
        row("SHUFFLE", [x], [half("flat", 600)]),
        row("SHUFFLE", [x], [y], moves=True, turns_last=True),
        row("MATRIX_MULTIPLY", [x, y], [z]),
    ]
    assert summarize(rows)["launches"] == 1
    assert summarize([*rows, row("UNARY", [y], [half("u", 20, 30)])])["launches"] == 3  # the turned one is read


def test_plugins_and_searches():
    x, y = half("x", 100), half("y", 100)
    places = Tensor("i", (100,), 32, integer=True)
    rows = [row("PLUGIN_V3", [x], [y]), row("TOPK", [y], [half("v", 100), places], axis=70)]
    found = summarize(rows)
    assert (found["plugin_calls"], found["searched"], found["launches"]) == (1, 70, 2)


def test_refusals(tiny_bundle, tmp_path, capsys):
    output = tmp_path / "report.json"
    assert graph_report.main([str(tmp_path), "--output", str(output)]) == 1
    assert "is not a bundle; make one with glip-export" in capsys.readouterr().err
    output.write_text("[]")
    assert graph_report.main([str(tiny_bundle), "--output", str(output)]) == 1
    assert "is no report about this bundle in this precision" in capsys.readouterr().err


@needs_rtx
def test_a_real_parser(tiny_bundle, tmp_path, capsys, monkeypatch):
    """The native form: the plugin form needs a compiled library besides, and is counted in the same way."""
    monkeypatch.setattr(graph_report, "FORMS", ("native",))
    output = tmp_path / "report.json"
    sizes = ["--height", "64", "--width", "96", "--tokens", "6", "--classes", "3"]
    for label in ("before", "now"):
        assert graph_report.main([str(tiny_bundle), "--output", str(output), "--label", label, *sizes]) == 0
    graphs = json.loads(output.read_text())["graphs"]
    assert list(graphs) == [f"native, 64x96, 6 tokens, 3 classes, {label}" for label in ("before", "now")]
    found = graphs["native, 64x96, 6 tokens, 3 classes, now"]
    assert found["launches_by_kind"]["GRID_SAMPLE"] == 26
    assert 0 < found["launches"] < found["layers_without_sizes"] < found["layers"]
    assert found["searched"] == 3 * (8 * 12 + 4 * 6 + 2 * 3 + 1 * 2 + 1)
    assert "native, 64x96" in capsys.readouterr().out
