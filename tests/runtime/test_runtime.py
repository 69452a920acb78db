"""The C++ runtime as a whole: its C interface, its examples, and a program built against the installed tree."""

from __future__ import annotations

import ctypes
import json
import shutil
import subprocess

import numpy as np
import pytest
from parity_data import ROOT
from runtime_build import GlipError, Image, Library, Options, build, run
from selection import slowly
from split_bundle import unsplit

from glip_deploy import Caption, Detector, __version__, load_image
from glip_deploy.prompts import read_prompt_file

SCENES = ROOT / "tests" / "data" / "nano"
SIDES = {"shortest_side": 224, "longest_side": 1333}
NAMES = read_prompt_file(ROOT / "benchmarks" / "classes" / "glip_nano.txt")
PROMPT = ["dog", "red apple", "bicycle", "guitar", "penguin", "owl"]


@pytest.fixture(scope="module")
def library(runtime):
    return Library(runtime)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def python(nano_bundle, cache):
    """Python's detector on the same backend, which fills the cache that both share."""
    with Detector.open(nano_bundle, backend="openvino", cache_dir=cache, **SIDES) as opened:
        yield opened


@pytest.fixture(scope="module")
def detector(library, nano_bundle, cache, python):
    opened = library.open(nano_bundle, cache_dir=str(cache).encode(), **SIDES)
    yield opened
    library.c.glip_close(opened)


@pytest.fixture(scope="module")
def picture():
    return load_image(ROOT / "examples" / "nano" / "media" / "scene.jpg")


def same(found, wanted):
    assert [label for _, _, label, _ in found] == wanted.labels.tolist()
    assert [phrase for *_, phrase in found] == wanted.phrases
    np.testing.assert_allclose([score for _, score, _, _ in found], wanted.scores, atol=1e-4)
    np.testing.assert_allclose([box for box, *_ in found], wanted.boxes, atol=0.01)


def test_it_finds_what_python_finds_in_the_scenes_of_glip_nano(library, detector, python):
    total = 0
    for entry in json.loads((SCENES / "scenes.json").read_text()):
        scene = load_image(SCENES / entry["file"])
        prompt = library.encode(detector, entry["prompt"])
        wanted = python.detect(scene, entry["prompt"], 0.1, color="rgb")
        same(library.detect(detector, prompt, scene, 0.1), wanted)
        library.c.glip_prompt_free(prompt)
        total += len(wanted)
    assert total > 300


def test_captions_brackets_and_spans(library, detector, python, picture):
    for text in ("dog. red apple. owl", "a [dog] beside a [red apple]"):
        prompt = library.encode(detector, text)
        assert library.c.glip_prompt_phrase(prompt, ctypes.c_size_t(0)) == b"dog"
        assert library.c.glip_prompt_phrase(prompt, ctypes.c_size_t(9)) is None
        same(library.detect(detector, prompt, picture, 0.2), python.detect(picture, text, 0.2, color="rgb"))
        library.c.glip_prompt_free(prompt)
    text, spans = "a dog and a red apple", [(2, 5), (12, 21)]
    starts, ends = ((ctypes.c_size_t * 2)(*side) for side in zip(*spans, strict=True))
    count = ctypes.c_size_t(2)
    prompt = library.new("glip_encode_spans", detector, text.encode(), starts, ends, count)
    same(library.detect(detector, prompt, picture, 0.2), python.detect(picture, Caption(text, spans), 0.2, color="rgb"))
    library.c.glip_prompt_free(prompt)


def test_phrases_in_pieces_and_with_labels(library, detector, python, picture):
    text, spans = "a red apple and a green one near the dog", [[(2, 5), (18, 23)], [(37, 40)]]
    prompt = library.encode_phrases(detector, text, [(spans[0], None), (spans[1], "hound")])
    wanted = python.detect(picture, Caption(text, spans, ["red green", "hound"]), 0.1, color="rgb")
    assert len(wanted) > 0
    same(library.detect(detector, prompt, picture, 0.1), wanted)
    library.c.glip_prompt_free(prompt)
    for phrases, said in (
        ([], "the caption has no phrases"),
        ([([], None)], "phrase 0 of the caption has no spans"),
        ([([(2, 5)], " ")], "has the label ' '; labels have words"),
        ([([(2, 99)], None)], "legal is 0 <= start < end <= 40"),
    ):
        message = refused(library.encode_phrases, detector, text, phrases)
        assert message.startswith("PROMPT: ") and said in message


