"""From words to what the network takes: token ids, and the tokens that score each class.

A prompt is written in one of five ways, see `parse_prompt`. All become a caption with the character spans of
its classes (`glip_deploy.prompts.syntax`), and here, through the tokenizer's offsets, token positions. The score
of a class is the mean over its tokens (official `create_positive_map_label_to_token_from_positive_map`).
"""

from __future__ import annotations

import difflib
import hashlib
import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from numbers import Real
from typing import TYPE_CHECKING

import numpy as np

from glip_deploy.errors import OptionError, PromptError, listed, shown
from glip_deploy.prompts.syntax import MarkedCaption, Phrases, PromptText, Span, fold, mark

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from tokenizers import Encoding, Tokenizer

__all__ = ["MAX_TOKENS", "Prompt", "parse_prompt", "thresholds"]

MAX_TOKENS = 256
"""Longest prompt in tokens, [CLS] and [SEP] included (official MODEL.LANGUAGE_BACKBONE.MAX_QUERY_LEN)."""
_log = logging.getLogger(__name__)
_LONGEST_TYPO = 100
"""Characters of a name for which similar ones are looked up."""


@dataclass(frozen=True, eq=False)
class Prompt:
    """A tokenized prompt; equal to another with the same tokens, spans and labels.

    Attributes:
        caption: the text that was tokenized.
        phrases: C labels, one per class.
        input_ids: (T,) int64, [CLS] to [SEP], its true length, never padded; read-only.
        token_spans: per class, the positions in `input_ids` that score it, ascending and never empty.

    Raises:
        ValueError: parts that do not belong together.
    """

    caption: str
    phrases: tuple[str, ...]
    input_ids: NDArray[np.int64]
    token_spans: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        ids = np.array(self.input_ids, dtype=np.int64)
        if ids.ndim != 1:
            raise ValueError(f"input_ids have shape {ids.shape}; (T,) is needed")
        if len(self.phrases) != len(self.token_spans):
            raise ValueError(f"{len(self.phrases)} phrases and {len(self.token_spans)} token spans; one of each")
        for phrase, span in zip(self.phrases, self.token_spans, strict=True):
            if not span or min(span) < 0 or max(span) >= len(ids):
                raise ValueError(f"class {phrase!r} has token positions {span}; 0 to {len(ids) - 1} are legal")
        ids.setflags(write=False)
        object.__setattr__(self, "input_ids", ids)

    @cached_property
    def class_map(self) -> NDArray[np.float32]:
        """(C, T) float32, read-only; row c averages the tokens of class c, so it sums to 1."""
        out = np.zeros((len(self.phrases), len(self.input_ids)), dtype=np.float32)
        for row, span in zip(out, self.token_spans, strict=True):
            row[list(span)] = 1 / len(span)
        out.setflags(write=False)
        return out

    @cached_property
    def embedding_key(self) -> str:
        """SHA-256 (hex) of the token ids: prompts that share it share a text embedding."""
        return hashlib.sha256(self.input_ids.astype("<i8").tobytes()).hexdigest()

    @cached_property
    def key(self) -> str:
        """SHA-256 (hex) of token ids, token positions and labels: all that detection depends on."""
        parts = [self.embedding_key, self.token_spans, self.phrases]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Prompt) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)

    def __len__(self) -> int:
        return len(self.phrases)


