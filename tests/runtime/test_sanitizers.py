"""The C++ runtime under sanitizers: threads, the C interface, and inputs that nobody made."""

from __future__ import annotations

import json
import os
import subprocess

import pytest
from runtime_build import absence, build_sanitized, run
from selection import SLOW, slowly

RUNS = 1_000_000 if SLOW else 10_000
PROMPTS = [
    "person. traffic light . 3.5 inch disk. ",
    "a man with a [green hat] and [two dogs]",
    "\\[x\\]. İstanbul\u2028 caf\u00e9. 你好 [MASK] \U0001f34e",
    "a red apple",
]
LISTS = [
    ["person", "traffic_light", "stop sign (red)", "[stingray], which is flat and round"],
    ["a lot of words that fill a prompt", *(f"oven glove {i}" for i in range(12))],
]
SPANS = "a naïve man near the café\n1 2 11\n1 2 7\n0 21 25\n"


@pytest.fixture(scope="module")
def environment():
    """Of a program with sanitizers: every error ends it."""
    return {**os.environ, "UBSAN_OPTIONS": "print_stacktrace=1", "TSAN_OPTIONS": "halt_on_error=1"}


def test_threads_and_the_c_interface_with_the_address_sanitizer(address, tiny_bundle, environment, tmp_path):
    assert run(address / "glip_threads", tiny_bundle, tmp_path, env=environment).stdout == "done\n"


@slowly
def test_threads_and_the_c_interface_with_the_thread_sanitizer(tiny_bundle, environment, tmp_path):
    reason = absence()
    if reason is not None:
        pytest.skip(reason)
    folder = build_sanitized("thread")
    assert run(folder / "glip_threads", tiny_bundle, tmp_path, env=environment).stdout == "done\n"


@pytest.fixture(scope="module")
def corpus(tiny_bundle, tmp_path_factory):
    """One file for each kind of input, the kind before its content."""
    folder = tmp_path_factory.mktemp("corpus")
    vocabulary = {"[UNK]": 0, "[CLS]": 1, "[SEP]": 2, "a": 3, "##b": 4, "caf": 5, "##e": 6, ",": 7}
    tokenizer = json.loads((tiny_bundle / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"] = vocabulary  # small, so that changes hit what matters
    contents = [
        (0, (tiny_bundle / "manifest.json").read_text()),
        (1, json.dumps(tokenizer)),
        *((kind, text) for kind in (2, 3) for text in PROMPTS),
        *((4, "\n".join(names)) for names in LISTS),
        (5, SPANS),
    ]
    for index, (kind, text) in enumerate(contents):
        (folder / f"{index:02}").write_bytes(bytes([kind]) + text.encode())
    return folder


def fuzz(folder, corpus, tokenizer, environment, runs):
    """Run the fuzz target on as many inputs, always the same ones."""
    command = [folder / "glip_fuzz", corpus, f"-runs={runs}", "-seed=1"]
    given = {**environment, "GLIP_FUZZ_TOKENIZER": str(tokenizer)}
    return subprocess.run([str(part) for part in command], env=given, capture_output=True, text=True, check=False)


def test_inputs_that_nobody_made(address, corpus, bert_tokenizer, environment):
    done = fuzz(address, corpus, bert_tokenizer[0], environment, RUNS)
    assert done.returncode == 0, done.stderr[-4000:]
    assert f"{RUNS} inputs" in done.stdout


def test_an_input_that_fails_is_shown(address, environment, tmp_path):
    (tmp_path / "prompt").write_bytes(b"\x03dog")
    given = {name: value for name, value in environment.items() if name != "GLIP_FUZZ_TOKENIZER"}
    command = [str(address / "glip_fuzz"), str(tmp_path), "-runs=5"]  # without a tokenizer, which the target demands
    done = subprocess.run(command, env=given, capture_output=True, text=True, check=False)
    assert done.returncode != 0 and "fuzz: input 1: 03646f67" in done.stderr