@pytest.fixture(scope="module")
def own(library, nano_bundle, cache, python):
    """A detector of its own, whose first frame has several prompts."""
    opened = library.open(nano_bundle, cache_dir=str(cache).encode(), **SIDES)
    yield opened
    library.c.glip_close(opened)


@slowly
def test_a_list_of_290_names_is_detected_as_in_python(library, own, nano_bundle, cache, picture):
    twin = library.new("glip_clone", own)
    before = library.encode(twin, PROMPT)
    whole = library.detect(twin, before, picture, 0.3)  # by the whole image branch, which the next prompt replaces
    prompt = library.encode(own, NAMES)
    with Detector.open(nano_bundle, cache_dir=cache, **SIDES) as parts:  # ONNX Runtime, through both parts
        wanted = parts.detect(picture, NAMES, 0.2, color="rgb")
        encoded = parts.encode(NAMES)
    assert library.c.glip_prompt_chunks(prompt) == len(encoded.chunks) > 2
    assert library.c.glip_prompt_classes(prompt) == 290
    assert len(wanted) > 10 and len(set(wanted.labels.tolist())) > 3
    same(library.detect(own, prompt, picture, 0.2), wanted)
    # One prompt through both parts, and by a detector that had the whole.
    for one in (own, twin):
        found = library.detect(one, before, picture, 0.3)
        assert [label for _, _, label, _ in found] == [label for _, _, label, _ in whole]
        np.testing.assert_allclose([score for _, score, _, _ in found], [score for _, score, _, _ in whole], atol=1e-4)
    library.c.glip_close(twin)
    library.c.glip_prompt_free(before)
    library.c.glip_prompt_free(prompt)
    forty = library.encode(own, NAMES, 40)
    assert library.c.glip_prompt_chunks(forty) == 8
    library.c.glip_prompt_free(forty)


def test_several_prompts_on_a_frame(library, own, python, cache, picture):
    texts = ["dog. owl", PROMPT, "a [red apple] on a table", NAMES[:120]]
    prompts = [library.encode(own, text) for text in texts]
    wanted = python.detect_prompts(picture, texts, 0.2, color="rgb")
    for found, of_prompt in zip(library.detect_prompts(own, prompts, picture, 0.2), wanted, strict=True):
        same(found, of_prompt)
    assert all(len(of_prompt) for of_prompt in wanted)
    # Text, whole, backbone and head: compiled once, by whichever came first.
    assert len(list((cache / "openvino").glob("*.compiled"))) == 4
    assert refused(library.detect_prompts, own, [], picture).startswith("PROMPT: there are no prompts")
    message = refused(library.detect_prompts, own, [prompts[0], None], picture)
    assert message.startswith("OPTION: a prompt is a null pointer")
    message = refused(library.detect_prompts, own, prompts, picture, 1.5)
    assert message.startswith("OPTION: threshold is 1.5")
    for prompt in prompts:
        library.c.glip_prompt_free(prompt)


def test_a_bundle_without_the_parts_runs_the_whole_for_each_prompt(
    library, nano_bundle, cache, python, picture, tmp_path
):
    old = library.open(unsplit(nano_bundle, tmp_path / "old"), cache_dir=str(cache).encode(), **SIDES)
    prompts = [library.encode(old, text) for text in ("dog. owl", PROMPT)]
    wanted = python.detect_prompts(picture, ["dog. owl", PROMPT], 0.2, color="rgb")
    for found, of_prompt in zip(library.detect_prompts(old, prompts, picture, 0.2), wanted, strict=True):
        same(found, of_prompt)
        library.c.glip_prompt_free(prompts.pop(0))
    library.c.glip_close(old)


