"""Bundles are checked when they are opened."""

from __future__ import annotations

import gc
import json
import os
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from glip_deploy import Bundle
from glip_deploy.bundle.contract import backbone_contract, head_contract, image_contract, text_contract
from glip_deploy.bundle.manifest import FORMAT_VERSION, Manifest
from glip_deploy.errors import BackendError, BundleError


@pytest.fixture
def bundle(tiny_bundle, tmp_path):
    return shutil.copytree(tiny_bundle, tmp_path / "bundle")


def error_of(path, **options):
    with pytest.raises(BundleError) as caught:
        Bundle.open(path, **options)
    message = str(caught.value)
    assert "\n" not in message and str(path) in message
    return message


def edit_manifest(bundle, change):
    file = bundle / "manifest.json"
    manifest = json.loads(file.read_text())
    change(manifest)
    file.write_text(json.dumps(manifest))


def test_a_whole_bundle_opens(bundle):
    opened = Bundle.open(bundle)
    assert opened.variant == "GLIP (custom)"
    assert (opened.score_threshold, opened.nms_iou, opened.max_detections, opened.max_tokens) == (0.05, 0.6, 100, 256)
    assert opened.tokenizer().encode("dog").tokens == ["[CLS]", "dog", "[SEP]"]


@pytest.mark.parametrize("name", ["image.onnx", "image.onnx.data", "text.onnx", "text.onnx.data", "tokenizer.json"])
def test_a_changed_byte_anywhere(bundle, name):
    file = bundle / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert f"{name} was changed after the export" in error_of(bundle)
    Bundle.open(bundle, verify=False)


@pytest.mark.parametrize("verify", [True, False])
def test_a_missing_or_cut_file(bundle, verify):
    data = bundle / "image.onnx.data"
    data.write_bytes(data.read_bytes()[:-1])
    assert "the manifest says" in error_of(bundle, verify=verify)
    data.unlink()
    assert "lacks image.onnx.data" in error_of(bundle, verify=verify)


def test_a_newer_format(bundle):
    edit_manifest(bundle, lambda m: m.update(format_version=FORMAT_VERSION + 1))
    message = error_of(bundle)
    assert f"has format {FORMAT_VERSION + 1}" in message and "upgrade" in message


def test_keys_of_a_later_writer_are_ignored(bundle):
    plain = Bundle.open(bundle).manifest

    def change(manifest):
        manifest["new"] = {"a": [1, 2]}
        manifest["config"]["head"]["new"] = None
        manifest["files"]["text.onnx"]["new"] = 3

    edit_manifest(bundle, change)
    assert Bundle.open(bundle).manifest == plain


def test_an_older_format_is_brought_to_the_newest(bundle, monkeypatch):
    """Version 2 will have renamed a key; its reader still opens version 1."""

    def rename(content):
        return {**content, "variant": content["name"]}

    edit_manifest(bundle, lambda m: m.update(name=m.pop("variant")))
    monkeypatch.setattr(Manifest, "newest", 2)
    monkeypatch.setattr(Manifest, "migrations", (rename,))
    assert Bundle.open(bundle).variant == "GLIP (custom)"
    edit_manifest(bundle, lambda m: m.update(variant="new", format_version=2))
    assert Bundle.open(bundle).variant == "new"


def test_keys_that_early_exports_lack(bundle):
    def change(manifest):
        for key in ("precision", "parity", "tools"):
            del manifest[key]
        del manifest["checkpoint"]["ignored"]

    edit_manifest(bundle, change)
    assert Bundle.open(bundle).manifest.precision == "fp32"


def test_what_is_read_is_what_was_exported(bundle, tmp_path):
    manifest = Bundle.open(bundle).manifest
    manifest.write_file(tmp_path / "again.json")
    assert json.loads((tmp_path / "again.json").read_text()) == json.loads((bundle / "manifest.json").read_text())
    hidden = manifest.config.bert.hidden
    head = manifest.config.head
    assert manifest.io == {
        "text": text_contract(hidden),
        "image": image_contract(hidden),
        "backbone": backbone_contract(head.channels, head.strides),
        "head": head_contract(hidden, head.channels, head.strides),
    }


