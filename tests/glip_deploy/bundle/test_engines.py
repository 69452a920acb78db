"""Engines are checked before they are loaded: every way in which they may not belong here is one line."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys

import msgspec
import pytest

from glip_deploy.bundle.engines import (
    BUILD_FILE,
    RECORD_VERSION,
    EngineFile,
    EngineRecord,
    Machine,
    PluginRecord,
    TensorRecord,
    find_engines,
    read_records,
)
from glip_deploy.bundle.manifest import MANIFEST, Bundle
from glip_deploy.errors import EngineError, EngineMismatch
from glip_deploy.files import sha256_of

HERE = Machine("tensorrt", "10.13.0.35", "NVIDIA A100-SXM4-80GB", 80)
OPTIONS = "--precision fp16 --form plugin --size 800x1344"


@pytest.fixture
def bundle(tiny_bundle, tmp_path):
    shutil.copytree(tiny_bundle, tmp_path / "glip")
    return Bundle.open(tmp_path / "glip")


@pytest.fixture
def engines(bundle):
    """A folder of engines that may run on HERE."""
    folder = bundle.path / "engines" / "a100"
    folder.mkdir(parents=True)
    plugin = folder / "libglip_deform.so"
    plugin.write_bytes(b"a library")
    files = {}
    for name in ("text.plan", "image.plan"):
        (folder / name).write_bytes(name.encode() * 10)
        tensor = TensorRecord("frames", "uint8", (1, -1, -1, 3))
        shapes = {"frames": ((1, 32, 32, 3), (1, 64, 64, 3), (1, 96, 96, 3))}
        size = (folder / name).stat().st_size
        files[name] = EngineFile(sha256_of(folder / name), size, 1.5, (tensor,), (tensor,), (shapes,))
    record = EngineRecord(
        format_version=RECORD_VERSION,
        flavour=HERE.flavour,
        version=HERE.version,
        compute_capability=80,
        gpu=HERE.gpu,
        precision="fp16",
        form="plugin",
        plugin=PluginRecord(plugin.name, sha256_of(plugin)),
        manifest_sha256=sha256_of(bundle.path / MANIFEST),
        options=OPTIONS,
        engines=files,
    )
    record.write(folder)
    return folder


def test_what_is_written_is_read(engines):
    record = EngineRecord.read(engines)
    assert record.engines["image.plan"].profiles[0]["frames"][2] == (1, 96, 96, 3)
    again = engines.with_name("again")
    again.mkdir()
    record.write(again)
    assert EngineRecord.read(again) == record
    assert (again / BUILD_FILE).read_text() == (engines / BUILD_FILE).read_text()


def test_engines_where_they_belong_pass(engines, bundle):
    EngineRecord.read(engines).check(engines, bundle, HERE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"flavour": "tensorrt-rtx"}, r"were built for tensorrt, here is tensorrt-rtx"),
        ({"version": "10.15.1"}, r"were built by tensorrt 10\.13\.0\.35, here is 10\.15\.1"),
        ({"compute_capability": 75, "gpu": "Tesla T4"}, r"were built for SM80, here is Tesla T4 \(SM75\)"),
        ({"gpu": "NVIDIA A100-PCIE-40GB"}, r"were built on NVIDIA A100-SXM4-80GB, here is NVIDIA A100-PCIE-40GB"),
    ],
)
def test_another_machine(engines, bundle, change, message):
    machine = dataclasses.replace(HERE, **change)
    with pytest.raises(EngineMismatch, match=message) as caught:
        EngineRecord.read(engines).check(engines, bundle, machine)
    command = f"build again: glip-build {bundle.path} --flavor {machine.flavour} {OPTIONS} --overwrite"
    assert str(caught.value).endswith(command)
    assert "\n" not in str(caught.value)


def test_rtx_engines_run_on_every_gpu_of_their_compute_capability(engines, bundle):
    record = msgspec.structs.replace(EngineRecord.read(engines), flavour="tensorrt-rtx", gpu="NVIDIA A100-SXM4-80GB")
    record.check(engines, bundle, dataclasses.replace(HERE, flavour="tensorrt-rtx", gpu="NVIDIA A30"))


def test_another_bundle(engines, bundle):
    manifest = bundle.path / MANIFEST
    manifest.write_text(manifest.read_text() + "\n")
    with pytest.raises(EngineMismatch, match=r"were built from another export than .*; build again: glip-build"):
        EngineRecord.read(engines).check(engines, Bundle.open(bundle.path), HERE)
    EngineRecord.read(engines).check(engines, bundle, HERE)  # the one that they were built from is still held open


def test_plugin_missing_or_other(engines, bundle):
    record = EngineRecord.read(engines)
    plugin = engines / "libglip_deform.so"
    plugin.write_bytes(b"another library")
    with pytest.raises(EngineMismatch, match="is not the one these engines were built with; build again"):
        record.check(engines, bundle, HERE)
    record.check(engines, bundle, HERE, verify=False)
    plugin.unlink()
    with pytest.raises(EngineMismatch, match=r"lack their plugin library libglip_deform\.so; build again"):
        record.check(engines, bundle, HERE, verify=False)


@pytest.mark.parametrize("verify", [True, False])
def test_a_missing_or_short_engine(engines, bundle, verify):
    record = EngineRecord.read(engines)
    (engines / "image.plan").write_bytes(b"short")
    with pytest.raises(EngineMismatch, match=r"image\.plan was changed or cut short"):
        record.check(engines, bundle, HERE, verify=verify)
    (engines / "image.plan").unlink()
    with pytest.raises(EngineMismatch, match=r"lack image\.plan"):
        record.check(engines, bundle, HERE, verify=verify)


def test_a_changed_byte_is_seen(engines, bundle):
    content = bytearray((engines / "text.plan").read_bytes())
    content[3] ^= 1
    (engines / "text.plan").write_bytes(content)
    with pytest.raises(EngineMismatch, match=r"text\.plan was changed"):
        EngineRecord.read(engines).check(engines, bundle, HERE)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "holds no engines"),
        ("", "is damaged"),
        ('{"format": "glip-deploy engines", "format_version": 0}', "is damaged"),
        ("[]", "is damaged"),
        ('{"format": "other"}', "is damaged"),
        ('{"format": "glip-deploy engines", "format_version": 1}', "is damaged"),
        ('{"format": "glip-deploy engines", "format_version": 99}', "has format 99, this glip-deploy reads up to 1"),
    ],
)
def test_bad_records(tmp_path, content, message):
    if content is not None:
        (tmp_path / BUILD_FILE).write_text(content)
    with pytest.raises(EngineError, match=message) as caught:
        EngineRecord.read(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_record_cannot_name_files_elsewhere(engines, bundle):
    content = json.loads((engines / BUILD_FILE).read_text())
    content["engines"]["../../manifest.json"] = content["engines"].pop("image.plan")
    (engines / BUILD_FILE).write_text(json.dumps(content))
    with pytest.raises(EngineMismatch, match="lack"):
        EngineRecord.read(engines).check(engines, bundle, HERE)


def test_engines_are_found_but_not_those_being_built(engines, bundle):
    assert find_engines(bundle.path.with_name("none")) == []
    (engines.parent / "empty").mkdir()
    shutil.copytree(engines, engines.parent / ".a100-x7")
    assert find_engines(bundle.path) == [engines]
    assert [(folder, record.gpu) for folder, record in read_records(bundle.path)] == [(engines, HERE.gpu)]


def test_it_needs_no_tensorrt():
    code = (
        "import sys, glip_deploy.bundle.engines; print([m for m in sys.modules if m.startswith(('tensorrt', 'onnx'))])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