def parse_prompt(
    text: PromptText, tokenizer: Tokenizer, *, phrases: Phrases | str = Phrases.AUTO, max_tokens: int = MAX_TOKENS
) -> Prompt:
    r"""Tokenize a prompt, written in one of five ways.

    * **A list of class names**, `["person", "traffic_light"]`: the official evaluation form. Names are
      cleaned by the official rule (anything in parentheses goes, "_" becomes a space) and joined by ". " with
      nothing at the end; detections are labeled with the name as given. White space around and within a
      name is made single spaces first, which never changes a token. Brackets in a name, or a `ClassName`,
      mark the part that scores: "[stingray], which is flat and round"; without brackets all of it scores.
    * **A caption with brackets**, `"a man with a [green hat]"`: the brackets go, what they held are the
      phrases. A literal bracket is written `\\[` or `\\]`, here and in class names.
    * **A dotted string**, `"person . traffic light . "`: the caption exactly as typed, nothing cleaned or
      added. The phrases are the pieces between dots. A dot separates where white space or the end follows,
      so "3.5 inch disk" is one phrase. A single word is a list of one.
    * **A plain caption**, `"A woman with a green dress is walking."`: its noun phrases are found
      (`glip_deploy.prompts.phrases`; needs the extra `captions`), here "A woman" and "a green dress". A phrase that
      occurs twice is two classes with one label. A period at the end does not make a list of it.
    * **A `Caption`** with explicit character spans.

    Characters go to tokens as officially (`create_positive_map`): if a span's first character has no token,
    the next two are tried, and likewise the two before its last. Words that the vocabulary lacks become
    [UNK]; that is logged as a warning, as the network cannot tell them apart.

    Args:
        text: the prompt.
        tokenizer: BERT's, without padding or truncation, as the bundle's tokenizer.json has it.
        phrases: how a string without brackets is read; see `Phrases`.
        max_tokens: limit on T.

    Raises:
        PromptError: not a prompt at all; no words; an empty or repeated class; misplaced brackets or spans; a
            caption without a noun; a phrase without a token; or more tokens than `max_tokens`.
        MissingPackage: the phrases of a caption cannot be found without the extra `captions`.
        OptionError: `phrases` is none of `Phrases`.
    """
    return _tokenized(mark(text, phrases), tokenizer, max_tokens)


def thresholds(
    prompt: Prompt | Sequence[str], value: float | Sequence[float] | Mapping[str, float], default: float = 0.5
) -> NDArray[np.float32]:
    """Return (C,) float32, the score each class must be above.

    Args:
        prompt: of C classes, or their labels.
        value: one number for all, C numbers in the prompt's order, or numbers by phrase (upper and lower case
            and white space do not matter).
        default: for phrases that a mapping leaves out.

    Raises:
        OptionError: a number outside [0, 1], or a sequence of another length.
        PromptError: a phrase that the prompt does not have.
    """
    phrases = prompt.phrases if isinstance(prompt, Prompt) else prompt
    if isinstance(value, Mapping):
        places: dict[str, list[int]] = {}
        for index, known in enumerate(phrases):
            places.setdefault(fold(known), []).append(index)
        limits = [_threshold(default, "the default")] * len(phrases)
        for phrase, number in value.items():
            if not isinstance(phrase, str) or fold(phrase) not in places:
                raise _unknown_phrase(phrase, phrases)
            for index in places[fold(phrase)]:
                limits[index] = _threshold(number, f"phrase {shown(phrase)}")
        return np.array(limits, dtype=np.float32)
    if isinstance(value, Sequence | np.ndarray) and not isinstance(value, str) and getattr(value, "ndim", 1) > 0:
        # Not np.shape: it refuses rows of unequal length.
        shape = value.shape if isinstance(value, np.ndarray) else (len(value),)
        if shape != (len(phrases),):
            raise OptionError(
                f"thresholds have shape {shape}, the prompt has {len(phrases)} classes;"
                " give one number, or one per class"
            )
        return np.array([_threshold(n, f"class {i}") for i, n in enumerate(value)], dtype=np.float32)
    return np.full(len(phrases), _threshold(value, "all classes"), dtype=np.float32)


