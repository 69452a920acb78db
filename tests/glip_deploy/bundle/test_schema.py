"""The published JSON Schemas are what the code prints, and accept and refuse what the readers do."""

from __future__ import annotations

import json
import subprocess
import sys

import jsonschema
import msgspec
import pytest
from parity_data import ROOT

from glip_deploy.bundle.engines import EngineFile, EngineRecord, PluginRecord, TensorRecord
from glip_deploy.bundle.schema import RECORDS, json_schema


def errors_of(name, content):
    schema = json.loads((ROOT / "docs" / "schema" / f"{name}.json").read_text(encoding="utf-8"))
    validator = jsonschema.Draft202012Validator
    validator.check_schema(schema)
    return [error.message for error in validator(schema).iter_errors(content)]


@pytest.mark.parametrize("name", RECORDS)
def test_the_committed_schema_is_what_the_command_prints(name):
    command = [sys.executable, "-m", "glip_deploy.bundle.schema", name]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    file = ROOT / "docs" / "schema" / f"{name}.json"
    assert file.read_text(encoding="utf-8") == printed, f"run python -m {' '.join(command[2:])} > {file}"


@pytest.mark.parametrize("words", [[], ["bundle"], ["manifest", "engines"]])
def test_another_name_is_bad_usage(words):
    command = [sys.executable, "-m", "glip_deploy.bundle.schema", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr == "usage: python -m glip_deploy.bundle.schema manifest|engines\n"


@pytest.mark.parametrize("bundle", ["tiny_bundle", "nano_bundle"])
def test_the_manifest_of_a_bundle_is_valid(bundle, request):
    manifest = json.loads((request.getfixturevalue(bundle) / "manifest.json").read_text())
    assert errors_of("manifest", manifest) == []


def engine_record():
    tensor = TensorRecord("frames", "uint8", (1, -1, -1, 3))
    shapes = {"frames": ((1, 32, 32, 3), (1, 64, 64, 3), (1, 96, 96, 3))}
    return EngineRecord(
        format_version=EngineRecord.newest,
        flavour="tensorrt-rtx",
        version="1.7",
        compute_capability=80,
        gpu=None,
        precision="fp16",
        form="plugin",
        plugin=PluginRecord("libglip_deform.so", "0" * 64),
        manifest_sha256="1" * 64,
        options="",
        engines={"image.plan": EngineFile("2" * 64, 10, 1.5, (tensor,), (tensor,), (shapes,))},
    )


def test_a_record_of_engines_is_valid():
    assert errors_of("engines", json.loads(msgspec.json.encode(engine_record()))) == []


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.pop("files"),
        lambda m: m.update(format="something else"),
        lambda m: m.update(format_version=2),
        lambda m: m["files"]["text.onnx"].update(sha256="no hash"),
        lambda m: m["config"]["head"].update(nms_iou=7),
        lambda m: m["config"]["input"].update(max_tokens=0),
        lambda m: m["io"].pop("image"),
    ],
)
def test_a_damaged_manifest_is_not(tiny_bundle, change):
    manifest = json.loads((tiny_bundle / "manifest.json").read_text())
    change(manifest)
    assert errors_of("manifest", manifest) != []


def test_keys_of_a_later_writer_are_legal(tiny_bundle):
    manifest = json.loads((tiny_bundle / "manifest.json").read_text())
    manifest["new"] = manifest["files"]["text.onnx"]["new"] = 1
    assert errors_of("manifest", manifest) == []


@pytest.mark.parametrize("record", RECORDS.values())
def test_a_schema_names_its_version(record):
    assert json_schema(record)["title"].endswith(f"format version {record.newest}")
