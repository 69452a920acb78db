"""The commands of README and docs are run as they stand there, from the wheel in the clean environment.

Every block marked `sh` is run by a shell in a new folder that holds what the block names (`STAND_INS`). A block with a
comment `<!-- not run: REASON -->` on the line before is skipped, and the reason is printed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from dataclasses import dataclass

import pytest
from parity_data import ROOT
from PIL import Image
from selection import slow

from glip_deploy.results.detections import Detections
from glip_deploy.video.open import open_source
from glip_deploy.video.video_out import VideoSink

MEDIA = ROOT / "examples" / "nano" / "media"
ROOMS = ("benchmarks", "docs", "engines", "examples", "tests")
"""Folders of the repository that commands name by their path. No package is imported from there."""
NOT_RUN = {
    "apt-get": "the machine is set up by whoever runs the tests",
    "make": "CI runs lint and test, where docs is built too; tests/docs checks that a target exists",
    "pip": "tests/test_packaging.py installs every extra",
}
"""Commands that are passed over, and where they are tested instead."""
REPLACED = {r"rtsp://camera/stream": "yard.mp4"}
"""What no test machine has."""
SMALLER = {
    r"^(.*\bglip-(?:detect|batch)) (?=.*--source)": r"\1 --shortest-side 128 ",
    r"^(glip-bench sweep \w+=\w+,\w+),\S+": r"\1",
    r"^glip-bench (run|sweep) .*": r"\g<0> --shortest-side 128 --runs 2 --threads 1",
    r"^glip-bench classes .*": r"\g<0> --shortest-side 128 --runs 1 --threads 1",
    r"^glip-bench (run|sweep|accuracy|grounding) (?!.*--(subjects|predictions)).*": r"\g<0> --subjects onnxruntime-cpu",
}
"""Two values of a sweep, and options that are added, so that a command takes seconds; one that a command has itself
comes later, and counts.

What glip-bench's other subjects give is tested in tests/glip_bench.
"""
SLOW = (
    "benchmarks/README.md",
    "docs/benchmarks/results.md",
    "docs/deploy/batch.md",
    "docs/guide/checkpoints.md",
    "examples/nano/README.md",
)
"""Pages whose commands take longest: they measure, train, export several times, or start a cluster."""
SECONDS = 900
EXPORT = re.compile(r"^(glip-export --model \S+ --output (\S+)/)$", re.MULTILINE)
FENCE = re.compile(r"(?:^<!-- not run: ([^\n]+?) *-->\n)?^```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A block of shell commands of a page."""

    page: str
    line: int
    text: str
    reason: str | None
    """Why it is not run."""

    @property
    def commands(self):
        """Its lines without comments, continued ones joined, without those that are passed over."""
        lines = [re.sub(r"(^|\s+)#.*", "", line) for line in self.text.replace("\\\n", " ").splitlines()]
        return [line for line in lines if line and line.split()[0] not in NOT_RUN]


def blocks():
    files = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")]
    files += [file for room in ROOMS for file in sorted((ROOT / room).rglob("*.md"))]
    for file in files:
        text = file.read_text(encoding="utf-8")
        for found in re.finditer(FENCE, text):
            line = text.count("\n", 0, found.start(2)) + 1
            yield Block(file.relative_to(ROOT).as_posix(), line, found[2], found[1])


BLOCKS = list(blocks())


def test_commands_stand_in_marked_blocks():
    """Commands in an indented block would not be run."""
    programs = "|".join(("glip-[a-z]+", "python3?", "cmake", *NOT_RUN))
    for page in {block.page for block in BLOCKS} | {"engines/plugin/README.md", "examples/nano/README.md"}:
        text = (ROOT / page).read_text(encoding="utf-8")
        assert re.findall(rf"^(?: {{4}}|\t)(?:{programs}) .*", text, re.MULTILINE) == [], page


