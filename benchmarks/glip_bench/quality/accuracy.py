"""Is it still right? COCO average precision, or recall of grounded phrases, of any subject; resumable."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glip_bench.quality.coco import Precision, Set, average_precision, read_set
from glip_bench.quality.grounding import Phrases, read_phrases, recall
from glip_bench.subjects.base import Options
from glip_bench.subjects.open import choose, open_subjects
from glip_deploy.bundle.manifest import Bundle
from glip_deploy.errors import GlipError
from glip_deploy.frames import load_image
from glip_deploy.prompts.tokens import parse_prompt

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from glip_bench.subjects.base import Subject
    from glip_deploy.results.detections import Detections

__all__ = ["Task", "measure", "prompts_that_fit", "render_accuracy"]

Job = tuple[Path, str, Any]
"""Picture, key in the work file, prompt."""
BEST = 300
"""Boxes a picture, over all prompts together, as the official evaluation of large sets has it. A prompt gives 100 at
most; COCO itself counts 100 a picture and class."""
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
    classes_a_prompt: int | None = None
    """At most; None for as many as fit."""


def prompts_that_fit(
    names: Sequence[str], tokenizer: Tokenizer, max_tokens: int, at_most: int | None = None
) -> list[list[str]]:
    """Cut a list of names into prompts, in order, each as long as tokens (and `at_most`) allow.

    The official evaluation asks for COCO's 80 classes at once, and for those of larger sets 40 at a time.

    Raises:
        GlipError: a name that does not fit into a prompt by itself, or is none at all.
    """
    prompts: list[list[str]] = []
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
    task: Task, work: Path, resume: bool = False, on_step: Callable[[str], None] = lambda step: None
) -> dict[str, Any]:
    """Run every subject over the set and return a result file's content.

    Args:
        task: see `Task`.
        work: folder of what was found so far, a file a subject.
        resume: go on with it; otherwise it is begun anew.
        on_step: told what begins.

    Raises:
        GlipError: a damaged set, a picture that cannot be read, whatever a subject raises; a work file of another task.
    """
    names, absent = choose(task.subjects, task.options)
    bundle = Bundle.open(task.options.bundle)
    phrases: Phrases | None = None
    data: Set | None = None
    if task.grounding:
        phrases = read_phrases(task.annotations, task.images, task.limit)
        jobs: list[Job] = [(item.file, str(number), item.caption) for number, item in enumerate(phrases.pictures)]
    else:
        data = read_set(task.annotations, task.images, task.limit)
        prompts = prompts_that_fit(
            [name for _, name in data.categories], bundle.tokenizer(), bundle.max_tokens, task.classes_a_prompt
        )
        jobs = [
            (picture.file, f"{picture.id}/{number}", prompt)
            for number, prompt in enumerate(prompts)
            for picture in data.pictures
        ]
    identity = _identity(task, bundle)
    found: dict[str, dict[str, Any]] = {}
    for name in names:
        subject, _ = next(iter(open_subjects([name], replace(task.options, threshold=0.0), on_step)))
        try:
            file = work / f"{name}.jsonl"
            found[str(name)] = _run(subject, jobs, file, {**identity, "subject": str(name)}, resume, on_step)
        finally:
            subject.close()
    result: dict[str, Any] = {
        "schema": 1,
        "kind": "grounding" if task.grounding else "accuracy",
        "model": bundle.variant,
        "bundle": bundle.key,
        "set": task.annotations.name,
        "pictures": len({job[0] for job in jobs}),
        "absent": absent,
    }
    if phrases is not None:
        result["phrases"] = sum(len(item.boxes) for item in phrases.pictures)
        result["subjects"] = {name: recall(phrases, rows) for name, rows in found.items()}
        return result
    assert data is not None
    result["prompts"] = len(prompts)
    result["subjects"] = {}
    first: Precision | None = None
    for subject_name, rows in found.items():
        precision = average_precision(data, list(_best(data, prompts, rows)))
        first = first or precision
        result["subjects"][subject_name] = {
            "figures": {key: _number(value) for key, value in precision.figures.items()},
            "difference": {key: _number(value - first.figures[key]) for key, value in precision.figures.items()},
            "losers": _losers(first, precision),
        }
    return result


def _number(value: float) -> float | None:
    return None if math.isnan(value) else round(value, 4)


def _losers(first: Precision, other: Precision) -> list[list[Any]]:
    """The classes that lose most against the first subject: [name, AP there, AP here]."""
    rows = [(name, first.by_class[name], ap) for name, ap in other.by_class.items()]
    rows = [row for row in rows if row[2] < row[1] - 1e-9]
    rows.sort(key=lambda row: row[2] - row[1])
    return [[name, round(there, 3), round(here, 3)] for name, there, here in rows[:LOSERS]]


def _identity(task: Task, bundle: Bundle) -> dict[str, Any]:
    """What a work file must agree in to be gone on with."""
    options = task.options
    return {
        "bundle": bundle.key,
        "annotations_sha256": hashlib.sha256(task.annotations.read_bytes()).hexdigest(),
        "images": str(task.images.resolve()),
        "shortest_side": options.shortest_side,
        "longest_side": options.longest_side,
        "grounding": task.grounding,
        "classes_a_prompt": task.classes_a_prompt,
    }


def _run(
    subject: Subject,
    jobs: Sequence[Job],
    file: Path,
    identity: Mapping[str, Any],
    resume: bool,
    on_step: Callable[[str], None],
) -> dict[str, Any]:
    """Run what the work file does not hold yet; returns all rows by key."""
    rows = _read_work(file, identity) if resume else {}
    missing = [job for job in jobs if job[1] not in rows]
    on_step(f"{subject.name}: {len(missing)} of {len(jobs)} pictures and prompts")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps(identity), *(json.dumps([key, row]) for key, row in rows.items())]
        whole = file.with_name(f"{file.name}.new")  # what was kept is never at risk, and a torn last line goes
        whole.write_text("\n".join(lines) + "\n", encoding="utf-8")
        whole.replace(file)
        with file.open("a", encoding="utf-8") as stream:
            for key, row in _detect(subject, missing):
                rows[key] = row
                stream.write(json.dumps([key, row]) + "\n")
                stream.flush()
    except OSError as error:
        raise GlipError(f"{file}: writing failed ({error.strerror or error})") from None
    return rows


def _read_work(file: Path, identity: Mapping[str, Any]) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
        header = json.loads(lines[0])
    except OSError as error:
        raise GlipError(f"--resume: {file} cannot be read ({error.strerror or error}); start anew") from None
    except (IndexError, ValueError):
        raise GlipError(f"--resume: {file} is damaged; start anew without --resume") from None
    if header != dict(identity):
        other = next(
            (key for key in identity if not isinstance(header, dict) or header.get(key) != identity[key]), "set"
        )
        raise GlipError(f"--resume: {file} is of another {other.removesuffix('_sha256')}; start anew without --resume")
    rows = {}
    for line in lines[1:]:
        try:
            key, row = json.loads(line)
        except ValueError:
            break  # torn by the interruption
        rows[key] = row
    return rows


def _detect(subject: Subject, jobs: Iterable[Job]) -> Iterator[tuple[str, Any]]:
    from tqdm import tqdm

    asked: Any = None
    for file, key, prompt in tqdm(jobs, desc=str(subject.name), unit=" pictures", leave=False, disable=None):
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


def _best(data: Set, prompts: Sequence[Sequence[str]], rows: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The best boxes of every picture over all prompts, as COCO results."""
    numbers = {name: number for number, name in data.categories}
    for picture in data.pictures:
        merged = []
        for index, prompt in enumerate(prompts):
            row = rows[f"{picture.id}/{index}"]
            merged += [
                (score, numbers[prompt[label]], box)
                for score, label, box in zip(row["scores"], row["labels"], row["boxes"], strict=True)
            ]
        merged.sort(key=lambda one: -one[0])
        for score, category, (left, top, right, bottom) in merged[:BEST]:
            yield {
                "image_id": picture.id,
                "category_id": category,
                # The last pixel counts, as in the official evaluation (`BoxList.convert("xywh")`).
                "bbox": [left, top, right - left + 1, bottom - top + 1],
                "score": score,
            }


def render_accuracy(result: Mapping[str, Any]) -> str:
    """Return a result as text."""
    subjects: Mapping[str, Any] = result["subjects"]
    head = f"{result['model']} on {result['set']}: {result['pictures']} pictures, "
    head += f"{result['phrases']} phrases" if result["kind"] == "grounding" else f"{result['prompts']} prompts each"
    lines = [head, *(f"not here: {name}: {reason}" for name, reason in result["absent"].items()), ""]
    figures = next(iter(subjects.values()))["figures"]
    lines.append(f"{'':<22}" + "".join(f"{name:>11}" for name in figures))
    for name, facts in subjects.items():
        lines.append(f"{name:<22}" + "".join(_cell(value) for value in facts["figures"].values()))
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
