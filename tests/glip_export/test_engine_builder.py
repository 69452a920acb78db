"""`glip-export --engine` finds its engine builder by an entry point, and passes the options on."""

from __future__ import annotations

import json
import shutil
import sys
import tomllib
from importlib import metadata
from pathlib import Path
from types import ModuleType

import pytest
from glip_export import bundle_writer, cli, engine_builder
from glip_export.engine_builder import GROUP, find_engine_builder

from glip_deploy.errors import MissingPackage, OptionError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def builder(monkeypatch):
    """A module with the two functions, registered under the group; it notes how it was called."""
    module = ModuleType("a_builder")
    module.checked, module.built = [], []

    def check_options(options):
        module.checked.append(list(options))
        if "--bad" in options:
            raise OptionError("--bad is no option; leave it out")

    def main(argv=None):
        module.built.append(list(argv))
        return 7

    module.check_options, module.main = check_options, main
    monkeypatch.setitem(sys.modules, "a_builder", module)
    register(monkeypatch, metadata.EntryPoint("a", "a_builder", GROUP))
    return module


def register(monkeypatch, *entries):
    monkeypatch.setattr(engine_builder, "entry_points", lambda group: tuple(e for e in entries if e.group == group))


def test_the_bundle_goes_to_the_builder_with_its_options(builder, tiny_checkpoint, tiny_bundle, tmp_path, monkeypatch):
    def export_bundle(checkpoint, output, **_):
        assert (checkpoint, builder.built) == (tiny_checkpoint, [])
        shutil.copytree(tiny_bundle, output)
        return bundle_writer.ExportResult(output, json.loads((output / "manifest.json").read_text()), ())

    monkeypatch.setattr(bundle_writer, "export_bundle", export_bundle)
    target = tmp_path / "out"
    options = "--size '64x64' --name 'a b'"
    status = cli.main(["--model", str(tiny_checkpoint), "--output", str(target), "--quiet", "--engine", options])
    assert status == 7 and target.is_dir()
    words = ["--size", "64x64", "--name", "a b"]
    assert builder.checked == [words] and builder.built == [[str(target), *words, "--quiet"]]


def test_bad_options_are_reported_before_the_export(builder, monkeypatch, capsys):
    monkeypatch.setattr(bundle_writer, "export_bundle", lambda *_, **__: pytest.fail("the export began"))
    assert cli.main(["--model", "none.pth", "--engine=--bad"]) == 1
    assert capsys.readouterr().err == "glip-export: error: --bad is no option; leave it out\n"
    assert builder.built == []


def test_without_a_builder_the_message_names_what_to_install(monkeypatch, capsys):
    register(monkeypatch)
    with pytest.raises(MissingPackage, match=r"none is installed; pip install 'glip-deploy\[build,tensorrt\]'"):
        find_engine_builder()
    assert cli.main(["--model", "none.pth", "--engine"]) == 1
    assert capsys.readouterr().err.startswith("glip-export: error: --engine needs an engine builder")


def test_the_declared_builder_has_both_functions(monkeypatch):
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"][GROUP]
    register(monkeypatch, *(metadata.EntryPoint(name, value, GROUP) for name, value in declared.items()))
    found = find_engine_builder()
    assert callable(found.check_options) and callable(found.main)
