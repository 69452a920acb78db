"""README and docs say what the code does: errors, options, extras, paths, links, the bundle's contract."""

from __future__ import annotations

import functools
import importlib.util
import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
from glip_engines.support import SUPPORT
from parity_data import ROOT
from PIL import Image

from glip_deploy import Detections, Detector, errors
from glip_deploy.backends import PROVIDERS
from glip_deploy.bundle.contract import Stage, image_contract, text_contract
from glip_deploy.video.base import Frame
from glip_deploy.video.video_out import VideoSink

PAGES = sorted((ROOT / "docs").rglob("*.md"))
ROOT_FILES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")]
ROOM_FILES = [
    ROOT / name
    for name in (
        "benchmarks/README.md",
        "engines/precision.md",
        "engines/plugin/README.md",
        "examples/README.md",
        "examples/nano/README.md",
    )
]
TEXTS = [file for file in (*ROOT_FILES, *PAGES, *ROOM_FILES) if file.is_file()]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
COMMANDS = tuple(PROJECT["scripts"])
FOLDERS = "docs|export|engines|benchmarks|examples|tests|glip_deploy|.github"
NAMES_IN_CAPITALS = re.compile(r"(^|[/-])[A-Z]+(\.|/|$)")
"""A part of a path that stands for a name to be filled in, as in benchmarks/results/NAME.json."""
FROM_ELSEWHERE = re.compile(r"<(?:script|link|img|iframe|source)\b[^>]*?(?:src|href)=\"(?:https?:)?//[^>]*>")

BRITISH = (
    "colour|centre|normalis|tokenis|optimis|recognis|synchronis|licence|behaviour|neighbour|flavour|grey|initialis|serialis|"
    "quantis|summaris|organis|minimis|maximis|utilis|visualis|labelled|labelling|cancelled|cancelling|modelled|modelling|"
    "signalled|signalling|travell|analyse|catalogue|favour|honour|defence|learnt|artefact|judgement|fibre|whilst"
)
SOURCES = [
    file
    for folder in (*FOLDERS.split("|"), ".ci")
    for file in sorted((ROOT / folder).rglob("*"))
    if file.suffix in (".py", ".cu", ".cuh", ".h", ".cpp", ".yml", ".toml", ".txt", ".json") or file.name == "run"
]
"""Files whose words are checked beside the documents'."""
SYNTHETIC = ROOT / "examples" / "stand_in" / "synth_weights.py"  # kept byte for byte
SPELLED_SO = re.compile(
    r"[Ff]lavours?(?=\b|_)|_flavours?\b|--flavour|"  # a key of build.json, and so a name in code
    r"center centre|"  # words that a caption may have
    r"CancelledError|"  # asyncio's
    r"\bis_cancelled\b|\bCANCELLED\b|"  # Triton's
    r"mean_difference_grey_levels"  # a key of result files
)

each_text = pytest.mark.parametrize("file", TEXTS, ids=[str(file.relative_to(ROOT)) for file in TEXTS])


def read(file):
    return file.read_text(encoding="utf-8")


def page(name):
    return read(ROOT / "docs" / name)


def rows(text, heading):
    """The first cells, without code marks, of the table below a heading."""
    section = text.split(f"{heading}\n", 1)[1].split("\n#", 1)[0]
    return [
        cell.strip(" `")
        for line in section.splitlines()
        if line.startswith("|") and not line.startswith("|---")
        for cell in [line.split("|")[1]]
    ][1:]


