"""Whether subjects are right: average precision, or recall of grounded phrases; an interrupted run continues."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glip_bench.quality.coco import Precision, Set, average_precision, read_found, read_set, xywh
from glip_bench.quality.custom_prompts import read_custom_prompts
from glip_bench.quality.flickr import read_entities
from glip_bench.quality.grounding import read_phrases, recall
from glip_bench.quality.lvis import CLASSES_PER_PROMPT, DETECTIONS, lvis_precision
from glip_bench.subjects.base import Options
from glip_bench.subjects.open import choose, open_subjects
from glip_deploy.bundle.manifest import Bundle
from glip_deploy.cli.console import frame_progress
from glip_deploy.errors import GlipError, OptionError
from glip_deploy.files import not_written, sha256_of, write_atomically
from glip_deploy.frames import load_image
from glip_deploy.prompts.syntax import ClassName
from glip_deploy.prompts.tokens import parse_prompt

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from glip_bench.subjects.base import Subject
    from glip_deploy.results.detections import Detections

__all__ = ["Task", "best_boxes", "judge", "measure", "prompts_that_fit", "render_accuracy"]

Job = tuple[Path, str, Any]
"""Picture, key in the work file, prompt."""
Rows = Mapping[str, Any]
"""What one subject found: boxes, scores and labels by key."""
BEST = 300
"""Boxes a picture, over all prompts together, as the official evaluation of large sets has it. A prompt gives 100 at
most, of LVIS 300; COCO itself counts 100 a picture and class."""
LOSERS = 10


@dataclass(frozen=True)
class Task:
    """What is measured."""

    options: Options
    subjects: tuple[str, ...] | None
    annotations: Path
    images: Path
    grounding: bool = False
    """The annotations are captions with phrases, see `grounding.read_phrases`."""
    limit: int | None = None
    """Only so many pictures, the first ones."""
    classes_per_prompt: int | None = None
    """At most; None for as many as fit, of LVIS 40."""
    prompts: Path | None = None
    """What to ask for in place of the classes' names, see `custom_prompts.read_custom_prompts`."""


def prompts_that_fit(
    names: Sequence[str | ClassName], tokenizer: Tokenizer, max_tokens: int, at_most: int | None = None
) -> list[list[str | ClassName]]:
    """Cut a list of names into prompts, in order, each as long as tokens (and `at_most`) allow.

    The official evaluation asks for COCO's 80 classes at once, and for those of larger sets 40 at a time
    (`maskrcnn_benchmark/engine/inference.py`, `create_queries_and_maps_from_dataset`, `TEST.CHUNKED_EVALUATION`).

    Raises:
        PromptError: a name that does not fit into a prompt by itself, or is no name at all.
    """
    prompts: list[list[str | ClassName]] = []
    for name in names:
        longer = [*prompts[-1], name] if prompts else [name]
        if prompts and (at_most is None or len(longer) <= at_most):
            try:
                parse_prompt(longer, tokenizer, max_tokens=max_tokens)
            except GlipError:
                pass  # too long, or a name that is refused: by itself the reason is plain
            else:
                prompts[-1] = longer
                continue
        parse_prompt([name], tokenizer, max_tokens=max_tokens)
        prompts.append([name])
    return prompts


def measure(
    task: Task,
    work: Path,
    resume: bool = False,
    on_step: Callable[[str], None] = lambda step: None,
    *,
    progress: bool = False,
) -> dict[str, Any]:
    """Run every subject over the set and return a result file's content.

    Args:
        task: see `Task`.
        work: folder of what was found so far, a file a subject.
        resume: continue with what is in the folder; otherwise start anew.
        on_step: called with the name of each step as it begins.
        progress: show a bar on a terminal.

    Raises:
        GlipError: a damaged set, a picture that cannot be read, whatever a subject raises; a work file of another task.
    """
    names, absent = choose(task.subjects, task.options)
    bundle = Bundle.open(task.options.bundle)
    data = _Grounded(task) if task.grounding else _Labeled(task, bundle)
    identity = _identity(task, bundle)
    options = replace(task.options, threshold=0.0, max_detections=data.max_detections)
    found: dict[str, dict[str, Any]] = {}
    for name in names:
        ((subject, _),) = open_subjects([name], options, on_step)
        work_file = _WorkFile(work / f"{name}.jsonl", {**identity, "subject": str(name)})
        try:
            rows = found[str(name)] = work_file.read() if resume else {}
            missing = [job for job in data.jobs if job[1] not in rows]
            on_step(f"{name}: {len(missing)} of {len(data.jobs)} pictures and prompts")
            with work_file.open(rows) as keep, frame_progress(len(missing), str(name), show=progress) as advance:
                for key, row in _detect(subject, missing):
                    rows[key] = row
                    keep(key, row)
                    advance()
        finally:
            subject.close()
    return {
        "schema": 1,
        "kind": "grounding" if task.grounding else "accuracy",
        "model": bundle.variant,
        "bundle": bundle.key,
        "set": task.annotations.name,
        "pictures": len({job[0] for job in data.jobs}),
        "absent": absent,
        **data.results(found),
    }