# -- the folder -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Makers:
    """Make the files that commands name."""

    bundle: object
    checkpoint: object
    nano: object

    def copy_nano(self, target):
        shutil.copytree(self.nano, target)

    def copy_bundle(self, target):
        shutil.copytree(self.bundle, target)

    def copy_checkpoint(self, target):
        shutil.copy(self.checkpoint, target)

    def picture(self, target):
        target.parent.mkdir(exist_ok=True)
        with Image.open(MEDIA / "scene.jpg") as picture:
            picture.resize((96, 64)).save(target)

    def pictures(self, target):
        for name in ("1.jpg", "2.jpg"):
            self.picture(target / name)

    def video(self, target):
        with open_source(MEDIA / "moving.mp4", max_frames=2) as source, VideoSink(target, fps=source.fps) as sink:
            for frame in source:
                sink.write(frame, Detections.empty())

    def coco(self, target):
        box = {"bbox": [8, 8, 40, 30], "area": 1200, "iscrowd": 0}
        target.write_text(
            json.dumps(
                {
                    "images": [{"id": i, "file_name": f"{i}.jpg", "width": 96, "height": 64} for i in (1, 2)],
                    "categories": [{"id": 1, "name": "person"}, {"id": 3, "name": "car"}],
                    "annotations": [{"id": i, "image_id": i, "category_id": 1, **box} for i in (1, 2)],
                }
            )
        )

    def lvis(self, target):
        self.coco(target)
        content = json.loads(target.read_text())
        for category in content["categories"]:
            category["frequency"] = "f"
        for image in content["images"]:
            image |= {"neg_category_ids": [3], "not_exhaustive_category_ids": []}
        target.write_text(json.dumps(content))

    def potholes(self, target):
        self.coco(target)
        target.write_text(target.read_text().replace('"person"', '"pothole"'))

    def prompts(self, target):
        target.write_text('pothole: {prefix: "there are some ", name: holes, suffix: " on the road"}\n')

    def found(self, target):
        target.write_text(json.dumps([{"image_id": 1, "category_id": 1, "bbox": [8, 8, 40, 30], "score": 0.5}]))

    def flickr30k(self, target):
        for name in ("Sentences", "Annotations"):
            (target / name).mkdir(parents=True)
        self.picture(target / "images" / "1.jpg")
        (target / "test.txt").write_text("1\n")
        (target / "Sentences" / "1.txt").write_text("[/EN#7/people a man] with a hat\n")
        box = "<xmin>8</xmin><ymin>8</ymin><xmax>48</xmax><ymax>38</ymax>"
        thing = f"<object><name>7</name><bndbox>{box}</bndbox></object>"
        (target / "Annotations" / "1.xml").write_text(f"<annotation>{thing}</annotation>")

    def captions(self, target):
        phrase = {"span": [2, 5], "boxes": [[8, 8, 48, 38]]}
        target.write_text(json.dumps([{"image": "1.jpg", "caption": "a man with a green hat", "phrases": [phrase]}]))

    def result(self, target):
        shutil.copy(ROOT / "benchmarks" / "results" / "glip_t-cpu-epyc-2core.json", target)


STAND_INS = {
    # path: what makes it, and what in a command asks for it, where that is not the path itself
    "glip_t": (Makers.copy_bundle, r"\bglip_t/"),
    "build/demo/glip_nano": (Makers.copy_nano, r"build/demo/glip_nano|--quick"),
    "glip_t.pth": (Makers.copy_checkpoint, None),
    "glip_tiny_model_o365_goldg_cc_sbu.pth": (Makers.copy_checkpoint, None),
    "street.jpg": (Makers.picture, None),
    "picture.png": (Makers.picture, None),
    "photos": (Makers.pictures, r"\bphotos/"),
    "pictures": (Makers.pictures, r"\bpictures/"),
    "val2017": (Makers.pictures, r"\bval2017/"),
    "yard.mp4": (Makers.video, None),
    "instances_val2017.json": (Makers.coco, None),
    "captions.json": (Makers.captions, None),
    "lvis_v1_minival.json": (Makers.lvis, None),
    "coco": (Makers.pictures, r"\bcoco/"),
    "potholes.json": (Makers.potholes, None),
    "potholes": (Makers.pictures, r"\bpotholes/"),
    "potholes.yaml": (Makers.prompts, None),
    "found.json": (Makers.found, None),
    "flickr30k": (Makers.flickr30k, r"\bflickr30k/"),
    "old.json": (Makers.result, None),
    "new.json": (Makers.result, None),
}
"""Tiny files in place of those that commands name; one that the block itself writes is not made."""


def lay_out(folder, block, makers):
    """Put into a folder what the commands of a block read."""
    text = "\n".join(block.commands)
    written = {path.rstrip("/") for path in re.findall(r"--(?:output|json|coco|report)[ =](\S+)", text)}
    for room in ROOMS:
        (folder / room).symlink_to(ROOT / room)
    for path, (make, pattern) in STAND_INS.items():
        if path not in written and re.search(pattern or re.escape(path), text):
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            make(makers, folder / path)


# -- running --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """What exports of earlier blocks have written, by command: several pages begin with the same one."""
    return tmp_path_factory.mktemp("exported"), {}


@pytest.mark.clean_install
@pytest.mark.skipif(os.name == "nt", reason="the commands are written for a POSIX shell")
@pytest.mark.parametrize(
    "block",
    [
        pytest.param(block, id=f"{block.page}:{block.line}", marks=slow if block.page in SLOW else ())
        for block in BLOCKS
    ],
)
def test_commands_run(block, complete_environment, tiny_bundle, tiny_checkpoint, nano_bundle, exported, tmp_path):
    if block.reason is not None:
        pytest.skip(f"not run: {block.reason}")
    lay_out(tmp_path, block, Makers(tiny_bundle, tiny_checkpoint, nano_bundle))
    script = "\n".join(block.commands)
    for table in (REPLACED, SMALLER):
        for pattern, replacement in table.items():
            script = re.sub(pattern, replacement, script, flags=re.MULTILINE)
    kept, known = exported
    exports = re.findall(EXPORT, script)
    for command, output in exports:
        if command in known:
            script = script.replace(command, f"cp -r {known[command]} {output}")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["PATH"] = os.pathsep.join([str(complete_environment.bin), environment["PATH"]])
    environment["GLIP_DEPLOY_CACHE"] = str(tmp_path / "cache")
    done = subprocess.run(
        ["bash", "-euxo", "pipefail", "-c", script],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=SECONDS,
    )  # fmt: skip
    assert done.returncode == 0, f"{script}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    for command, output in exports:
        if command not in known:
            known[command] = shutil.copytree(tmp_path / output, kept / str(len(known)))
    for path in re.findall(r"--(?:output|json|coco|report)[ =](\S+)", script):
        assert path == "-" or (tmp_path / path).exists(), path