@pytest.mark.parametrize("text", [PROMPT, "dog", NAMES[:120]], ids=["names", "dog", "chunks"])
def test_pictures_in_a_batch(library, own, python, picture, text):
    pictures = [picture, np.ascontiguousarray(picture[:, : picture.shape[1] // 2]), np.ascontiguousarray(picture[::-1])]
    prompt = library.encode(own, text)
    found = library.detect_batch(own, prompt, pictures, 0.2)
    wanted = python.detect_batch(pictures, text, 0.2, color="rgb")
    assert [len(one) for one in found] == [len(one) for one in wanted] and len(wanted[0]) > 0
    for here, there in zip(found, wanted, strict=True):
        same(here, there)
    assert refused(library.detect_batch, own, prompt, []).startswith("FRAME: there are no pictures")
    tall = np.zeros((0, 5, 3), np.uint8)
    assert refused(library.detect_batch, own, prompt, [picture, tall]).startswith("FRAME: picture is 5x0")
    library.c.glip_prompt_free(prompt)


def test_a_tall_and_a_wide_strip_need_no_memory_before_they_are_refused(library, nano_bundle, cache):
    """Each is within the limit; the canvas that holds both would take 15 GB."""
    sides = {"shortest_side": 32, "longest_side": 64_000_000}
    opened = library.open(nano_bundle, cache_dir=str(cache).encode(), **sides)
    prompt = library.encode(opened, PROMPT)
    strips = [np.zeros((60_000, 1, 3), np.uint8), np.zeros((1, 40, 3), np.uint8)]
    message = refused(library.detect_batch, opened, prompt, strips)
    assert message.startswith(
        "FRAME: the resized pictures need a canvas of 1280x1920000 pixels, more than 64000000 in all"
    )
    library.c.glip_prompt_free(prompt)
    library.c.glip_close(opened)


def test_rows_with_a_gap_and_other_channel_orders(library, detector, python, picture):
    wanted = python.detect(picture, PROMPT, 0.3, color="rgb")
    prompt = library.encode(detector, PROMPT)
    wide = np.zeros((picture.shape[0], picture.shape[1] + 7, 3), np.uint8)
    wide[:, : picture.shape[1]] = picture[..., ::-1]
    members = {"width": picture.shape[1], "pitch": wide.strides[0], "format": 0}
    same(library.detect(detector, prompt, wide, 0.3, **members), wanted)
    library.c.glip_prompt_free(prompt)


def test_prompt_caches_are_shared_both_ways(library, nano_bundle, tmp_path, picture):
    options = {"cache_dir": str(tmp_path).encode(), **SIDES}
    opened = library.open(nano_bundle, **options)
    library.c.glip_prompt_free(library.encode(opened, "red apple. owl"))
    (entry,) = tmp_path.glob("*/*.embedding")
    content = entry.read_bytes()
    entry.unlink()
    with Detector.open(nano_bundle, backend="openvino", cache_dir=tmp_path, **SIDES) as other:
        encoded = other.encode("red apple. owl").embedding
        assert entry.is_file()  # under the same name
    with Detector.open(nano_bundle, cache_dir=tmp_path, **SIDES) as other:
        entry.write_bytes(content)
        other.backend.encode_text = None  # the text branch does not run
        np.testing.assert_allclose(other.encode("red apple. owl").embedding, encoded, atol=1e-5)
        assert len(list((tmp_path / "openvino").glob("*.compiled"))) == 2  # image and text, each once for both
    # And what Python wrote, with other numbers, is what C++ takes.
    library.c.glip_close(opened)
    opened = library.open(nano_bundle, **options)
    before = library.detect(opened, library.encode(opened, "red apple. owl"), picture, 0.05)
    with Detector.open(nano_bundle, cache_dir=tmp_path, **SIDES) as other:
        key = other.encode("red apple. owl").prompt.embedding_key
        other._cache.put(key, np.zeros_like(encoded))
    library.c.glip_close(opened)
    opened = library.open(nano_bundle, **options)
    after = library.detect(opened, library.encode(opened, "red apple. owl"), picture, 0.05)
    assert [score for _, score, *_ in before] != [score for _, score, *_ in after]
    library.c.glip_close(opened)


def test_clones_share_prompts_and_close_apart(library, detector, python, picture):
    twin = library.new("glip_clone", detector)
    again = library.new("glip_clone", twin)
    prompt = library.encode(twin, PROMPT)
    library.c.glip_close(twin)
    wanted = python.detect(picture, PROMPT, 0.3, color="rgb")
    same(library.detect(detector, prompt, picture, 0.3), wanted)
    same(library.detect(again, prompt, picture, 0.3), wanted)
    library.c.glip_prompt_free(prompt)
    library.c.glip_close(again)


def resident():
    """Return this process's memory in KiB."""
    with open("/proc/self/status") as status:  # noqa: PTH123
        return next(int(line.split()[1]) for line in status if line.startswith("VmRSS"))


def test_prompts_of_other_lengths_keep_no_memory(library, detector, picture):
    """OpenVINO, and oneDNN inside it, would keep some 10 MB for every length."""
    small = np.ascontiguousarray(picture[:64, :64])

    def look(words):
        prompt = library.encode(detector, [" ".join(["cat"] * words)])
        library.detect(detector, prompt, small, 0.3)
        library.c.glip_prompt_free(prompt)

    for words in range(20, 24):
        look(words)
    before = resident()
    for words in range(24, 44):
        look(words)
    assert resident() - before < 50 * 1024


def test_memory_stays_flat_while_prompts_change(library, detector, picture):
    small = np.ascontiguousarray(picture[:64, :64])

    def frames(count):
        for index in range(count):
            prompt = library.encode(detector, PROMPT[: 1 + index % len(PROMPT)])
            library.detect(detector, prompt, small, 0.3)
            library.c.glip_prompt_free(prompt)

    frames(12)
    before = resident()
    frames(30)
    assert resident() - before < 8 * 1024  # KiB


def refused(call, *arguments, **options):
    with pytest.raises(GlipError) as caught:
        call(*arguments, **options)
    return str(caught.value)


def changed(bundle, folder, **members):
    shutil.copytree(bundle, folder)
    content = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**content, **members}))
    return folder