def judge(annotations: Path, predictions: Path) -> dict[str, Any]:
    """Return a result file's content for results in COCO's format that are there already; nothing is run.

    Raises:
        OptionError: a damaged set or results, or results that are not of its pictures and categories.
        MissingPackage: the package that computes average precision is not installed.
    """
    data = read_set(annotations, None)
    precision = _precision(data, read_found(predictions, data))
    return {
        "schema": 1,
        "kind": "accuracy",
        "model": predictions.name,
        "set": annotations.name,
        "pictures": len(data.pictures),
        "absent": {},
        **_compared({"predictions": precision}),
    }


def _precision(data: Set, found: Sequence[Mapping[str, Any]]) -> Precision:
    return average_precision(data, found) if data.federation is None else lvis_precision(data, found)


def _compared(precisions: Mapping[str, Precision]) -> dict[str, Any]:
    """Return the figures of every subject, and their differences from those of the first."""
    first = next(iter(precisions.values()))
    return {
        "subjects": {
            name: {
                "figures": {key: _number(value) for key, value in own.figures.items()},
                "difference": {key: _number(value - first.figures[key]) for key, value in own.figures.items()},
                "losers": _losers(first, own),
            }
            for name, own in precisions.items()
        }
    }


class _Labeled:
    """A set of labeled boxes, in the form of COCO or LVIS, whose classes are the prompts."""

    def __init__(self, task: Task, bundle: Bundle) -> None:
        self.data = read_set(task.annotations, task.images, task.limit)
        lvis = self.data.federation is not None
        self.max_detections = DETECTIONS if lvis else None
        names = [name for _, name in (sorted(self.data.categories) if lvis else self.data.categories)]
        asked: Mapping[str, str | ClassName] = {}
        if task.prompts is not None:
            asked = read_custom_prompts(task.prompts, self.data.categories)
        at_most = task.classes_per_prompt or (CLASSES_PER_PROMPT if lvis else None)
        wanted = [asked.get(name, name) for name in names]
        self.prompts = prompts_that_fit(wanted, bundle.tokenizer(), bundle.max_tokens, at_most)
        left = iter(names)
        self.names = [[next(left) for _ in prompt] for prompt in self.prompts]
        self.jobs: list[Job] = [
            (picture.file, f"{picture.id}/{number}", prompt)
            for number, prompt in enumerate(self.prompts)
            for picture in self.data.pictures
        ]

    def results(self, found: Mapping[str, Rows]) -> dict[str, Any]:
        """Return this set's part of a result file; the other subjects are compared with the first."""
        precisions = {}
        lvis = self.data.federation is not None
        for name, rows in found.items():
            best = (
                best_boxes(self.data.numbers, self.names, rows, picture.id, None if lvis else BEST, last_pixel=not lvis)
                for picture in self.data.pictures
            )
            precisions[name] = _precision(self.data, [one for some in best for one in some])
        return {"prompts": len(self.prompts), **_compared(precisions)}


class _Grounded:
    """Captions with phrases; each caption is a prompt."""

    max_detections = None

    def __init__(self, task: Task) -> None:
        read = read_entities if task.annotations.suffix == ".txt" else read_phrases
        self.pictures = read(task.annotations, task.images, task.limit)
        self.jobs: list[Job] = [(one.file, str(number), one.caption) for number, one in enumerate(self.pictures)]

    def results(self, found: Mapping[str, Rows]) -> dict[str, Any]:
        """Return this set's part of a result file."""
        return {
            "phrases": sum(len(one.boxes) for one in self.pictures),
            "subjects": {name: recall(self.pictures, rows) for name, rows in found.items()},
        }


def _number(value: float) -> float | None:
    return None if math.isnan(value) else round(value, 4)


def _losers(first: Precision, other: Precision) -> list[list[Any]]:
    """Return the classes that lose most against the first subject: [name, AP there, AP here]."""
    rows = [(name, first.by_class[name], ap) for name, ap in other.by_class.items()]
    rows = [row for row in rows if row[2] < row[1] - 1e-9]
    rows.sort(key=lambda row: row[2] - row[1])
    return [[name, round(there, 3), round(here, 3)] for name, there, here in rows[:LOSERS]]


def _identity(task: Task, bundle: Bundle) -> dict[str, Any]:
    """Return what a work file must agree in to be continued."""
    options = task.options
    return {
        "bundle": bundle.key,
        "annotations_sha256": sha256_of(task.annotations),
        "images": str(task.images.resolve()),
        "shortest_side": options.shortest_side,
        "longest_side": options.longest_side,
        "grounding": task.grounding,
        "classes_a_prompt": task.classes_per_prompt,
        "prompts_sha256": None if task.prompts is None else sha256_of(task.prompts),
    }


