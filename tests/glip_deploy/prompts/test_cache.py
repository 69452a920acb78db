"""The prompt cache: two processes, damage, eviction, and disks that refuse."""

import io
import logging
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from glip_deploy.prompts.cache import PromptCache

BUNDLE = "b" * 64
KEY = "0123456789abcdef" * 4


def embedding(tokens=5, features=8, seed=0):
    return np.random.default_rng(seed).random((tokens, features), dtype=np.float32)


def entries(directory):
    return sorted(file for file in Path(directory).rglob("*") if file.is_file())


def entry_bytes():
    """The size of a file with an `embedding()`: its digest, and the array as .npy."""
    stream = io.BytesIO()
    np.save(stream, embedding())
    return 32 + len(stream.getvalue())


@pytest.fixture
def cache(tmp_path):
    return PromptCache(tmp_path / "cache", BUNDLE)


def fresh(cache_dir, bundle=BUNDLE, **options):
    """A cache with nothing in memory, as another process would have it."""
    return PromptCache(cache_dir, bundle, **options)


def test_in_memory_alone():
    cache = PromptCache(None, BUNDLE)
    assert cache.get(KEY) is None and cache.directory is None
    cache.put(KEY, embedding())
    np.testing.assert_array_equal(cache.get(KEY), embedding())


def test_another_process_finds_it(cache, tmp_path):
    cache.put(KEY, embedding())
    found = fresh(tmp_path / "cache").get(KEY)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, embedding())
    assert [file.name for file in entries(tmp_path)] == [KEY + ".embedding"]
    assert cache.directory == tmp_path / "cache" / BUNDLE[:16]


def test_opening_a_cache_and_a_miss_write_nothing(cache, tmp_path):
    assert cache.get(KEY) is None
    assert not (tmp_path / "cache").exists()


def test_embeddings_are_read_only_copies(cache, tmp_path):
    mine = embedding()
    cache.put(KEY, mine)
    mine[:] = 0
    for out in (cache.get(KEY), fresh(tmp_path / "cache").get(KEY)):
        np.testing.assert_array_equal(out, embedding())
        with pytest.raises(ValueError, match="read-only"):
            out[0, 0] = 1


def test_an_array_in_column_order_is_kept(cache, tmp_path):
    cache.put(KEY, np.asfortranarray(embedding()))
    np.testing.assert_array_equal(fresh(tmp_path / "cache").get(KEY), embedding())


def test_bundles_do_not_mix(cache, tmp_path):
    cache.put(KEY, embedding())
    assert fresh(tmp_path / "cache", "c" * 64).get(KEY) is None
    # The same first sixteen characters share a folder, and still do not mix.
    assert fresh(tmp_path / "cache", BUNDLE[:16] + "c" * 48).get(KEY) is None


def test_memory_forgets_the_least_recently_used():
    cache = PromptCache(None, BUNDLE, memory_items=2)
    cache.put("a", embedding())
    cache.put("b", embedding())
    cache.get("a")
    cache.put("c", embedding())
    assert cache.get("b") is None and cache.get("a") is not None and cache.get("c") is not None


def test_without_memory_the_disk_is_used(tmp_path):
    cache = PromptCache(tmp_path, BUNDLE, memory_items=0)
    cache.put(KEY, embedding())
    np.testing.assert_array_equal(cache.get(KEY), embedding())


def flipped(content, at):
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:20],
        lambda content: content[:-1],
        lambda content: content + b"\0",
        lambda content: flipped(content, 0),
        lambda content: flipped(content, 20),
        lambda content: flipped(content, 41),
        lambda content: flipped(content, -1 + len(content)),
        lambda content: content[32:],
        lambda content: content.replace(b"(5, 8)", b"(8, 5)"),
    ],
    ids=[
        "empty",
        "cut in the checksum",
        "truncated",
        "longer",
        "digest",
        "digest too",
        "array",
        "value",
        "npy",
        "shape",
    ],
)
def test_a_damaged_file_is_a_miss_and_is_removed(cache, tmp_path, damage):
    cache.put(KEY, embedding())
    (file,) = entries(tmp_path)
    file.write_bytes(damage(file.read_bytes()))
    other = fresh(tmp_path / "cache")
    assert other.get(KEY) is None
    assert not file.exists()
    other.put(KEY, embedding())
    np.testing.assert_array_equal(fresh(tmp_path / "cache").get(KEY), embedding())


def test_an_entry_under_another_name_is_foreign(cache, tmp_path):
    cache.put(KEY, embedding())
    (file,) = entries(tmp_path)
    file.rename(file.with_name("f" * 64 + ".embedding"))
    assert fresh(tmp_path / "cache").get("f" * 64) is None
    assert entries(tmp_path) == []


def test_the_disk_is_bounded_and_the_longest_unused_go_first(tmp_path):
    one = entry_bytes()
    cache = PromptCache(tmp_path, BUNDLE, memory_items=0, disk_bytes=3 * one)
    for age, key in enumerate(["a", "b", "c"]):
        cache.put(key, embedding())
        os.utime(cache.directory / f"{key}.embedding", (1000 + age, 1000 + age))
    assert cache.get("a") is not None  # used again
    cache.put("d", embedding())
    assert [cache.get(key) is not None for key in "abcd"] == [True, False, True, True]
    # Another bundle's entries count as well.
    fresh(tmp_path, "c" * 64, disk_bytes=one).put("e", embedding())
    assert [file.stem for file in entries(tmp_path)] == ["e"]


