"""Inference engines: chosen by name, with one line for whatever they cannot do."""

from __future__ import annotations

import shutil
import sys
import types
from dataclasses import replace

import numpy as np
import pytest
from backend_inputs import IDS, error_of, feed
from tiny_glip import HIDDEN

from glip_deploy import Bundle
from glip_deploy.backends import BACKENDS, open_backend


@pytest.fixture(scope="module")
def bundle(tiny_bundle):
    return Bundle.open(tiny_bundle)


@pytest.fixture
def backend(bundle):
    opened = open_backend("onnxruntime", bundle, None)
    yield opened
    opened.close()


def test_shapes_and_dtypes(backend):
    embedding = backend.encode_text(IDS)
    assert embedding.shape == (4, HIDDEN) and embedding.dtype == np.float32
    found = backend.detect(feed(batch=2))
    boxes, scores, labels = found.boxes, found.scores, found.labels
    assert boxes.shape == (*scores.shape, 4) and scores.shape == labels.shape and len(boxes) == 2
    assert (boxes.dtype, scores.dtype, labels.dtype) == (np.float32, np.float32, np.int64)


@pytest.mark.parametrize("threads", [1, 2])
def test_the_number_of_threads_changes_no_result(bundle, backend, threads):
    other = open_backend("onnxruntime", bundle, threads)
    np.testing.assert_allclose(other.encode_text(IDS), backend.encode_text(IDS), atol=1e-6)
    assert other._image.get_session_options().intra_op_num_threads == threads


def test_an_unknown_engine(bundle):
    message = error_of(open_backend, "openvino", bundle, None)
    assert '"openvino" is unknown' in message and all(name in message for name in BACKENDS)


def test_an_engine_that_is_not_installed(bundle, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert "is not installed; pip install" in error_of(open_backend, "onnxruntime", bundle, None)


@pytest.mark.parametrize("version", ["1.24.4", "1.9.0", "0.99"])
def test_an_engine_that_is_too_old(bundle, monkeypatch, version):
    monkeypatch.setitem(sys.modules, "onnxruntime", types.SimpleNamespace(__version__=version))
    message = error_of(open_backend, "onnxruntime", bundle, None)
    assert version in message and "pip install -U 'onnxruntime>=1.25'" in message


@pytest.mark.parametrize("content", [b"", b"not a graph", bytes(range(256)) * 40])
def test_a_graph_it_cannot_load(tiny_bundle, tmp_path, content):
    copy = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    opened = Bundle.open(copy)
    (copy / "image.onnx").write_bytes(content)
    message = error_of(open_backend, "onnxruntime", opened, None)
    assert f"cannot load {copy / 'image.onnx'}" in message and "export the bundle again" in message


def test_the_text_graph_is_not_needed_before_the_first_prompt(tiny_bundle, tmp_path):
    copy = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    opened = Bundle.open(copy)
    (copy / "text.onnx").write_bytes(b"not a graph")
    backend = open_backend("onnxruntime", opened, None)
    backend.detect(feed())
    assert "cannot load" in error_of(backend.encode_text, IDS)


def test_what_the_graph_refuses_is_named_with_its_shapes(backend):
    inputs = feed()
    message = error_of(backend.detect, replace(inputs, text_embedding=inputs.text_embedding[..., :-1]))
    assert "ONNX Runtime failed on" in message and f"text_embedding (1, 4, {HIDDEN - 1})" in message
    assert "input_ids (1, 2)" in error_of(backend.encode_text, np.array([2, 10**6], np.int64))


def test_after_close_nothing_runs_and_nothing_is_loaded_again(bundle):
    opened = open_backend("onnxruntime", bundle, None)
    opened.close()
    opened.close()
    assert "is closed" in error_of(opened.detect, feed())
    assert "is closed" in error_of(opened.encode_text, IDS)