def test_bundles_that_cannot_be_opened(library, nano_bundle, tmp_path):
    assert "BUNDLE: bundle" in refused(library.open, tmp_path / "none") and "does not exist" in refused(
        library.open, tmp_path / "none"
    )
    assert "has no manifest.json" in refused(library.open, tmp_path)
    newer = changed(nano_bundle, tmp_path / "newer", format_version=2)
    assert "has format 2, this library reads up to 1" in refused(library.open, newer)
    assert "is not that of a bundle" in refused(library.open, changed(nano_bundle, tmp_path / "other", format="x"))
    (tmp_path / "other" / "manifest.json").write_text("[" * 9)
    assert "is damaged" in refused(library.open, tmp_path / "other")
    data = newer / "image.onnx.data"
    shutil.copy(nano_bundle / "manifest.json", newer / "manifest.json")
    raw = bytearray(data.read_bytes())
    raw[1000] ^= 1
    data.write_bytes(raw)
    assert "was changed after the export" in refused(library.open, newer)
    data.write_bytes(raw[:-1])
    assert "bytes, the manifest says" in refused(library.open, newer)
    data.unlink()
    assert "lacks image.onnx.data" in refused(library.open, newer)


def test_options_that_are_out_of_range(library, nano_bundle):
    cases = [
        ({"backend": b"caffe"}, 'backend "caffe" is unknown; legal is openvino, onnxruntime, tensorrt'),
        ({"precision": b"int4"}, "takes f32, bf16, auto"),
        ({"shortest_side": -3}, "shortest_side is -3"),
        ({"threads": 100000}, "threads is 100000"),
    ]
    for options, said in cases:
        message = refused(library.open, nano_bundle, no_verify=1, no_cache=1, **options)
        assert message.startswith("OPTION: ") and said in message