def code(text):
    """Everything in a text that is marked as code: spans, fenced and indented blocks, with continued lines joined."""
    fenced = re.findall(r"^```[^\n]*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    rest = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    indented = re.findall(r"^ {4}(.+)$", rest, re.MULTILINE)
    spans = re.findall(r"`([^`]+)`", rest)
    lines = [line for block in fenced for line in block.replace("\\\n", " ").splitlines()]
    return [*lines, *indented, *(" ".join(span.split()) for span in spans)]


@functools.cache
def hooks():
    spec = importlib.util.spec_from_file_location("build_hooks", ROOT / "docs" / "build_hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def options_of(*command):
    """Every option a command names in its help; None if there is no such command."""
    try:
        text = hooks().help_of(*command, columns=200)
    except subprocess.CalledProcessError:
        return None
    return frozenset(re.findall(r"(?<![\w-])--?[a-z][\w-]*", text))


def test_the_page_of_errors_lists_every_class():
    named = rows(page("reference/errors.md"), "# Errors")
    classes = [name for name in errors.__all__ if isinstance(getattr(errors, name), type)]
    assert sorted(named) == sorted(classes)


def test_the_page_of_gpus_has_the_table_that_builds_go_by():
    section = page("deploy/gpus.md").split("## Which TensorRT for which GPU\n", 1)[1].split("\n#", 1)[0]
    table = [[cell.strip() for cell in line.split("|")[1:4]] for line in section.splitlines() if line.startswith("|")]
    assert table[2:] == [[row.gpus, f"{row.compute_capability / 10}", row.versions] for row in SUPPORT]


def test_the_page_of_gpus_names_every_gpu_backend_of_onnxruntime():
    named = rows(page("deploy/gpus.md"), "## ONNX Runtime's GPU providers")
    assert named == [name for name in PROVIDERS if name != "onnxruntime"]


def test_the_bundle_format_page_states_the_contract():
    text = page("reference/bundle-format.md")
    for heading, contract in (
        ("### Text branch, `text.onnx`", text_contract(768)),
        ("### Image branch, `image.onnx`", image_contract(768, raw_outputs=True)),
    ):
        section = text.split(heading, 1)[1].split("\n#", 1)[0]
        for tensor in (*contract.inputs, *contract.outputs):
            line = next(line for line in section.splitlines() if f"`{tensor.name}`" in line)
            assert tensor.dtype in line, tensor.name
            assert line.count("(") >= 1, tensor.name
    assert rows(text, "### Metadata of nodes") == [stage.value for stage in Stage]


def test_the_bundle_format_page_names_every_key_of_a_manifest(tiny_bundle):
    manifest = json.loads(read(tiny_bundle / "manifest.json"))
    text = page("reference/bundle-format.md")
    keys = {*manifest, *manifest["config"], *manifest["parity"][0]} - {"variant"}
    for part in ("swin", "bert", "head", "input"):
        keys |= set(manifest["config"][part])
    assert [key for key in sorted(keys) if f"`{key}`" not in text] == []


@each_text
def test_options_that_are_named_exist(file):
    wrong = []
    for line in code(read(file)):
        for command, rest in re.findall(rf"(?:^|[ /])({'|'.join(COMMANDS)})\b([^|]*)", line):
            words = re.split(r" #|&&|;", rest)[0].split()
            first = words[0] if words and re.fullmatch(r"[a-z]+", words[0]) else None
            known = (first and options_of(command, first)) or options_of(command)
            assert known, command
            given = [word for word in words if re.match(r"--[a-z]", word)]
            wrong += [f"{command} {word}" for word in given if word.split("=")[0].rstrip(".,") not in known]
    assert wrong == []


@functools.cache
def options_of_all():
    known = {"--help", "--version"}.union(*(options_of(command) for command in COMMANDS))
    subcommands = re.findall(r"^[ │]+([a-z]+) ", hooks().help_of("glip-bench", columns=200), re.MULTILINE)
    return known.union(*(options_of("glip-bench", name) or () for name in subcommands))


@each_text
def test_options_that_stand_alone_belong_to_some_command(file):
    known = options_of_all()
    if file.parent.name == "nano":
        known = known | set(re.findall(r"\"(--[a-z][\w-]*)\"", "".join(map(read, sorted(file.parent.glob("*.py"))))))
    spans = re.findall(r"`(--[a-z][\w-]*)[^`]*`", read(file))
    assert [option for option in spans if option not in known] == []


@each_text
def test_extras_and_make_targets_that_are_named_exist(file):
    text = read(file)
    named = re.findall(r"pip install (?:-e )?['\"]?(?:\.|glip-deploy)\[([\w,-]+)\]", text)
    extras = {extra for group in named for extra in group.split(",")}
    assert extras <= set(PROJECT["optional-dependencies"])
    targets = {target for line in code(text) for target in re.findall(r"^make ([\w-]+)", line)}
    assert targets <= set(re.findall(r"^([\w-]+):", read(ROOT / "Makefile"), re.MULTILINE))


def test_every_extra_is_in_the_table_of_the_guide():
    table = page("guide/install.md")
    assert [extra for extra in PROJECT["optional-dependencies"] if f"[{extra}]" not in table] == []


@each_text
def test_paths_of_the_repository_that_are_named_exist(file):
    missing = []
    for text in code(read(file)):
        for path in re.findall(rf"(?<![\w/.-])((?:{FOLDERS})/[\w./*-]+)", text):
            name = path.rstrip("./")
            if NAMES_IN_CAPITALS.search(name.removesuffix("README.md").removesuffix("CMakeLists.txt")):
                continue
            found = (ROOT / name).exists() or (file.parent / name).exists() or ("*" in name and any(ROOT.glob(name)))
            if not found:
                missing.append(path)
    assert missing == []


def slug(heading):
    """A heading's anchor, as GitHub and Python-Markdown make it for the headings used here."""
    plain = re.sub(r"[`*]|\[([^\]]*)\]\([^)]*\)", r"\1", heading)
    return re.sub(r"[^\w\- ]", "", plain).strip().lower().replace(" ", "-")


def prose(text):
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


@each_text
def test_links_inside_the_repository_resolve(file):
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(read(file))):
        if re.match(r"\w+:", target):
            continue
        name, _, anchor = target.partition("#")
        goal = (file.parent / name).resolve() if name else file
        if not goal.exists():
            broken.append(target)
        elif anchor and goal.suffix == ".md":
            text = prose(read(goal))
            for included in re.findall(r"^<!-- include: (\S+) -->$", text, re.MULTILINE):
                text += prose(read(ROOT / included))
            if anchor not in {slug(heading) for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE)}:
                broken.append(target)
    assert broken == []