@pytest.mark.parametrize("version", ["1", None, [1], 0, -1, True, 1.0])
def test_an_illegal_version(bundle, version):
    edit_manifest(bundle, lambda m: m.update(format_version=version))
    assert f"is damaged (format_version is {version!r})" in error_of(bundle)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.pop("files"),
        lambda m: m.pop("variant"),
        lambda m: m["config"].pop("head"),
        lambda m: m.update(files=["image.onnx"]),
        lambda m: m["files"]["text.onnx"].update(bytes="many"),
        lambda m: m["files"]["text.onnx"].update(bytes=float("inf")),
        lambda m: m["config"]["input"].update(max_tokens=None),
        lambda m: m["config"]["input"].update(max_tokens=0),
        lambda m: m["config"]["head"].update(score_threshold=float("nan")),
        lambda m: m["config"]["head"].update(nms_iou=7),
        lambda m: m["config"]["head"].update(max_detections=-1),
        lambda m: m["files"]["text.onnx"].update(sha256="no hash"),
        lambda m: m["io"].pop("image"),
        lambda m: m["io"]["text"]["inputs"][0].update(shape="batch, tokens"),
    ],
)
def test_a_damaged_manifest(bundle, change):
    edit_manifest(bundle, change)
    assert "is damaged" in error_of(bundle)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\xfe", b"[1]", b"[" * 200_000, b'{"format": "something else"}'],
    ids=["empty", "cut", "not text", "a list", "too deep", "another format"],
)
def test_a_file_that_is_not_a_manifest(bundle, content):
    (bundle / "manifest.json").write_bytes(content)
    message = error_of(bundle)
    assert "manifest.json is damaged" in message and "export the bundle again" in message
    assert len(message) < 400 + len(str(bundle))


def test_a_manifest_that_cannot_be_read(bundle):
    (bundle / "manifest.json").chmod(0)
    if os.access(bundle / "manifest.json", os.R_OK):
        pytest.skip("this user (root, or anyone on Windows) reads every file")
    assert "manifest.json cannot be read" in error_of(bundle)


@pytest.mark.parametrize("name", ["../outside", "sub/../../outside", "/etc/hostname"])
def test_files_outside_the_bundle_are_refused(bundle, name):
    (bundle.parent / "outside").write_text("x")
    edit_manifest(bundle, lambda m: m["files"].update({name: {"sha256": "0" * 64, "bytes": 1}}))
    assert "a file outside the bundle" in error_of(bundle)


def test_a_graph_that_the_manifest_does_not_list(bundle):
    edit_manifest(bundle, lambda m: m["files"].pop("text.onnx"))
    assert "does not list text.onnx" in error_of(bundle)


def test_what_is_not_a_bundle(tmp_path):
    assert "does not exist" in error_of(tmp_path / "none")
    assert "has no manifest.json" in error_of(tmp_path)
    checkpoint = tmp_path / "glip_t.pth"
    checkpoint.touch()
    message = error_of(checkpoint)
    assert "is a file" in message and f"glip-export --model {checkpoint}" in message


def test_a_damaged_tokenizer(bundle):
    (bundle / "tokenizer.json").write_text("{}")
    with pytest.raises(BundleError, match="is not a tokenizer"):
        Bundle(bundle, Manifest.read_file(bundle / "manifest.json", "")).tokenizer()


def test_the_key_is_that_of_the_text_side(bundle):
    opened = Bundle.open(bundle)
    keys = {opened.key}
    for name in opened.files:
        files = {**opened.files, name: msgspec.structs.replace(opened.files[name], sha256="0" * 64)}
        keys.add(replace(opened, manifest=msgspec.structs.replace(opened.manifest, files=files)).key)
    assert len(keys) == 4  # text.onnx, text.onnx.data and tokenizer.json change it


def test_bytes_that_were_not_hashed_have_a_key_of_their_own(bundle):
    """Embeddings of a changed text graph must not be kept under the key of the good one."""
    good = Bundle.open(bundle).key
    file = bundle / "text.onnx.data"
    content = bytearray(file.read_bytes())
    unverified = Bundle.open(bundle, verify=False).key
    assert Bundle.open(bundle, verify=False).key == unverified != good
    content[-1] ^= 1
    file.write_bytes(content)
    changed = Bundle.open(bundle, verify=False).key
    assert changed not in (good, unverified)
    (bundle / "image.onnx.data").touch()
    assert Bundle.open(bundle, verify=False).key == changed