def test_an_entry_larger_than_the_disk_share_stays_in_memory(tmp_path):
    cache = PromptCache(tmp_path, BUNDLE, disk_bytes=100)
    cache.put(KEY, embedding())
    assert cache.get(KEY) is not None and entries(tmp_path) == []


def test_files_left_by_a_killed_process_are_removed_and_no_others(cache, tmp_path):
    cache.put(KEY, embedding())
    old, young, foreign = (cache.directory / name for name in (".x.part.embedding", ".y.part.embedding", "notes.txt"))
    for file in (old, young, foreign):
        file.write_text("?")
    for file in (old, foreign):
        os.utime(file, (time.time() - 86400,) * 2)
    cache.put("other", embedding())
    assert not old.exists() and young.exists() and foreign.exists()


def check_memory_still_serves(cache, caplog):
    with caplog.at_level(logging.WARNING):
        cache.put(KEY, embedding())
        cache.put("other", embedding())
    np.testing.assert_array_equal(cache.get(KEY), embedding())
    assert len(caplog.records) == 1
    assert "GLIP_DEPLOY_CACHE" in caplog.text


def test_a_directory_that_cannot_be_made(tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    check_memory_still_serves(PromptCache(tmp_path / "file" / "cache", BUNDLE), caplog)


def test_a_read_only_directory(tmp_path, caplog):
    PromptCache(tmp_path, BUNDLE).put("before", embedding())
    folder = tmp_path / BUNDLE[:16]
    folder.chmod(0o500)
    try:
        if os.access(folder, os.W_OK):
            pytest.skip("this user (root, or anyone on Windows) may write to read-only directories")
        cache = PromptCache(tmp_path, BUNDLE)
        np.testing.assert_array_equal(cache.get("before"), embedding())
        check_memory_still_serves(cache, caplog)
    finally:
        folder.chmod(0o700)


@pytest.mark.parametrize("step", ["tempfile.mkstemp", "pathlib.Path.replace"])
def test_a_full_or_forbidden_disk(cache, tmp_path, caplog, monkeypatch, step):
    def refuse(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(step, refuse)
    check_memory_still_serves(cache, caplog)
    assert "No space left on device" in caplog.text
    assert entries(tmp_path) == []  # nothing half-written


WRITER = """
import sys
import numpy as np
from glip_deploy.prompts.cache import PromptCache

directory, seed = sys.argv[1], int(sys.argv[2])
sys.stdin.readline()  # start together
for turn in range(120):
    # Both write the same keys, with room for only some of them, so they replace and evict under each other.
    cache = PromptCache(directory, "b" * 64, memory_items=0, disk_bytes=6 * 40_160)
    key = f"key{turn % 8}"
    value = np.full((100, 100), turn % 8, np.float32)
    cache.put(key, value)
    found = cache.get(f"key{(turn + seed) % 8}")
    assert found is None or (found == (turn + seed) % 8).all(), "torn entry"
"""


def test_two_processes_write_the_same_entries(tmp_path):
    command = [sys.executable, "-W", "error", "-c", WRITER, str(tmp_path)]
    writers = [
        subprocess.Popen([*command, str(seed)], stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for seed in (0, 3)
    ]
    for writer in writers:
        writer.stdin.write("go\n")
        writer.stdin.flush()
    for writer in writers:
        _, complaints = writer.communicate(timeout=60)
        assert writer.returncode == 0 and not complaints, complaints
    assert all(file.suffix == ".embedding" for file in entries(tmp_path))
    assert 1 <= len(entries(tmp_path)) <= 6
    for file in entries(tmp_path):
        np.testing.assert_array_equal(fresh(tmp_path).get(file.stem), np.full((100, 100), int(file.stem[3:])))


def test_threads(tmp_path):
    cache = PromptCache(tmp_path, BUNDLE, memory_items=3)
    wrong = []

    def work(seed):
        for turn in range(40):
            number = (turn * 7 + seed) % 6
            cache.put(f"k{number}", np.full((4, 4), number, np.float32))
            found = cache.get(f"k{(number + 1) % 6}")
            if found is not None and not (found == (number + 1) % 6).all():
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("key", ["", "../x", "a/b", "a.b", "x" * 200])
def test_keys_are_plain_names(cache, key):
    for call in (cache.get, lambda key: cache.put(key, embedding()), lambda key: PromptCache(None, key)):
        with pytest.raises(ValueError, match="letters, digits"):
            call(key)


@pytest.mark.parametrize("bad", [np.zeros(3, np.float32), np.zeros((2, 3)), np.zeros((1, 2, 3), np.float32)])
def test_embeddings_are_two_dimensional_float32(cache, bad):
    with pytest.raises(ValueError, match=r"\(T, D\) float32"):
        cache.put(KEY, bad)


def test_limits_are_not_negative():
    with pytest.raises(ValueError, match="neither may be negative"):
        PromptCache(None, BUNDLE, memory_items=-1)