def _tokenized(draft: MarkedCaption, tokenizer: Tokenizer, max_tokens: int) -> Prompt:
    try:
        draft.caption.encode()
        "".join(draft.phrases).encode()
    except UnicodeEncodeError as error:
        raise PromptError(
            f"the prompt holds {error.object[error.start]!r}, which is not a character; write it in UTF-8"
        ) from error
    encoding = tokenizer.encode(draft.caption)
    ids = encoding.ids
    tokens = _tokens_by_character(encoding, len(draft.caption))
    ranges = [_token_ranges(tokens, spans) for spans in draft.spans]
    for index, (phrase, found) in enumerate(zip(draft.phrases, ranges, strict=True)):
        if not found:
            raise PromptError(
                f"class {index} ({shown(phrase)}) has no character that the tokenizer knows, so it could never be"
                " detected; remove it or use other words"
            )
    if len(ids) > max_tokens:
        raise _too_long(draft, [max(last for _, last in found) for found in ranges], len(ids), max_tokens)
    token_spans = tuple(
        tuple(sorted({position for first, last in found for position in range(first, last + 1)})) for found in ranges
    )
    unknown = tokenizer.token_to_id("[UNK]")
    lost = [
        phrase
        for phrase, positions in zip(draft.phrases, token_spans, strict=True)
        if any(ids[position] == unknown for position in positions)
    ]
    if lost:
        _log.warning(
            "the vocabulary lacks words of %s; they become [UNK], which the network cannot tell apart",
            listed(map(repr, lost)),
        )
    return Prompt(draft.caption, draft.phrases, np.array(ids, dtype=np.int64), token_spans)


def _tokens_by_character(encoding: Encoding, length: int) -> list[int]:
    """Return the token of each character, -1 where it has none: `Encoding.char_to_token` of all, in linear time."""
    tokens = [-1] * length
    for token, (start, end) in enumerate(encoding.offsets):
        tokens[start:end] = [token] * (end - start)
    return tokens


def _token_ranges(tokens: Sequence[int], spans: Sequence[Span]) -> list[tuple[int, int]]:
    """Return the first and last token of each span that has any."""
    ranges = []
    for start, end in spans:
        first = _first_token(tokens, (start, start + 1, start + 2))
        last = _first_token(tokens, (end - 1, end - 2, end - 3))
        if 0 <= first <= last:
            ranges.append((first, last))
    return ranges


def _first_token(tokens: Sequence[int], characters: Sequence[int]) -> int:
    return next((tokens[i] for i in characters if 0 <= i < len(tokens) and tokens[i] >= 0), -1)


def _too_long(draft: MarkedCaption, last_tokens: Sequence[int], count: int, max_tokens: int) -> PromptError:
    # The last position belongs to [SEP], so a class must end before it.
    beyond = [index for index, last in enumerate(last_tokens) if last >= max_tokens - 1]
    where = "only words after the last class reach beyond"
    if beyond:
        where = f"the first class that reaches beyond is {shown(draft.phrases[beyond[0]])} (index {beyond[0]})"
    return PromptError(
        f"the prompt has {count} tokens with [CLS] and [SEP], the limit is {max_tokens}; {where};"
        " name fewer classes, or give a list of names, which may have any length"
    )


def _threshold(value: object, what: str) -> float:
    try:
        number = float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    except (OverflowError, ValueError, TypeError):  # 10**400, or a number of the caller's own kind
        number = math.nan
    if not 0 <= number <= 1:
        raise OptionError(f"threshold of {what} is {shown(value)}; it must be a number in [0, 1], for example 0.5")
    return number


def _unknown_phrase(phrase: object, phrases: Sequence[str]) -> PromptError:
    names = {fold(known): known for known in phrases}
    wanted = fold(phrase) if isinstance(phrase, str) else ""
    close = []
    if len(wanted) <= _LONGEST_TYPO:  # comparing takes the product of both lengths
        near = difflib.get_close_matches(wanted, [name for name in names if len(name) <= _LONGEST_TYPO], n=3)
        close = [names[match] for match in near]
    advice = "did you mean " + " or ".join(map(repr, close)) if close else f"it has {listed(phrases)}"
    return PromptError(f"a threshold is given for {shown(phrase)}, which the prompt does not have; {advice}")