@each_text
def test_spelling_is_american(file):
    """Of words outside code; `--flavour` is the name of an option."""
    plain = re.sub(r"`[^`]*`", "", prose(read(file)))
    assert re.findall(rf"\b\w*(?:{BRITISH})\w*", plain, re.IGNORECASE) == []


def test_spelling_is_american_in_code_and_comments():
    found = []
    for file in SOURCES:
        if file in (Path(__file__), SYNTHETIC) or not {"data", "results", "cases"}.isdisjoint(file.parts):
            continue
        for number, line in enumerate(read(file).splitlines(), 1):
            words = re.findall(rf"\b\w*(?:{BRITISH})\w*", SPELLED_SO.sub("", line), re.IGNORECASE)
            found += [f"{file.relative_to(ROOT)}:{number}: {word}" for word in words]
    assert found == []


@each_text
def test_commands_in_sh_blocks_are_shell(file):
    """Every ```sh block parses word by word; one that the tests cannot run says why in the comment before it."""
    text = read(file)
    for block in re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            assert shlex.split(line, comments=True) or not line.split("#")[0].strip(), line
    for reason in re.findall(r"^<!-- not run(.*?)-->$", text, re.MULTILINE):
        assert reason.startswith(": ") and len(reason) > 4
    assert not re.search(r"^<!-- not run.*-->\n(?!```(sh|python)\n)", text, re.MULTILINE)


PYTHON = re.compile(r"(?<!-->\n)^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
"""Blocks of Python, without those whose comment on the line before says why they are not run."""


@pytest.mark.parametrize("file", [file for file in TEXTS if PYTHON.search(read(file))], ids=lambda file: file.stem)
def test_python_blocks_run_as_they_are(file, example_folder, monkeypatch):
    """The blocks of a page run one after another, with the names that the ones before left."""
    monkeypatch.chdir(example_folder)
    monkeypatch.setenv("GLIP_DEPLOY_CACHE", str(example_folder / "cache"))
    monkeypatch.setattr(Detector, "open", functools.partial(Detector.open, shortest_side=128))  # unless it says another
    names: dict[str, object] = {"__name__": "example"}
    for block in PYTHON.findall(read(file)):
        exec(compile(block, str(file), "exec"), names)
    for value in names.values():
        if isinstance(value, Detector):
            value.close()


@pytest.fixture
def example_folder(tiny_bundle, tmp_path):
    """A folder with what the pages' examples read: glip_t/, street.jpg and yard.mp4, all tiny."""
    shutil.copytree(tiny_bundle, tmp_path / "glip_t")
    picture = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    Image.fromarray(picture).save(tmp_path / "street.jpg")
    with VideoSink(tmp_path / "yard.mp4", fps=10.0) as sink:
        for i in range(2):
            sink.write(Frame(picture, "yard", i), Detections.empty())
    return tmp_path


def test_the_site_builds_without_a_warning_and_fetches_nothing(tmp_path):
    if importlib.util.find_spec("mkdocs") is None:
        pytest.skip("mkdocs is not installed; pip install '.[docs]'")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) >= len(PAGES)
    fetched = [tag for file in pages for tag in FROM_ELSEWHERE.findall(read(file)) if 'rel="canonical"' not in tag]
    assert fetched == []
    assert "<!-- include" not in read(tmp_path / "site" / "deploy" / "plugin" / "index.html")
    assert "--source" in read(tmp_path / "site" / "reference" / "commands" / "index.html")


@pytest.mark.parametrize("command", COMMANDS)
def test_the_page_of_commands_shows_every_command(command):
    assert f"<!-- help: {command} -->" in page("reference/commands.md")