def test_null_pointers_and_wrong_sizes_are_errors(library, detector, picture):
    null = ctypes.c_void_p()
    made = ctypes.byref(ctypes.c_void_p())
    prompt = library.encode(detector, "dog")
    image = Image(ctypes.sizeof(Image), picture.ctypes.data, picture.shape[1], picture.shape[0])
    calls = [
        ("glip_open", None, None, made),
        ("glip_open", b"x", None, None),
        ("glip_clone", null, made),
        ("glip_encode", null, b"dog", made),
        ("glip_encode", detector, None, made),
        ("glip_encode", detector, b"dog", None),
        ("glip_encode_names", detector, None, ctypes.c_size_t(1), made),
        ("glip_encode_names", detector, (ctypes.c_char_p * 1)(None), ctypes.c_size_t(1), made),
        ("glip_detect", detector, None, prompt, ctypes.c_float(0.5), made),
        ("glip_detect", detector, ctypes.byref(image), null, ctypes.c_float(0.5), made),
        ("glip_detect", detector, ctypes.byref(image), prompt, ctypes.c_float(0.5), None),
        ("glip_encode_chunks", detector, None, ctypes.c_size_t(1), ctypes.c_size_t(0), made),
        ("glip_encode_phrases", detector, b"dog", None, ctypes.c_size_t(1), made),
        ("glip_encode_phrases", detector, b"dog", (ctypes.c_void_p * 1)(None), ctypes.c_size_t(1), made),
        ("glip_detect_batch", detector, None, ctypes.c_size_t(1), prompt, ctypes.c_float(0.5), made),
        (
            "glip_detect_batch",
            detector,
            (ctypes.c_void_p * 1)(None),
            ctypes.c_size_t(1),
            prompt,
            ctypes.c_float(0.5),
            made,
        ),
        ("glip_detect_batch", detector, made, ctypes.c_size_t(1), prompt, ctypes.c_float(0.5), None),
        ("glip_detect_prompts", detector, ctypes.byref(image), None, ctypes.c_size_t(1), ctypes.c_float(0.5), made),
        ("glip_detect_prompts", detector, None, ctypes.byref(prompt), ctypes.c_size_t(1), ctypes.c_float(0.5), made),
        ("glip_detections_get", null, ctypes.c_size_t(0), made),
    ]
    for name, *arguments in calls:
        message = refused(library.call, name, *arguments)
        assert message.startswith("OPTION: ") and "is a null pointer" in message, name
    for name in ("glip_close", "glip_prompt_free", "glip_detections_free"):
        getattr(library.c, name)(null)
    message = refused(library.detect, detector, prompt, picture, size=3)
    assert "image has the size 3; set its first member with sizeof" in message
    assert "threshold is nan" in refused(library.detect, detector, prompt, picture, float("nan"))
    library.c.glip_prompt_free(prompt)
    assert library.c.glip_resize(null) is None
    assert library.c.glip_last_error() == b"detector is a null pointer; pass one that is not"


def test_where_pictures_are_resized(library, tiny_bundle, cache):
    kept = {"cache_dir": str(cache).encode()}
    for given in ({}, {"resize": b""}, {"resize": b"exact"}):
        opened = library.open(tiny_bundle, **kept, **given)
        assert library.c.glip_resize(opened) == b"exact"
        library.c.glip_close(opened)
    assert refused(library.open, tiny_bundle, no_cache=1, resize=b"gpu") == (
        'OPTION: resize is "gpu", which only backend tensorrt does; use "exact"'
    )
    assert refused(library.open, tiny_bundle, no_cache=1, resize=b"fast") == (
        'OPTION: resize is "fast"; it must be "exact" or "gpu"'
    )
    # A program that was compiled before there was the choice passes a smaller struct, and what follows it is not read.
    opened = library.open(tiny_bundle, **kept, size=Options.resize.offset, resize=b"fast")
    library.c.glip_close(opened)


def test_a_prompt_of_another_bundle_is_refused(library, detector, tiny_bundle, picture, cache):
    other = library.open(tiny_bundle, cache_dir=str(cache).encode(), shortest_side=64)
    prompt = library.encode(other, "dog")
    message = refused(library.detect, detector, prompt, picture)
    assert message.startswith("PROMPT: ") and "of another bundle or precision" in message
    library.c.glip_prompt_free(prompt)
    library.c.glip_close(other)


def test_a_bundle_that_is_replaced_is_never_mixed(library, tiny_bundle, tmp_path):
    """The text branch is loaded with the first prompt, and not compiled yet."""
    for name in ("used", "newer"):
        shutil.copytree(tiny_bundle, tmp_path / name)
    opened = library.open(tmp_path / "used", no_cache=1)
    (tmp_path / "used").rename(tmp_path / "older")
    message = refused(library.encode, opened, "umbrella. violin")
    assert message.startswith("BACKEND: ") or "removed" in message
    (tmp_path / "newer").rename(tmp_path / "used")
    message = refused(library.encode, opened, "umbrella. violin")
    assert message.startswith(
        f"BUNDLE: bundle {tmp_path / 'used'} was changed, removed or replaced since it was opened"
    )
    library.c.glip_close(opened)


def test_without_its_backend_the_library_says_so(runtime, nano_bundle, tmp_path):
    for file in runtime.glob("libglip.so*"):
        shutil.copy(file, tmp_path / file.name, follow_symlinks=False)
    message = refused(Library(tmp_path).open, nano_bundle, no_verify=1)
    assert message.startswith("MISSING: backend openvino cannot be loaded") and "keep it beside libglip.so" in message


