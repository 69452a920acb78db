"""How the cost of a frame grows with one of its sizes: tokens, classes, resolution, batch, or from bundle to bundle."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glip_bench.measuring.timing import Timing
from glip_bench.subjects.base import Options, Piece, Subject
from glip_bench.subjects.open import choose, open_subjects
from glip_deploy.bundle.manifest import Bundle
from glip_deploy.errors import GlipError, OptionError
from glip_deploy.prompts.tokens import parse_prompt

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from tokenizers import Tokenizer

__all__ = ["Axis", "Sweep", "opened_once", "parse_sweep", "prompt_of", "run_sweep"]

CLASSES = 3
"""In every prompt of a sweep over tokens."""
MOST_BATCH = 64


class Axis(StrEnum):
    """What can be swept; everything else stays as the options say."""

    TOKENS = "tokens"
    CLASSES = "classes"
    SIDE = "side"
    BATCH = "batch"
    BUNDLE = "bundle"


LABELS = {
    Axis.TOKENS: "prompt length, tokens",
    Axis.CLASSES: "classes in a prompt of fixed length",
    Axis.SIDE: "shortest side, pixels",
    Axis.BATCH: "frames a batch",
    Axis.BUNDLE: "bundle",
}


@dataclass(frozen=True)
class Sweep:
    """One axis and its values."""

    axis: Axis
    values: tuple[int | str, ...]


def parse_sweep(text: str) -> Sweep:
    """Read "tokens=8,16,32", or "bundle=glip_t/,glip_t_fp16/".

    Raises:
        OptionError: another form, an unknown axis, a value out of its range.
    """
    name, equals, rest = text.partition("=")
    try:
        axis = Axis(name.strip().lower())
    except ValueError:
        raise OptionError(f'sweep "{text}": the axis is one of {", ".join(Axis)}, as in tokens=8,16,32') from None
    parts = [part.strip() for part in rest.split(",") if part.strip()]
    if not equals or not parts:
        raise OptionError(f'sweep "{text}": no values; write them with commas, as in {axis}=8,16,32')
    if axis is Axis.BUNDLE:
        return Sweep(axis, tuple(dict.fromkeys(parts)))
    least, most = {Axis.TOKENS: (8, 256), Axis.CLASSES: (1, 126), Axis.SIDE: (32, 4096), Axis.BATCH: (1, MOST_BATCH)}[
        axis
    ]
    values: list[int] = []
    for part in parts:
        if not part.isdecimal() or not least <= int(part) <= most:
            raise OptionError(f'sweep {axis}: "{part}" is not a whole number from {least} to {most}')
        values.append(int(part))
    return Sweep(axis, tuple(sorted(set(values))))


def prompt_of(tokenizer: Tokenizer, tokens: int, classes: int) -> list[str]:
    """Return a list of class names that comes to exactly so many tokens, of words that are one token each.

    Args:
        tokenizer: the bundle's.
        tokens: length of the prompt, [CLS], [SEP] and the dots between names included.
        classes: number of names.

    Raises:
        OptionError: too short for so many names.
    """
    words_needed = tokens - 2 - (classes - 1)
    if words_needed < classes:
        raise OptionError(f"{classes} classes need a prompt of {2 * classes + 1} tokens or more, not {tokens}")
    pool = _words(tokenizer, classes)
    names = [[word] for word in pool]
    for i in range(words_needed - classes):
        names[i % classes].append(pool[(i // classes) % classes])
    return [" ".join(name) for name in names]


def _words(tokenizer: Tokenizer, count: int) -> list[str]:
    """Return the first words of a vocabulary, by number of token; single letters where these do not suffice."""
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: (len(item[0]) < 3, item[1]))
    words = [word for word, _ in vocabulary if word.isascii() and word.isalpha()]
    if len(words) < count:
        raise OptionError(f"the bundle's vocabulary has {len(words)} whole words, too few for {count} classes")
    return words[:count]


@contextmanager
def _opened(names: Sequence[str] | None, options: Options, on_step: Callable[[str], None]) -> Iterator[list[Subject]]:
    chosen, _ = choose(names, options)
    subjects: list[Subject] = []
    try:
        for subject, _ in open_subjects(chosen, options, on_step):
            subjects.append(subject)
        yield subjects
    finally:
        for subject in subjects:
            subject.close()


@contextmanager
def opened_once(
    names: Sequence[str] | None, options: Options, on_step: Callable[[str], None] = lambda step: None
) -> Iterator[Callable[[], list[Subject]]]:
    """Give a function that opens the subjects when it is first called; they are closed at the end.

    Args:
        names: subjects; None for all that can run.
        options: how they are opened; each value of a sweep sets its own before it is run.
        on_step: called with the name of each step as it begins.
    """
    with ExitStack() as stack:
        yield cache(lambda: stack.enter_context(_opened(names, options, on_step)))


def run_sweep(
    sweep: Sweep,
    options: Options,
    frames: Sequence[NDArray[np.uint8]],
    prompt: str | list[str],
    rounds: int,
    opened: Callable[[], list[Subject]],
    names: Sequence[str] | None = None,
    on_step: Callable[[str], None] = lambda step: None,
) -> dict[str, Any]:
    """Time every subject at every value, in turn within each value, the first run of each untimed.

    Args:
        sweep: what is varied.
        options: everything else.
        frames: RGB frames of one size.
        prompt: where tokens and classes are not what is swept.
        rounds: timed frames (or batches) of each subject at each value.
        opened: gives the subjects; not called where bundles are swept, which are opened one by one.
        names: subjects of other bundles; None for onnxruntime-cpu, which needs no checkpoint.
        on_step: called with the name of each step as it begins.

    Returns:
        {"axis", "label", "points": [{"value", "tokens", "classes", "network", "subjects": {name: {"image_ms",
        "whole_ms"} or {"error"}}}]}; times are of the whole batch.

    Raises:
        GlipError: whatever a subject raises, except for a size that it does not take: that is the point's "error".
    """
    points: list[dict[str, Any]] = []
    if sweep.axis is Axis.BUNDLE:
        for value in sweep.values:
            given = replace(options, bundle=Path(str(value)))
            # Another bundle may be of another checkpoint, which torch's subjects would have to be given.
            wanted = names or ["onnxruntime-cpu"]
            with _opened(wanted, given, on_step) as subjects:
                on_step(f"bundle {value}")
                point = _point(value, subjects, frames[:1], prompt, rounds, given)
            point["precision"] = Bundle.open(given.bundle).manifest.precision
            points.append(point)
    else:
        tokenizer = Bundle.open(options.bundle).tokenizer()
        longest = max(int(value) for value in sweep.values)
        subjects = opened()
        for value in sweep.values:
            on_step(f"{sweep.axis} {value}")
            number = int(value)
            given, words, batch = options, prompt, 1
            if sweep.axis is Axis.TOKENS:
                words = prompt_of(tokenizer, number, CLASSES)
            elif sweep.axis is Axis.CLASSES:
                words = prompt_of(tokenizer, max(16, 2 * longest + 1), number)
            elif sweep.axis is Axis.SIDE:
                given = replace(options, shortest_side=number)
            else:
                batch = number
            batched = [frames[i % len(frames)] for i in range(batch)]
            points.append(_point(value, subjects, batched, words, rounds, given))
    return {"axis": str(sweep.axis), "label": LABELS[sweep.axis], "points": points}


def _point(
    value: int | str,
    subjects: Sequence[Subject],
    frames: Sequence[NDArray[np.uint8]],
    prompt: str | list[str],
    rounds: int,
    options: Options,
) -> dict[str, Any]:
    bundle = Bundle.open(options.bundle)
    parsed = parse_prompt(prompt, bundle.tokenizer(), max_tokens=bundle.max_tokens)
    found: dict[str, dict[str, Any]] = {}
    seconds: dict[str, dict[Piece, list[float]]] = {}
    for subject in subjects:
        subject.options = options
        try:
            subject.prepare(parsed)
            subject.run_batch(frames)
        except GlipError as error:  # such as an engine built for fewer tokens; the others are still of interest
            found[str(subject.name)] = {"error": str(error)}
        else:
            seconds[str(subject.name)] = {Piece.IMAGE: [], Piece.WHOLE: []}
    for _ in range(rounds):
        for subject in subjects:
            if str(subject.name) not in seconds:
                continue
            start = time.perf_counter()
            subject.run_batch(frames)
            samples = seconds[str(subject.name)]
            samples[Piece.WHOLE].append(time.perf_counter() - start)
            samples[Piece.IMAGE].append(subject.pieces[Piece.IMAGE])
    found |= {name: _timings(samples) for name, samples in seconds.items()}
    return {
        "value": value,
        "tokens": len(parsed.input_ids),
        "classes": len(parsed),
        "network": list(options.canvas_of(frames[0].shape[:2])),
        "batch": len(frames),
        "subjects": {str(subject.name): found[str(subject.name)] for subject in subjects},
    }


def _timings(samples: Mapping[Piece, Sequence[float]]) -> dict[str, Any]:
    return {
        "image_ms": Timing.of(samples[Piece.IMAGE]).to_dict(),
        "whole_ms": Timing.of(samples[Piece.WHOLE]).to_dict(),
    }