def test_a_library_that_fails_because_of_a_rename_is_asked_again(bundle, tmp_path):
    """ONNX Runtime resolves a path twice, and refuses what lies in another folder the second time."""
    opened, calls = Bundle.open(bundle), []

    def read(folder):
        calls.append(folder)
        if len(calls) == 1:
            bundle.rename(tmp_path / "elsewhere")
            raise BackendError("escapes model directory")
        return (folder / "text.onnx").read_bytes()

    if sys.platform == "linux":
        assert opened.load(read) == (tmp_path / "elsewhere" / "text.onnx").read_bytes() and len(calls) == 2
    with pytest.raises(BackendError, match="of its own"):
        opened.load(lambda folder: (_ for _ in ()).throw(BackendError("of its own")))


def test_a_link_or_new_permissions_change_nothing(bundle, tmp_path):
    opened = Bundle.open(bundle)
    (tmp_path / "link").hardlink_to(bundle / "text.onnx")
    (bundle / "image.onnx").chmod(0o400)
    assert opened.load(lambda folder: (folder / "text.onnx").stat().st_nlink) == 2


def test_a_file_that_is_replaced_while_it_is_read_is_read_again(bundle):
    opened, seen = Bundle.open(bundle), []

    def read(folder):
        seen.append((folder / "text.onnx").read_bytes())
        if len(seen) == 1:  # the same bytes, in another file
            shutil.copyfile(folder / "text.onnx", bundle / "copy")
            (bundle / "copy").replace(bundle / "text.onnx")
        return len(seen)

    assert opened.load(read) == 2
    with pytest.raises(BundleError, match="changes all the time; open it when it is written"):
        opened.load(lambda folder: (bundle / "text.onnx").write_bytes(seen[0]))
    with pytest.raises(BundleError, match=r"text\.onnx was changed since the bundle was opened; open it again"):
        opened.load(lambda folder: (bundle / "text.onnx").write_bytes(seen[0][:-1] + b"x"))


@pytest.mark.skipif(sys.platform != "linux", reason="a folder can be held open on Linux alone")
def test_a_bundle_that_is_replaced_is_not_mixed_with_the_new_one(bundle, tmp_path):
    opened = Bundle.open(bundle)
    bundle.rename(tmp_path / "old")
    bundle.mkdir()
    (bundle / "text.onnx").write_bytes(b"another")
    before = (tmp_path / "old" / "text.onnx").read_bytes()
    assert opened.load(lambda folder: (folder / "text.onnx").read_bytes()) == before
    shutil.rmtree(tmp_path / "old")
    with pytest.raises(BundleError, match="was removed or replaced meanwhile; open it again"):
        opened.load(lambda folder: None)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows does not say when a folder was renamed")
def test_a_bundle_whose_name_another_one_had_for_a_while_is_read_again(bundle, tmp_path):
    """ONNX Runtime resolves the folder to its name, by which it then opens the weights: whose were they?"""
    opened, calls = Bundle.open(bundle), []

    def read(folder):
        calls.append(folder)
        if len(calls) == 1:
            time.sleep(0.02)  # a change of state has the time of a clock that ticks 100 to 1,000 times a second
            bundle.rename(tmp_path / "elsewhere")
            (tmp_path / "elsewhere").rename(bundle)
        return len(calls)

    assert opened.load(read) == 2


@pytest.mark.skipif(sys.platform != "linux", reason="descriptors are listed in /proc/self/fd, which Linux has")
def test_opening_leaves_no_descriptor_behind(bundle):
    gc.collect()
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(20):
        Bundle.open(bundle, verify=False)
    (bundle / "image.onnx").write_bytes(b"")
    for _ in range(20):
        error_of(bundle)
    gc.collect()
    assert len(list(Path("/proc/self/fd").iterdir())) == before


@pytest.mark.parametrize("name", ["x" * 300, "a/" * 3000, "nul\0byte"])
def test_a_name_that_no_folder_can_have(tmp_path, name):
    assert "cannot be read (" in error_of(tmp_path / name)


def test_a_folder_that_may_not_be_read(bundle):
    if os.geteuid() == 0:
        pytest.skip("root reads every folder")
    bundle.chmod(0)
    try:
        assert "cannot be read (Permission denied)" in error_of(bundle)
    finally:
        bundle.chmod(0o755)
