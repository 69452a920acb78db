"""How a prompt is written: class names, brackets, dots, plain captions or explicit spans, all to a caption with spans.

No tokenizer here; positions are characters. `glip_deploy.prompts` goes on to tokens.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from numbers import Integral
from typing import Any, TypeAlias

from glip_deploy.errors import OptionError, PromptError, shown
from glip_deploy.prompts.phrases import find_phrases, is_plain_name, tagger_installed

__all__ = ["Caption", "ClassName", "MarkedCaption", "Phrases", "PromptText", "Span", "fold", "mark"]

# A prompt of nothing but these has no words in it.
_SEPARATORS = ".,;|_"
# Possessive, and only where no dot precedes: linear in the number of dots.
_SEPARATING_DOT = re.compile(r"(?<!\.)\.++(?=\s|$)")
Span: TypeAlias = tuple[int, int]
"""(start, end) character positions, end exclusive."""


@dataclass(frozen=True)
class ClassName:
    """A class with words around it that describe it but do not score.

    `ClassName("stingray", suffix=", which is flat and round")` is "[stingray], which is flat and round":
    the tokens of the name alone score, and detections are labeled with it. Nothing is cleaned. Official
    DATASETS.CAPTION_PROMPT.

    Attributes:
        name: the words that score, and the label.
        prefix: words before it, with the space that follows them.
        suffix: words after it, with the space or comma that precedes them.
    """

    name: str
    prefix: str = ""
    suffix: str = ""


@dataclass(frozen=True)
class Caption:
    """A caption and where its phrases are.

    Attributes:
        text: taken as it is.
        spans: per phrase either one (start, end) pair of character positions, end exclusive, or a sequence of
            pairs for a phrase in several pieces, in order and not overlapping. Different phrases may overlap.
        phrases: labels, one per phrase; by default the words of the spans.
    """

    text: str
    spans: Sequence[Span | Sequence[Span]]
    phrases: Sequence[str] | None = None


PromptText: TypeAlias = str | Caption | Sequence[str | ClassName]
"""Every way to write a prompt; see `parse_prompt`."""


class Phrases(StrEnum):
    """What scores in a string that has no brackets; in one that has, what they hold does."""

    AUTO = "auto"
    """Dots in a dotted list and in a single word, noun phrases in any other caption.

    A dotted list has words on both sides of a dot that separates, or such a dot that stands by itself ("person .").
    The period of a sentence is neither. Where no tagger is installed, a plain name ("traffic light", "a red apple")
    is one phrase, as it would be with one.
    """
    WHOLE = "whole"
    """Noun phrases, whatever the dots: several sentences in a caption."""
    DOTS = "dots"
    """The pieces between dots; without any dot, all of it."""


@dataclass(frozen=True)
class MarkedCaption:
    """A prompt before the tokenizer.

    Attributes:
        caption: the text to tokenize.
        phrases: C labels.
        spans: C times the character spans of the class, ascending, none empty.
    """

    caption: str
    phrases: tuple[str, ...]
    spans: tuple[tuple[Span, ...], ...]


def mark(text: PromptText, phrases: Phrases | str = Phrases.AUTO) -> MarkedCaption:
    """Return the caption of a prompt and where its classes are; the ways to write one: `parse_prompt`.

    Args:
        text: the prompt.
        phrases: what scores in a string; lists and `Caption`s say that themselves.

    Raises:
        PromptError: not a prompt at all; no words; an empty or repeated class; misplaced brackets or spans; a caption
            without a noun.
        MissingPackage: the phrases of a caption cannot be found without the extra `captions`.
        OptionError: `phrases` is none of the three.
    """
    try:
        how = Phrases(phrases)
    except ValueError:
        raise OptionError(f"phrases is {shown(phrases)}; legal is {', '.join(Phrases)}") from None
    if isinstance(text, str):
        return _from_string(text, how)
    if isinstance(text, Caption):
        return _from_caption(text)
    if isinstance(text, Sequence) and not isinstance(text, bytes | bytearray):
        return _from_names(text)
    raise PromptError(
        f"a prompt is a string, a list of class names or a Caption, not {type(text).__name__};"
        ' for example "person. dog" or ["person", "dog"]'
    )


def fold(text: str) -> str:
    """Return a name for comparison: upper and lower case, white space and underscores do not count."""
    return " ".join(text.replace("_", " ").casefold().split())


def _from_names(names: Sequence[str | ClassName]) -> MarkedCaption:
    if len(names) == 0:
        raise PromptError('the prompt is an empty list; name at least one class, for example ["person"]')
    caption, labels, spans = "", [], []
    seen: dict[str, int] = {}
    for index, name in enumerate(names):
        entry, label = _class_name(name, index)
        if not label.strip(_SEPARATORS + " ") or not entry.name.strip(_SEPARATORS + " "):
            raise PromptError(f"class {index} is empty ({shown(name)}); remove it or name it")
        first = seen.setdefault(fold(label), index)
        if first != index:
            raise PromptError(f"class {index} ({shown(label)}) repeats class {first}; remove one of them")
        caption += (". " if index else "") + entry.prefix
        spans.append(((len(caption), len(caption) + len(entry.name)),))
        caption += entry.name + entry.suffix
        labels.append(label)
    return MarkedCaption(caption, tuple(labels), tuple(spans))


def _class_name(name: object, index: int) -> tuple[ClassName, str]:
    """Return what goes into the caption, and the label."""
    if isinstance(name, ClassName) and all(isinstance(s, str) for s in (name.name, name.prefix, name.suffix)):
        return name, " ".join(name.name.split())
    if not isinstance(name, str):
        raise PromptError(f"class {index} is {shown(name)}, a {type(name).__name__}; class names are strings")
    plain, pieces = _brackets(" ".join(name.split()), f"class {index}")
    if not pieces:
        return ClassName(_cleaned(plain)), plain
    if len(pieces) > 1:
        raise PromptError(f"class {index} ({shown(name)}) has {len(pieces)} bracketed parts; one can be the name")
    start, end = pieces[0]
    return ClassName(plain[start:end], prefix=plain[:start], suffix=plain[end:]), plain[start:end]


def _cleaned(name: str) -> str:
    """Clean a class name as the official `clean_name` does, to the single pass over double spaces."""
    start, end = name.find("("), name.rfind(")")  # as re.sub(r"\(.*\)", "", name), which is quadratic where none closes
    without = name[:start] + name[end + 1 :] if 0 <= start < end else name
    return without.replace("_", " ").replace("  ", " ")


def _from_string(text: str, how: Phrases) -> MarkedCaption:
    if not re.sub(rf"[\s\[\]{re.escape(_SEPARATORS)}]", "", text):
        raise PromptError(f'the prompt {shown(text)} has no words; name what to detect, for example "person. dog"')
    caption, spans = _brackets(text, "the prompt")
    if not spans and (how is Phrases.WHOLE or (how is Phrases.AUTO and not _has_dots_or_name(caption))):
        spans = find_phrases(caption)
    if spans:
        return MarkedCaption(caption, tuple(_words(caption, [span]) for span in spans), tuple((s,) for s in spans))
    start = 0
    labels: list[str] = []
    seen: dict[str, str] = {}
    for dot in [*_SEPARATING_DOT.finditer(caption), None]:
        end = dot.start() if dot else len(caption)
        span = _stripped(caption, start, end)
        start = dot.end() if dot else end
        label = caption[slice(*span)]
        if not label.strip(_SEPARATORS):
            continue
        if fold(label) in seen:
            raise PromptError(f"phrase {shown(label)} repeats {shown(seen[fold(label)])}; remove one of them")
        seen[fold(label)] = label
        labels.append(" ".join(label.split()))
        spans.append(span)
    return MarkedCaption(caption, tuple(labels), tuple((span,) for span in spans))


def _has_dots_or_name(caption: str) -> bool:
    """Tell whether a caption is a dotted list, a single word, or a name whose phrases nothing here can find."""
    pieces = [piece for piece in _SEPARATING_DOT.split(caption) if piece.strip(_SEPARATORS + " \t\r\n")]
    if len(pieces) > 1 or re.search(r"\s\.+(\s|$)", caption) or len(pieces[0].split()) == 1:
        return True
    return is_plain_name(pieces[0]) and not tagger_installed()


def _brackets(text: str, what: str) -> tuple[str, list[Span]]:
    """Take the brackets out; return the text without them, and where in it their contents are, stripped."""
    plain = ""
    spans: list[Span] = []
    start = opened = -1
    for token in re.finditer(r"\\([\[\]])|(\[)|(\])|[^\\\[\]]+|\\", text):
        at = f"at character {token.start() + 1} of {what} ({shown(text)})"
        if token[2]:
            if start >= 0:
                raise PromptError(f"'[' {at} is inside another bracket; close that first, or write '\\['")
            start, opened = len(plain), token.start() + 1
        elif token[3]:
            if start < 0:
                raise PromptError(f"']' {at} closes nothing; add the '[' or write '\\]'")
            span = _stripped(plain, start, len(plain))
            if not plain[slice(*span)].strip(_SEPARATORS):
                raise PromptError(f"the brackets that end {at} hold no words; put the phrase between them")
            spans.append(span)
            start = -1
        else:
            plain += token[1] or token[0]
    if start >= 0:
        raise PromptError(
            f"'[' at character {opened} of {what} ({shown(text)}) is never closed; add a ']' or write '\\['"
        )
    return plain, spans


def _from_caption(caption: Caption) -> MarkedCaption:
    text = caption.text
    if not isinstance(text, str) or not text.strip(_SEPARATORS + " \t\r\n"):
        raise PromptError(f"the caption {shown(text)} has no words; it must be a string that describes the picture")
    if not isinstance(caption.spans, Sequence) or len(caption.spans) == 0:
        raise PromptError("the caption has no spans; give a (start, end) pair of character positions per phrase")
    spans = tuple(_pairs(element, index, text) for index, element in enumerate(caption.spans))
    if caption.phrases is None:
        return MarkedCaption(text, tuple(_words(text, pairs) for pairs in spans), spans)
    if not isinstance(caption.phrases, Sequence) or isinstance(caption.phrases, str):
        raise PromptError(f"phrases of the caption are {shown(caption.phrases)}; give a list with one label per span")
    phrases = tuple(caption.phrases)
    if len(phrases) != len(spans):
        raise PromptError(f"the caption has {len(spans)} spans and {len(phrases)} phrases; give one label per span")
    for index, phrase in enumerate(phrases):
        if not isinstance(phrase, str) or not phrase.strip():
            raise PromptError(f"phrase {index} of the caption is {shown(phrase)}; labels are strings with words")
    return MarkedCaption(text, phrases, spans)


def _pairs(element: Any, index: int, text: str) -> tuple[Span, ...]:
    what = f"span {index} of the caption"
    shape = f"{what} is {shown(element)}; it must be a (start, end) pair of whole numbers, or several pairs"
    if not isinstance(element, Sequence) or isinstance(element, str) or len(element) == 0:
        raise PromptError(shape)
    pairs = [element] if _is_pair(element) else list(element)
    last = 0
    for pair in pairs:
        if not _is_pair(pair):
            raise PromptError(shape)
        start, end = pair
        if not 0 <= start < end <= len(text):
            raise PromptError(f"{what} is ({start}, {end}); legal is 0 <= start < end <= {len(text)} (the caption)")
        if start < last:
            raise PromptError(f"{what} has ({start}, {end}) after an end of {last}; order its pieces, no overlap")
        last = end
    return tuple((int(start), int(end)) for start, end in pairs)


def _is_pair(value: Any) -> bool:
    return (
        isinstance(value, Sequence)
        and len(value) == 2
        and all(isinstance(number, Integral) and not isinstance(number, bool) for number in value)
    )


def _stripped(text: str, start: int, end: int) -> Span:
    while start < end and text[start].isspace():
        start += 1
    while end > start and text[end - 1].isspace():
        end -= 1
    return start, end


def _words(text: str, spans: Sequence[Span]) -> str:
    return " ".join(" ".join(text[start:end] for start, end in spans).split())
