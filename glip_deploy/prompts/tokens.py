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

from glip_deploy.errors import OptionError, PromptError
from glip_deploy.prompts.syntax import MarkedCaption, Phrases, PromptText, Span, fold, mark

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from tokenizers import Encoding, Tokenizer

__all__ = ["MAX_TOKENS", "Prompt", "parse_prompt", "thresholds"]

MAX_TOKENS = 256
"""Longest prompt in tokens, [CLS] and [SEP] included (official MODEL.LANGUAGE_BACKBONE.MAX_QUERY_LEN)."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Prompt:
    """A tokenised prompt; equal to another with the same tokens, spans and labels.

    Attributes:
        caption: the text that was tokenised.
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
    r"""Tokenise a prompt, written in one of five ways.

    * **A list of class names**, `["person", "traffic_light"]`: the official evaluation form. Names are
      cleaned by the official rule (anything in parentheses goes, "_" becomes a space) and joined by ". " with
      nothing at the end; detections are labelled with the name as given. White space around and within a
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
    return _tokenised(mark(text, phrases), tokenizer, max_tokens)


def thresholds(
    prompt: Prompt, value: float | Sequence[float] | Mapping[str, float], default: float = 0.5
) -> NDArray[np.float32]:
    """Return (C,) float32, the score each class must be above.

    Args:
        prompt: of C classes.
        value: one number for all, C numbers in the prompt's order, or numbers by phrase (upper and lower case
            and white space do not matter).
        default: for phrases that a mapping leaves out.

    Raises:
        OptionError: a number outside [0, 1], or a sequence of another length.
        PromptError: a phrase that the prompt does not have.
    """
    if isinstance(value, Mapping):
        places: dict[str, list[int]] = {}
        for index, phrase in enumerate(prompt.phrases):
            places.setdefault(fold(phrase), []).append(index)
        limits = [_threshold(default, "the default")] * len(prompt)
        for phrase, number in value.items():
            if not isinstance(phrase, str) or fold(phrase) not in places:
                raise _unknown_phrase(phrase, prompt)
            for index in places[fold(phrase)]:
                limits[index] = _threshold(number, f"phrase {phrase!r}")
        return np.array(limits, dtype=np.float32)
    if isinstance(value, Sequence | np.ndarray) and not isinstance(value, str) and np.ndim(value) > 0:
        if np.ndim(value) != 1 or len(value) != len(prompt):
            raise OptionError(
                f"thresholds have shape {np.shape(value)}, the prompt has {len(prompt)} classes;"
                " give one number, or one per class"
            )
        return np.array([_threshold(n, f"class {i}") for i, n in enumerate(value)], dtype=np.float32)
    return np.full(len(prompt), _threshold(value, "all classes"), dtype=np.float32)


def _tokenised(draft: MarkedCaption, tokenizer: Tokenizer, max_tokens: int) -> Prompt:
    try:
        draft.caption.encode()
        "".join(draft.phrases).encode()
    except UnicodeEncodeError as error:
        raise PromptError(
            f"the prompt holds {error.object[error.start]!r}, which is not a character; write it in UTF-8"
        ) from error
    encoding = tokenizer.encode(draft.caption)
    token_spans = tuple(_token_positions(encoding, spans) for spans in draft.spans)
    for index, (phrase, positions) in enumerate(zip(draft.phrases, token_spans, strict=True)):
        if not positions:
            raise PromptError(
                f"class {index} ({phrase!r}) has no character that the tokenizer knows, so it could never be"
                " detected; remove it or use other words"
            )
    if len(encoding.ids) > max_tokens:
        raise _too_long(draft, token_spans, len(encoding.ids), max_tokens)
    unknown = tokenizer.token_to_id("[UNK]")
    lost = [
        phrase
        for phrase, positions in zip(draft.phrases, token_spans, strict=True)
        if any(encoding.ids[position] == unknown for position in positions)
    ]
    if lost:
        _log.warning(
            "the vocabulary lacks words of %s; they become [UNK], which the network cannot tell apart",
            ", ".join(repr(phrase) for phrase in lost),
        )
    return Prompt(draft.caption, draft.phrases, np.array(encoding.ids, dtype=np.int64), token_spans)


def _token_positions(encoding: Encoding, spans: Sequence[Span]) -> tuple[int, ...]:
    positions: set[int] = set()
    for start, end in spans:
        first = _first_token(encoding, (start, start + 1, start + 2))
        last = _first_token(encoding, (end - 1, end - 2, end - 3))
        if first is not None and last is not None:
            positions.update(range(first, last + 1))
    return tuple(sorted(positions))


def _first_token(encoding: Encoding, characters: Sequence[int]) -> int | None:
    for character in characters:
        token = encoding.char_to_token(character) if character >= 0 else None
        if token is not None:
            return int(token)
    return None


def _too_long(draft: MarkedCaption, token_spans: Sequence[tuple[int, ...]], count: int, max_tokens: int) -> PromptError:
    # The last position belongs to [SEP], so a class must end before it.
    beyond = [index for index, positions in enumerate(token_spans) if max(positions) >= max_tokens - 1]
    where = "only words after the last class reach beyond"
    if beyond:
        where = f"the first class that reaches beyond is {draft.phrases[beyond[0]]!r} (index {beyond[0]})"
    return PromptError(
        f"the prompt has {count} tokens with [CLS] and [SEP], the limit is {max_tokens}; {where};"
        " name fewer classes, or split them over several prompts"
    )


def _threshold(value: object, what: str) -> float:
    number = float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    if not 0 <= number <= 1:
        raise OptionError(f"threshold of {what} is {value!r}; it must be a number in [0, 1], for example 0.5")
    return number


def _unknown_phrase(phrase: object, prompt: Prompt) -> PromptError:
    names = {fold(known): known for known in prompt.phrases}
    close = [names[match] for match in difflib.get_close_matches(fold(str(phrase)), list(names), n=3)]
    advice = "did you mean " + " or ".join(map(repr, close)) if close else "it has " + ", ".join(prompt.phrases)
    return PromptError(f"a threshold is given for {phrase!r}, which the prompt does not have; {advice}")
