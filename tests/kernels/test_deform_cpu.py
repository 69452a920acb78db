"""The trial of a deformable convolution on a CPU computes what ONNX says, so that its times mean something."""

from __future__ import annotations

import json

import numpy as np
import pytest
from glip_engines.compilers import find_host_compiler
from kernels import deform_cpu
from kernels.deform_cpu import Arrays, Layer, Trial, has_avx2, layers, onnx_model

from glip_deploy.backends.onnxruntime import open_session
from glip_deploy.errors import GlipError


@pytest.fixture(scope="module")
def trial():
    try:
        find_host_compiler()
    except GlipError as error:
        pytest.skip(str(error))
    if not has_avx2():
        pytest.skip("this processor has no AVX2")
    return Trial()


@pytest.mark.parametrize(
    "layer",
    [
        Layer("own level", 13, 21, 13, 21, 1, channels=32, outputs=48),
        Layer("odd numbers of channels", 5, 9, 5, 9, 1, channels=13, outputs=19),
        Layer("level below", 26, 42, 13, 21, 2, channels=16, outputs=16),
        Layer("groups of offsets", 7, 11, 7, 11, 1, channels=24, outputs=16, offset_groups=3),
        Layer("a single location", 1, 1, 1, 1, 1, channels=8, outputs=8),
        Layer("many tiles", 30, 40, 30, 40, 1, channels=8, outputs=16),
    ],
    ids=lambda layer: layer.branch,
)
@pytest.mark.parametrize("threads", [1, 3])
def test_the_trial_agrees_with_onnxruntime_beyond_the_borders_too(trial, layer, threads):
    arrays = Arrays.of(layer, spread=4.0, seed=5)
    feed = {"x": arrays.x[None], "offsets": arrays.offsets[None], "mask": arrays.mask[None]}
    (wanted,) = open_session(onnx_model(layer, arrays)).run(None, feed)
    found = trial.prepare(layer, arrays, threads)()
    np.testing.assert_allclose(found, wanted[0], atol=1e-4)


def test_offsets_far_away_or_not_a_number_sample_zero(trial):
    layer = Layer("own level", 6, 7, 6, 7, 1, channels=8, outputs=16)
    arrays = Arrays.of(layer, spread=1.0)
    arrays.offsets[::3], arrays.offsets[1::3], arrays.offsets[2::3] = np.nan, np.inf, -1e30
    found = trial.prepare(layer, arrays, 1)()
    np.testing.assert_array_equal(found, np.broadcast_to(arrays.bias[:, None, None], found.shape))


def test_the_layers_are_those_of_a_block():
    found = layers(800, 1344)
    assert len(found) == 13
    assert (found[0].height, found[0].width) == (100, 168) and (found[4].height, found[4].width) == (7, 11)
    below = [layer for layer in found if layer.stride == 2]
    assert [(one.height, one.out_height) for one in below] == [(100, 50), (50, 25), (25, 13), (13, 7)]
    assert (
        round(6 * sum(layer.macs for layer in found) / 1e9) == 119
    )  # of the 127 of DyConv that glip-bench floor counts


def test_the_program_writes_what_it_prints(trial, tmp_path, capsys):
    pytest.importorskip("openvino", reason="openvino is not installed")
    file = tmp_path / "found.json"
    assert deform_cpu.main(["--canvas", "64", "96", "--rounds", "1", "--json", str(file)]) == 0
    printed, result = capsys.readouterr().out, json.loads(file.read_text())
    assert len(result["layers"]) == 13 and result["difference"] < 1e-5
    for key in ("ms", "least_ms"):
        for way, value in result["frame"][key].items():
            assert value > 0 and f"{value:.1f}" in printed and way in printed


def test_a_processor_without_avx2_is_told(monkeypatch, capsys):
    monkeypatch.setattr(deform_cpu, "has_avx2", lambda: False)
    pytest.importorskip("openvino", reason="openvino is not installed")
    assert deform_cpu.main([]) == 1
    assert "the trial needs a processor with AVX2 and FMA" in capsys.readouterr().err