def write_ppm(file, picture):
    file.write_bytes(b"P6\n# made by a test\n%d %d\n255\n" % (picture.shape[1], picture.shape[0]) + picture.tobytes())


def test_the_example_prints_the_json_of_glip_detect(runtime, nano_bundle, cache, python, picture, tmp_path):
    write_ppm(tmp_path / "scene.ppm", picture)
    environment = {"GLIP_DEPLOY_CACHE": str(cache)}
    command = [runtime / "glip_detect_image", nano_bundle, "dog. owl. penguin", tmp_path / "scene.ppm"]
    options = ["--threshold", "0.4", "--shortest-side", "224"]
    line = json.loads(run(*command, *options, env=environment).stdout)
    assert list(line) == ["source", "frame", "width", "height", "detections"]
    wanted = python.detect(picture, "dog. owl. penguin", 0.4, color="rgb").to_dicts()
    assert len(line["detections"]) == len(wanted) > 1
    for here, there in zip(line["detections"], wanted, strict=True):
        assert here["label"] == there["label"] and abs(here["score"] - there["score"]) < 1e-4
        assert all(abs(here["box"][side] - there["box"][side]) < 0.01 for side in there["box"])
    run(*command, *options, "--json", tmp_path / "out.jsonl", env=environment)
    assert json.loads((tmp_path / "out.jsonl").read_text()) == line
    for arguments, status in (
        (command[:2], 2),
        ([*command, "--threshold", "much"], 2),
        ([*command[:3], "none.ppm"], 1),
    ):
        done = subprocess.run(arguments, capture_output=True, text=True, check=False)
        assert done.returncode == status and done.stderr.startswith("glip_detect_image: error: ") and not done.stdout


CONSUMER = """\
cmake_minimum_required(VERSION 3.18)
project(consumer LANGUAGES CXX)
find_package(glip 0.2 CONFIG REQUIRED)
find_package(Threads REQUIRED)
add_executable(consumer main.cpp)
target_link_libraries(consumer PRIVATE glip::glip Threads::Threads)
"""
MAIN = """\
#include <sys/resource.h>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <fstream>
#include <functional>
#include <glip/glip.hpp>
#include <iostream>
#include <thread>

using Found = std::vector<glip::Detection>;

void report(const std::function<void()>& body) {
  try {
    body();
    std::cout << "nothing was thrown" << std::endl;
  } catch (const glip::Error& error) {
    std::cout << static_cast<int>(error.kind()) << " " << error.what() << std::endl;
  }
}

int main(int, char** arguments) {
  std::cout << glip::version() << std::endl;
  glip::Options options;
  options.shortest_side = 224;
  glip::Detector detector = glip::Detector::open(arguments[1], options);
  glip::ImageView view{nullptr, std::atoi(arguments[3]), std::atoi(arguments[4])};
  std::vector<unsigned char> pixels(static_cast<std::size_t>(view.width) * static_cast<std::size_t>(view.height) * 3);
  std::ifstream(arguments[2], std::ios::binary).read(reinterpret_cast<char*>(pixels.data()),
                                                     static_cast<std::streamsize>(pixels.size()));
  view.data = pixels.data();

  // Clones that encode at once, the first text of all among it.
  std::vector<Found> found(4);
  std::vector<std::thread> threads;
  for (Found& mine : found) {
    threads.emplace_back([&mine, &view, clone = std::make_shared<glip::Detector>(detector.clone())] {
      for (const char* name : {"dog", "penguin", "guitar"}) {
        for (const glip::Detection& one : clone->detect(view, clone->encode({name, "owl"}), 0.2f)) mine.push_back(one);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  bool same = !found[0].empty();
  for (const Found& one : found) {
    same = same && one.size() == found[0].size();
    for (std::size_t i = 0; same && i < one.size(); ++i) same = std::abs(one[i].score - found[0][i].score) < 1e-4f;
  }
  std::cout << (same ? "same" : "different") << std::endl;

  // Lists in braces are names, also of one class; a string is a caption.
  std::cout << detector.encode({"dog"}).phrases().size() << detector.encode({"dog", "red apple"}).phrases().size()
            << detector.encode("dog. owl. pear").phrases().size() << std::endl;

  // A long list, several prompts on a frame, and a batch.
  std::vector<std::string> names;
  for (int i = 0; i < 120; ++i) names.push_back("kind " + std::to_string(i) + " of dog");
  const glip::Prompt many = detector.encode(names), dog = detector.encode("dog");
  std::cout << many.chunks() << " " << (many.tokens(many.chunks() - 1).size() > 2) << std::endl;
  report([&] { many.tokens(many.chunks()); });
  const std::vector<Found> of_prompts = detector.detect_prompts(view, {dog, many}, 0.3f);
  const std::vector<Found> of_batch = detector.detect({view, view}, dog, 0.3f);
  const std::size_t alone = detector.detect(view, dog, 0.3f).size();
  bool agree = alone > 0;
  for (const Found& one : {of_prompts.at(0), of_batch.at(0), of_batch.at(1)}) agree = agree && one.size() == alone;
  std::cout << agree << of_prompts.size() << of_batch.size() << std::endl;
  report([&] { detector.detect_prompts(view, {dog, many}, std::vector<std::vector<float>>{{0.5f}}); });
  report([&] { detector.detect(view, glip::Prompt(), 0.5f); });

  // No memory for the canvas.
  options.shortest_side = 8000, options.longest_side = 0;
  glip::Detector large = glip::Detector::open(arguments[1], options);
  const glip::Prompt prompt = large.encode("dog");
  std::size_t pages = 0;
  std::ifstream("/proc/self/statm") >> pages;
  rlimit before{};
  getrlimit(RLIMIT_AS, &before);
  const rlimit low{pages * 4096 + (64u << 20), before.rlim_max};
  setrlimit(RLIMIT_AS, &low);
  report([&] { large.detect({pixels.data(), 2, 2}, prompt); });
  setrlimit(RLIMIT_AS, &before);

  // Closed by another thread, in the middle of frames and clones.
  std::atomic<int> frames{0};
  std::thread other([&] {
    while (frames < 3) std::this_thread::yield();
    detector.close();
  });
  report([&] {
    for (;; ++frames) detector.clone().detect(view, prompt), detector.detect(view, prompt);
  });
  other.join();
}
"""
SAID = """\
{version}
same
123
{chunks} 1
1 chunk {chunks} does not exist; the prompt has {chunks}
122
1 thresholds of 1 prompts are given for 2; give those of each, or one number
2 the prompt is empty; encode one with Detector::encode
8 there is not enough memory; close other programs, or lower the longest side
7 this detector is closed; open it again with Detector::open
"""


