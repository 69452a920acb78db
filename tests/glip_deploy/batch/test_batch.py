"""`glip-batch` with a worker in its own process: results, what is done again and what is not, and refusals."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("pyarrow", reason="glip-batch writes Parquet with pyarrow; pip install 'glip-deploy[ray]'")
sys.path.insert(0, str(Path(__file__).resolve().parent))

from batch_runs import (
    FRAMES,
    OPTIONS,
    PICTURES,
    RESULTS,
    command,
    failures,
    finish,
    noise,
    recorded,
    refused,
    results,
    rows,
    run,
    start,
    succeed,
    write_pictures,
    write_video,
)
from PIL import Image
from processes import wait_for

from glip_deploy.cli import detect
from glip_deploy.files import locked_folder

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="process groups and signals as Linux has them")


def detected(bundle, source, folder, monkeypatch, *more):
    """The lines and the COCO results of glip-detect."""
    monkeypatch.chdir(folder)
    outputs = ["--json", "d.jsonl", "--coco", "d.json", "--quiet"]
    assert detect.main(["--model", str(bundle), "--source", source, *OPTIONS, *outputs, *more]) == 0
    lines = [json.loads(line) for line in (folder / "d.jsonl").read_text().splitlines()]
    return lines, (folder / "d.json").read_bytes()


# -- results ----------------------------------------------------------------------------------------------------------


def test_pictures_give_what_glip_detect_gives(here, tiny_bundle, monkeypatch):
    lines, coco = detected(tiny_bundle, "photos", here, monkeypatch)
    assert sum(len(line["detections"]) for line in lines) > 10
    said = succeed(command(tiny_bundle, "photos"), here)
    assert f"{PICTURES} pictures" in said
    found = rows(here / "out")
    assert [row.pop("image_id") for row in found] == list(range(1, PICTURES + 1))  # their names are numbers
    assert [row.pop("time") for row in found] == [None] * PICTURES
    assert [row.pop("frame") for row in found] == [0] * PICTURES
    for line in lines:
        line.pop("frame")
    assert found == lines
    assert (here / "out" / "coco.json").read_bytes() == coco
    assert failures(here / "out") == []


def test_a_picture_without_detections_has_a_row(here, tiny_bundle):
    options = ("--prompt", "dog", "--threshold", "1", "--shortest-side", "64")
    succeed(command(tiny_bundle, "photos", options=options), here)
    assert [row["detections"] for row in rows(here / "out")] == [[]] * PICTURES
    assert (here / "out" / "coco.json").read_text() == "[]\n"


def test_a_video_has_a_row_for_each_frame(mixed, tiny_bundle, tmp_path, monkeypatch):
    lines, _ = detected(tiny_bundle, str(mixed / "media" / "v.mp4"), tmp_path, monkeypatch)
    succeed(command(tiny_bundle, str(mixed / "media" / "v.mp4")), tmp_path)
    found = rows(tmp_path / "out")
    assert [row["frame"] for row in found] == list(range(FRAMES))
    assert [row["time"] for row in found] == pytest.approx([frame / 10 for frame in range(FRAMES)])
    for row in found:
        del row["time"], row["image_id"]
    assert found == lines


@pytest.mark.parametrize("stride", [3, 50])
def test_a_stride_is_that_of_glip_detect(mixed, tiny_bundle, tmp_path, monkeypatch, stride):
    source = str(mixed / "media" / "v.mp4")
    lines, _ = detected(tiny_bundle, source, tmp_path, monkeypatch, "--stride", str(stride))
    succeed(command(tiny_bundle, source, "out", "--stride", str(stride)), tmp_path)
    keys = ("frame", "detections")
    assert [{key: row[key] for key in keys} for row in rows(tmp_path / "out")] == [
        {key: line[key] for key in keys} for line in lines
    ]


def test_pictures_and_videos_together(mixed, tiny_bundle, tmp_path):
    said = succeed(command(tiny_bundle, str(mixed / "media")), tmp_path)
    assert f"{PICTURES} pictures, {FRAMES} frames of videos" in said
    found = rows(tmp_path / "out")
    assert len({(row["source"], row["frame"]) for row in found}) == len(found) == PICTURES + FRAMES
    assert [row["image_id"] for row in found] == list(range(PICTURES + FRAMES))
    coco = json.loads((tmp_path / "out" / "coco.json").read_text())
    assert len(coco) == sum(len(row["detections"]) for row in found)
    assert {one["image_id"] for one in coco} == {row["image_id"] for row in found if row["detections"]}


def test_subfolders_by_a_glob_and_ids_of_an_annotation_file(here, tiny_bundle):
    write_pictures(here / "photos" / "more", 2, first=50)
    images = [{"id": 700 + number, "file_name": f"{number}.png"} for number in (1, 50, 51)]
    categories = [{"id": 10 * place, "name": name} for place, name in enumerate(["dog", "person", "red car"], 1)]
    (here / "ids.json").write_text(json.dumps({"images": images, "categories": categories}))
    succeed(command(tiny_bundle, "photos/**/*.png", "out", "--coco-categories", "ids.json"), here)
    found = {Path(row["source"]).name: row["image_id"] for row in rows(here / "out")}
    assert len(found) == PICTURES + 2 and found["1.png"] == 701 and found["51.png"] == 751 and found["2.png"] == 2
    assert {one["category_id"] for one in json.loads((here / "out" / "coco.json").read_text())} <= {10, 20, 30}


# -- what is done again, and what is not ----------------------------------------------------------------------------


def test_a_run_that_is_complete_is_not_repeated(here, tiny_bundle):
    succeed(command(tiny_bundle, "photos"), here)
    before, parts = results(here / "out"), sorted((here / "out" / "parts").iterdir())
    said = succeed(command(tiny_bundle, "photos"), here)
    assert f"{PICTURES} of {PICTURES} files are done already" in said and "nothing was left to do" in said
    assert results(here / "out") == before and sorted((here / "out" / "parts").iterdir()) == parts


def test_new_and_changed_pictures_are_done_and_removed_ones_go(here, tiny_bundle):
    succeed(command(tiny_bundle, "photos"), here)
    before = {row["source"]: row["detections"] for row in rows(here / "out")}
    Image.fromarray(noise(99)).save(here / "photos" / "2.png")
    os.utime(here / "photos" / "2.png", (1, 1))
    Image.fromarray(noise(100)).save(here / "photos" / "100.png")
    (here / "photos" / "3.png").unlink()
    said = succeed(command(tiny_bundle, "photos"), here)
    assert f"{PICTURES - 2} of {PICTURES} files are done already" in said and "2 in this run" in said
    after = {row["source"]: row["detections"] for row in rows(here / "out")}
    assert after.keys() == before.keys() - {"photos/3.png"} | {"photos/100.png"}
    assert {name for name in before if before[name] != after.get(name)} == {"photos/2.png", "photos/3.png"}
    # A folder in which all is done at once gives the same.
    succeed(command(tiny_bundle, "photos", "again"), here)
    assert results(here / "out").keys() == results(here / "again").keys()
    assert (here / "out" / "coco.json").read_bytes() == (here / "again" / "coco.json").read_bytes()


def test_a_corrupt_picture_is_named_and_tried_again(here, tiny_bundle):
    good = (here / "photos" / "4.png").read_bytes()
    (here / "photos" / "4.png").write_bytes(good[: len(good) // 2])
    (here / "photos" / "5.png").write_bytes(b"")
    status, said = run(command(tiny_bundle, "photos"), here)
    assert status == 1
    assert f"2 of {PICTURES} files failed, listed in out/failures.json" in said.splitlines()[-1]
    assert [one["source"] for one in failures(here / "out")] == ["photos/4.png", "photos/5.png"]
    assert all("\n" not in one["reason"] and one["reason"] for one in failures(here / "out"))
    assert len(rows(here / "out")) == PICTURES - 2
    (here / "photos" / "4.png").write_bytes(good)
    Image.fromarray(noise(5)).save(here / "photos" / "5.png")
    said = succeed(command(tiny_bundle, "photos"), here)
    assert "2 in this run" in said and failures(here / "out") == []
    succeed(command(tiny_bundle, "photos", "again"), here)
    assert rows(here / "out") == rows(here / "again")


def test_a_corrupt_video_is_named(here, tiny_bundle):
    write_video(here / "photos" / "good.mp4", 20)
    (here / "photos" / "bad.mp4").write_bytes(b"no video at all" * 100)
    status, _ = run(command(tiny_bundle, "photos"), here)
    assert status == 1
    (failure,) = failures(here / "out")
    assert failure["source"] == "photos/bad.mp4" and "cannot be opened as a video" in failure["reason"]
    assert len(rows(here / "out")) == PICTURES + 20


def test_a_damaged_part_is_done_again(here, tiny_bundle):
    succeed(command(tiny_bundle, "photos"), here)
    before = results(here / "out")
    part = next((here / "out" / "parts").iterdir())
    data = bytearray(part.read_bytes())
    data[len(data) // 2] ^= 1
    part.write_bytes(data)
    (here / "out" / "parts" / ".left.part.jsonl").write_text("half")
    said = succeed(command(tiny_bundle, "photos"), here)
    assert "is damaged" in said and results(here / "out") == before
    assert not part.exists() and not list((here / "out").rglob(".*"))


@linux_only
def test_killed_at_any_moment_it_goes_on_to_the_same_results(mixed, tiny_bundle, tmp_path):
    """Kill -9 of the process group until a run comes through; the number of kills is limited, the moments are drawn."""
    arguments = command(tiny_bundle, str(mixed / "media"))
    began = time.monotonic()
    succeed(command(tiny_bundle, str(mixed / "media"), "whole"), tmp_path)
    seconds, draw, kept = time.monotonic() - began, random.Random(0), []
    for _ in range(2):  # tests/faults has more, with GLIP_SLOW=1
        process = start(arguments, tmp_path)
        time.sleep(draw.uniform(0.3, seconds))
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate(timeout=60)
        kept.append(recorded(tmp_path / "out"))
        for name in RESULTS:  # whole, or not there
            if (tmp_path / "out" / name).exists():
                assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    succeed(arguments, tmp_path)
    assert kept == sorted(kept)  # what is recorded stays
    assert results(tmp_path / "out") == results(tmp_path / "whole")
    assert not list((tmp_path / "out").rglob(".*"))


@linux_only
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_keeps_what_is_done(here, tiny_bundle, number, status):
    write_video(here / "photos" / "v.mp4", 160)
    arguments = command(tiny_bundle, "photos")
    process = start(arguments, here)
    wait_for(lambda: recorded(here / "out"))
    os.killpg(process.pid, number)
    found, said = finish(process)
    assert found == status and said.splitlines()[-1] == "glip-batch: interrupted", said
    done = recorded(here / "out")
    assert not list((here / "out").rglob(".*")) and not (here / "out" / "detections.parquet").exists()
    said = succeed(arguments, here)
    assert recorded(here / "out") == PICTURES + 160 // 16  # nothing is there twice
    assert done >= 1 and len(rows(here / "out")) == PICTURES + 160


# -- refusals -------------------------------------------------------------------------------------------------------


def test_another_job_in_the_folder_is_refused(here, tiny_bundle, tmp_path_factory):
    succeed(command(tiny_bundle, "photos"), here)
    before = results(here / "out")
    again = command(tiny_bundle, "photos")
    refused(
        [*again, "--threshold", "0.3"],
        here,
        "holds another job",
        "its --threshold is [0.2, 0.2, 0.2], not [0.3, 0.3, 0.3]",
    )
    other = ("--prompt", "cat", "--threshold", "0.2", "--shortest-side", "64")
    refused(command(tiny_bundle, "photos", options=other), here, "its prompt is", "'cat", "choose another folder")
    refused(command(tiny_bundle, "photos/*.png"), here, "its source is 'photos', not 'photos/*.png'")
    copy = shutil.copytree(tiny_bundle, tmp_path_factory.mktemp("copy") / "bundle")
    succeed(command(copy, "photos"), here)  # the same bundle elsewhere
    with (copy / "manifest.json").open("a") as manifest:
        manifest.write("\n")
    refused(command(copy, "photos"), here, "it was begun with another bundle")
    assert results(here / "out") == before


def test_parts_of_another_job_are_refused(here, tiny_bundle):
    succeed(command(tiny_bundle, "photos"), here)
    other = ("--prompt", "cat", "--threshold", "0.2", "--shortest-side", "64")
    succeed(command(tiny_bundle, "photos", "other", options=other), here)
    shutil.copy(next((here / "other" / "parts").iterdir()), here / "out" / "parts")
    refused(command(tiny_bundle, "photos"), here, "belongs to another job", "remove it")


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no lock for a folder")
def test_two_runs_into_one_folder(here, tiny_bundle):
    (here / "out").mkdir()
    with locked_folder(here / "out", "glip-batch") as locked:
        assert locked
        refused(command(tiny_bundle, "photos"), here, "output folder out is in use by another glip-batch")
    assert list((here / "out").iterdir()) == []
    succeed(command(tiny_bundle, "photos"), here)


def test_what_somebody_else_wrote_is_not_replaced(here, tiny_bundle):
    (here / "out").mkdir()
    (here / "out" / "coco.json").write_text("mine")
    refused(command(tiny_bundle, "photos"), here, "has a coco.json that no glip-batch wrote")
    assert (here / "out" / "coco.json").read_text() == "mine"
    (here / "out" / "coco.json").unlink()
    (here / "out" / "job.json").write_text("{}")
    refused(command(tiny_bundle, "photos"), here, "job.json is damaged", "choose another folder")


def test_sources_that_give_nothing(here, tiny_bundle):
    (here / "empty").mkdir()
    refused(command(tiny_bundle, "empty"), here, "folder empty holds no pictures and no videos")
    refused(command(tiny_bundle, "photos/*.bmp"), here, "glob photos/*.bmp matches no pictures and no videos")
    refused(command(tiny_bundle, "nowhere"), here, "source nowhere does not exist")
    refused(command(tiny_bundle, "rtsp://camera/stream"), here, "is a camera or a stream", "use glip-detect")
    assert not (here / "out").exists()


def test_outputs_that_cannot_be_written(here, tiny_bundle):
    (here / "file").write_text("")
    refused(command(tiny_bundle, "photos", "file"), here, "output folder file: file is a file")
    refused(command(tiny_bundle, "photos", "file/out"), here, "output folder file/out: file is a file")


def test_a_bundle_or_prompt_that_cannot_be_used(here, tiny_bundle):
    refused(command(here / "none", "photos"), here, "does not exist; make a bundle")
    refused(command(tiny_bundle, "photos", options=("--prompt", "...")), here, "prompt")
    long = ("--prompt", " ".join(["traffic light"] * 200) + ". dog")
    refused(command(tiny_bundle, "photos", options=long), here, "tokens")
    assert not (here / "out").exists()


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--workers", "0"], ["--workers", "at least 1"]),
        (["--gpus-per-worker", "1.5", "--backend", "tensorrt"], ["--gpus-per-worker", "fraction"]),
        (["--gpus-per-worker", "1"], ["--gpus-per-worker", "onnxruntime", "runs on the CPU"]),
        (["--prompt-file", "x"], ["--prompt", "not allowed"]),
        (["--backend", "none"], ["--backend", "unknown", "openvino"]),
    ],
)
def test_bad_usage(here, tiny_bundle, options, parts):
    refused(command(tiny_bundle, "photos", "out", *options), here, *parts, status=2)


def test_pyarrow_is_asked_for_by_name(here, tiny_bundle):
    (here / "stub").mkdir()
    (here / "stub" / "pyarrow.py").write_text("raise ImportError('No module named pyarrow')")
    refused(command(tiny_bundle, "photos"), here, "needs PyArrow", "glip-deploy[ray]", first=[here / "stub"])
