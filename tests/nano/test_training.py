"""Training resumes to the same weights; checkpoints export; a full disk leaves the old file."""

import errno
import os
from pathlib import Path

import pytest
import torch
from glip_export.checkpoints import load_checkpoint
from glip_export.model.deform import deform_conv2d
from nano.batches import Batches
from nano.model import nano_config, sampled_deform, save_checkpoint, write_whole
from nano.objects import split_catalog
from nano.text import cut_vocabulary
from nano.training import Plan, Trainer

from glip_deploy.errors import GlipError

PLAN = Plan(seed=5, backbone_steps=1, steps=2, batch=1)
SMALL = ((96, 96),)


def trainer():
    batches = Batches(split_catalog().trained, cut_vocabulary(), 5, 1, sizes=SMALL, crowded_until=1)
    return Trainer(PLAN, torch.device("cpu"), batches)


@pytest.fixture(scope="module")
def finished(text_encoder):
    if os.environ.get("GLIP_SLOW") != "1":
        pytest.skip("trains for a minute: GLIP_SLOW=1 runs it")
    whole = trainer()
    assert whole.run(workers=0) == "finished"
    return whole


def test_resumed_training_gives_the_weights_of_an_uninterrupted_one(finished, tmp_path):
    state = tmp_path / "state.pt"
    first = trainer()
    first.run(until=2, workers=0, state=state)
    second = trainer()
    second.load(state)
    assert second.step == 2
    second.run(workers=0, state=state)
    for key, value in finished.averaged_state().items():
        assert torch.equal(second.averaged_state()[key], value), key
    damaged = tmp_path / "damaged.pt"
    damaged.write_bytes(state.read_bytes()[:1000])
    with pytest.raises(GlipError, match="is damaged"):
        second.load(damaged)


def test_text_encoder_is_frozen_and_the_rest_moves(finished):
    before = trainer().model.state_dict()
    after = finished.model.state_dict()
    text = "language_backbone."
    assert all(torch.equal(before[key], after[key]) for key in before if key.startswith(text))
    moved = [key for key in before if not key.startswith(text) and not torch.equal(before[key], after[key])]
    assert any(key.startswith("backbone.body") for key in moved)
    assert any("dot_product_projection_text" in key for key in moved)


def test_checkpoint_is_official_and_small(finished, tmp_path):
    path = tmp_path / "glip_nano.pth"
    save_checkpoint(path, finished.averaged_state(), finished.vocabulary)
    assert path.stat().st_size <= 25_000_000
    loaded = load_checkpoint(path)
    assert loaded.config == nano_config(len(finished.vocabulary))
    assert loaded.vocabulary == finished.vocabulary
    assert loaded.ignored == ()
    for key, value in finished.averaged_state().items():
        torch.testing.assert_close(loaded.model.state_dict()[key], value, rtol=1e-3, atol=1e-6)


def test_the_convolution_for_training_computes_what_the_models_own_does():
    torch.manual_seed(0)
    for height, width, stride in ((7, 9, 1), (7, 9, 2), (1, 1, 1), (2, 1, 1)):
        h, w = -(-height // stride), -(-width // stride)
        x, mask = torch.randn(2, 4, height, width), torch.rand(2, 9, h, w)
        offset = 2 * torch.randn(2, 18, h, w)
        weight, bias = torch.randn(4, 4, 3, 3), torch.randn(4)
        arguments = (x, offset, mask, weight, bias, stride)
        torch.testing.assert_close(sampled_deform(*arguments), deform_conv2d(*arguments), rtol=1e-4, atol=1e-4)


def test_a_full_disk_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "state.pt"
    write_whole(path, {"a": 1})
    old = path.read_bytes()

    def full(self, target):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(GlipError, match="no space left"):
        write_whole(path, {"a": 2})
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]


def test_batches_are_functions_of_their_number(text_encoder):
    one, same, other = (
        Batches(split_catalog().trained, cut_vocabulary(), 1, 2, sizes=SMALL)[number] for number in (3, 3, 4)
    )
    assert all(torch.equal(a, b) for a, b in zip(vars(one).values(), vars(same).values(), strict=True))
    assert not torch.equal(one.images, other.images)
    assert one.tokens.shape[2] == one.ids.shape[1]
    # every anchor's object is one that the prompt names
    for i in range(2):
        owners = one.matched[i][one.matched[i] >= 0]
        assert bool(one.tokens[i][owners].any(dim=1).all())


def test_rates_warm_up_and_fall_in_both_stages():
    plan = Plan(backbone_steps=1000, steps=1000)
    rates = [plan.learning_rate(step) for step in range(plan.total)]
    assert rates[0] < rates[500]
    assert rates[999] < 0.05 * max(rates[:1000])
    assert rates[1000] < 0.05 * max(rates[1000:])
    assert rates[-1] < 0.05 * max(rates[1000:])