def test_a_project_builds_against_the_installed_tree(runtime, nano_bundle, cache, python, picture, tmp_path):
    run("cmake", "--install", build(), "--prefix", tmp_path / "installed")
    (tmp_path / "CMakeLists.txt").write_text(CONSUMER)
    (tmp_path / "main.cpp").write_text(MAIN)
    run("cmake", "-S", tmp_path, "-B", tmp_path / "out", f"-DCMAKE_PREFIX_PATH={tmp_path / 'installed'}")
    run("cmake", "--build", tmp_path / "out")
    (tmp_path / "scene.bgr").write_bytes(np.ascontiguousarray(picture[..., ::-1]).tobytes())
    command = [tmp_path / "out" / "consumer", nano_bundle, tmp_path / "scene.bgr", picture.shape[1], picture.shape[0]]
    done = run(*command, env={"GLIP_DEPLOY_CACHE": str(cache)})
    chunks = len(python.encode([f"kind {index} of dog" for index in range(120)]).chunks)
    assert chunks > 2 and done.stdout == SAID.format(version=__version__, chunks=chunks)


def test_the_c_example_prints_boxes(runtime, nano_bundle, cache, python, picture, tmp_path):
    (tmp_path / "scene.bgr").write_bytes(np.ascontiguousarray(picture[..., ::-1]).tobytes())
    sides = [picture.shape[1], picture.shape[0]]
    command = [runtime / "glip_detect_image_c", nano_bundle, "dog", *sides, tmp_path / "scene.bgr", "224"]
    done = run(*command, env={"GLIP_DEPLOY_CACHE": str(cache)})
    wanted = python.detect(picture, "dog", 0.5, color="rgb")
    assert len(wanted) > 0
    rows = [line.split() for line in done.stdout.splitlines()]
    np.testing.assert_allclose([[float(number) for number in row[2:]] for row in rows], wanted.boxes, atol=0.01)
