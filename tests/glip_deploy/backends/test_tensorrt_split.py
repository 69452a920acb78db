"""The image branch in two engines: features stay on the (simulated) GPU, and every prompt of a frame uses them."""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from backend_inputs import feed

from glip_deploy import Bundle
from glip_deploy.backends import open_backend
from glip_deploy.backends.tensorrt import SHAPES_KEPT
from glip_deploy.errors import ClosedError, EngineMismatch


@pytest.fixture
def opened(opened):
    """Opens the backend on engines of the parts too."""
    return partial(opened, split=True)


@pytest.fixture(scope="module")
def reference(tiny_bundle):
    return open_backend("onnxruntime", Bundle.open(tiny_bundle), None)


def prompts(*lengths, batch=1, **size):
    """The same frames with prompts of these lengths."""
    frames = feed(batch=batch, **size).frames
    given = [feed(batch=batch, tokens=tokens, classes=2 + i % 3, **size) for i, tokens in enumerate(lengths)]
    return [replace(one, frames=frames, text_embedding=one.text_embedding + i / 10) for i, one in enumerate(given)]


def assert_same(found, inputs, reference):
    assert len(found) == len(inputs)
    for ours, one in zip(found, inputs, strict=True):
        theirs = reference.detect(one)
        assert ours.boxes.shape[0] == len(one) and ours.labels.dtype == np.int64
        assert (theirs.scores > 0).sum() > 10
        np.testing.assert_allclose(
            np.sort(ours.scores)[:, -theirs.scores.shape[1] :], np.sort(theirs.scores), atol=1e-4
        )
        for frame in range(len(one)):
            best = [np.argmax(scores[frame]) for scores in (ours.scores, theirs.scores)]
            np.testing.assert_allclose(ours.boxes[frame, best[0]], theirs.boxes[frame, best[1]], atol=1e-2)


def test_each_prompt_gets_what_it_gets_alone(opened, reference):
    backend = opened(tokens=((1, 8, 8), (9, 32, 32)))
    given = prompts(4, 8, 9, 20, 4)
    for _ in range(3):  # plainly, while graphs are recorded, by the graphs
        assert_same(backend.detect_prompts(given), given, reference)


def test_features_never_leave_the_gpu_and_the_backbone_runs_once(opened, cuda):
    backend = opened()
    given = prompts(4, 5, 6, 7)  # all are padded to 16 tokens and to 8 classes
    cuda.log.clear()
    backend.detect_prompts(given)
    assert cuda.log.count("execute") + cuda.log.count("launch") == 1 + len(given)
    (backbone,), (head,) = backend._bound["backbone"].values(), backend._bound["head"].values()
    features = [name for name in head.inputs if name.startswith("features")]
    assert len(features) == 5
    assert all(head.device[name] == backbone.device[name] for name in features)
    assert set(backbone.staging) == {"frames", "image_sizes"}
    assert not set(head.staging) & set(features)
    for _ in range(2):
        cuda.log.clear()
        backend.detect_prompts(given)
    assert cuda.log.count("launch") == 1 + len(given) and "download" not in cuda.log


def test_the_parts_are_loaded_when_they_are_needed(opened, cuda):
    backend = opened()
    backend.detect(feed())
    assert set(backend._engines) == {"text", "image"}
    memory = len(cuda.memory)
    backend.detect_prompts(prompts(4, 5))
    assert set(backend._engines) == {"text", "image", "backbone", "head"} and len(cuda.memory) > memory
    twin = backend.clone()
    assert twin._engines is backend._engines


def test_other_shapes_take_the_place_of_those_unused_for_longest(opened, cuda, reference):
    backend = opened()
    for i in range(SHAPES_KEPT["backbone"] + 2):
        given = prompts(4, 20, width=64 + 32 * i)
        assert_same(backend.detect_prompts(given), given, reference)
    assert len(backend._bound["backbone"]) == SHAPES_KEPT["backbone"]
    kept = {address for bound in backend._bound["backbone"].values() for address in bound.device.values()}
    assert all(bound.borrowed <= kept for bound in backend._bound["head"].values())
    backend.close()
    assert not cuda.memory and not cuda.arrays and not cuda.live_graphs and not cuda.streams
    with pytest.raises(ClosedError):
        backend.detect_prompts(prompts(4, 5))


def test_frames_beyond_the_batch_and_canvases_below_the_smallest(opened, reference):
    given = prompts(4, 9, batch=3)
    assert_same(opened(batch=2).detect_prompts(given), given, reference)


def test_what_the_engines_were_not_built_for(opened):
    backend = opened()
    with pytest.raises(EngineMismatch, match="the prompt has 65 tokens, the engine takes up to 64"):
        backend.detect_prompts(prompts(4, 65))
    with pytest.raises(EngineMismatch, match="288 pixels in width"):
        backend.detect_prompts(prompts(4, 5, width=288))


def test_engines_of_before_run_whole_and_say_how_to_build(opened, reference, caplog):
    backend = opened(split=False)
    given = prompts(4, 9)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert_same(backend.detect_prompts(given), given, reference)
    (record,) = caplog.records
    assert "glip-build" in record.message and "--split" in record.message