@dataclass(frozen=True)
class _WorkFile:
    """What a subject has found so far: a line that identifies the task, then a line for each picture and prompt."""

    file: Path
    identity: Mapping[str, Any]

    @contextlib.contextmanager
    def open(self, rows: Rows) -> Iterator[Callable[[str, Any], None]]:
        """Write the file anew with these rows; give a function that adds one to it."""
        lines = [json.dumps(dict(self.identity)), *(json.dumps([key, row]) for key, row in rows.items())]
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self.file, "\n".join(lines) + "\n")  # without the torn last line of an interruption
            with self.file.open("a", encoding="utf-8", buffering=1) as stream:
                yield lambda key, row: print(json.dumps([key, row]), file=stream)
        except OSError as error:
            raise not_written(self.file, error) from None

    def read(self) -> dict[str, Any]:
        """Return the rows of an interrupted run.

        Raises:
            OptionError: the file is of another task, or cannot be read.
        """
        if not self.file.is_file():
            return {}
        try:
            first, *lines = self.file.read_text(encoding="utf-8").splitlines()
            header = json.loads(first)
        except OSError as error:
            reason = f"cannot be read ({error.strerror or error})"
        except ValueError:
            reason = "is damaged"
        else:
            known = header if isinstance(header, dict) else {}
            other = [key for key in self.identity if known.get(key) != self.identity[key]]
            if not other:
                return dict(_whole(lines))
            reason = f"is of another {other[0].removesuffix('_sha256')}"
        raise OptionError(f"--resume: {self.file} {reason}; start anew without --resume")


def _whole(lines: Iterable[str]) -> Iterator[tuple[str, Any]]:
    """Yield rows up to the one that was torn by an interruption, if there is one."""
    for line in lines:
        try:
            key, row = json.loads(line)
        except ValueError:
            return
        yield key, row


def _detect(subject: Subject, jobs: Iterable[Job]) -> Iterator[tuple[str, Any]]:
    if subject.shares_frames:
        by_picture: dict[Path, list[Job]] = {}
        for job in jobs:
            by_picture.setdefault(job[0], []).append(job)
        for file, group in by_picture.items():
            detections = subject.run_prompts(load_image(file), [prompt for _, _, prompt in group])
            yield from ((key, _row(one)) for (_, key, _), one in zip(group, detections, strict=True))
        return
    asked: Any = None
    for file, key, prompt in jobs:
        if prompt is not asked:
            subject.prepare(prompt)
            asked = prompt
        yield key, _row(subject.run(load_image(file)))


def _row(found: Detections) -> dict[str, Any]:
    return {
        "boxes": [[round(float(value), 2) for value in box] for box in found.boxes],
        "scores": [round(float(score), 6) for score in found.scores],
        "labels": [int(label) for label in found.labels],
    }


def best_boxes(
    numbers: Mapping[str, int],
    prompts: Sequence[Sequence[str]],
    rows: Rows,
    picture: int,
    count: int | None = BEST,
    last_pixel: bool = True,
) -> list[dict[str, Any]]:
    """Return the best boxes of a picture over all prompts, as COCO results.

    Args:
        numbers: category by name.
        prompts: the classes of each prompt, as the set names them.
        rows: what was found, by "picture/prompt".
        picture: its id.
        count: so many; None for all.
        last_pixel: whether a width counts it, as in COCO's evaluation and not in LVIS's.
    """
    merged = []
    for index, prompt in enumerate(prompts):
        row = rows[f"{picture}/{index}"]
        merged += [
            (score, numbers[prompt[label]], box)
            for score, label, box in zip(row["scores"], row["labels"], row["boxes"], strict=True)
        ]
    merged.sort(key=lambda one: -one[0])
    return [
        {"image_id": picture, "category_id": category, "bbox": xywh(box, last_pixel), "score": score}
        for score, category, box in merged[:count]
    ]


def render_accuracy(result: Mapping[str, Any]) -> str:
    """Return a result as text."""
    subjects: Mapping[str, Any] = result["subjects"]
    head = f"{result['model']} on {result['set']}: {result['pictures']} pictures"
    counts = {"phrases": "phrases", "prompts": "prompts each"}
    head += "".join(f", {result[key]} {words}" for key, words in counts.items() if key in result)
    lines = [head, *(f"not here: {name}: {reason}" for name, reason in result["absent"].items()), ""]
    figures = next(iter(subjects.values()))["figures"]
    lines.append(f"{'':<22}" + "".join(f"{name:>11}" for name in figures))
    for name, facts in subjects.items():
        lines.append(f"{name:<22}" + "".join(_cell(value) for value in facts["figures"].values()))
    for name, facts in subjects.items():
        if "R@1 by kind" in facts:
            kinds = ", ".join(f"{kind} {value:.2f}" for kind, value in facts["R@1 by kind"].items())
            lines.append(f"{name}, R@1 by kind: {kinds}")
    first, *others = subjects
    for name in others:
        difference = subjects[name].get("difference")
        if difference is None:
            continue
        lines.append(f"{'  less ' + first:<22}" if len(others) == 1 else f"{name + ' less ' + first}")
        lines[-1] += "".join(_cell(value, "+.3f") for value in difference.values())
        for loser, there, here in subjects[name]["losers"]:
            lines.append(f"    {loser}: {there:.2f} -> {here:.2f}")
    return "\n".join(lines)


def _cell(value: float | None, form: str = ".2f") -> str:
    return f"{'-' if value is None else format(value, form):>11}"
