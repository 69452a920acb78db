"""Lists of class names that are longer than a prompt: chunks that fit, each a prompt of its own.

A chunk is a number of classes that follow each other, the same number in all chunks but the last, so that changing a
class changes one chunk and the others' embeddings stay known. The official evaluation on LVIS does the same with 40
classes (`TEST.CHUNKED_EVALUATION` of the official configuration).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

from glip_deploy.errors import OptionError, PromptError, shown
from glip_deploy.prompts.syntax import ClassName, Phrases, mark
from glip_deploy.prompts.tokens import MAX_TOKENS, Prompt, parse_prompt

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["parse_chunks"]

_FILL = 0.85
"""Part of a prompt that the average chunk fills: names differ in length, and one chunk too long becomes two."""
_STEP = 8
"""Numbers of classes are multiples of it, so that a name that becomes longer or shorter rarely changes them."""
_BATCH = 1000


def parse_chunks(
    names: Sequence[str | ClassName],
    tokenizer: Tokenizer,
    *,
    phrases: Phrases | str = Phrases.AUTO,
    max_tokens: int = MAX_TOKENS,
    classes_per_prompt: int | None = None,
) -> tuple[Prompt, ...]:
    """Tokenize a list of names of any length, in time that grows with it.

    A list that fits into one prompt is one, as `parse_prompt` makes it. A longer one is divided into chunks of equally
    many classes, so many that the average chunk fills 85 % of a prompt; a chunk that is too long is halved until it
    fits. The same list always gives the same chunks.

    Args:
        names: as `parse_prompt` takes them.
        tokenizer: BERT's.
        phrases: checked, as `parse_prompt` does; a list says itself what scores.
        max_tokens: limit on the tokens of a prompt, `[CLS]` and `[SEP]` included.
        classes_per_prompt: so many classes in each chunk, or fewer where they do not fit.

    Returns:
        The prompts, in the list's order.

    Raises:
        PromptError: what `parse_prompt` raises, or a class that is longer than a prompt by itself.
        OptionError: `classes_per_prompt` below 1.
    """
    if classes_per_prompt is not None and (type(classes_per_prompt) is not int or classes_per_prompt < 1):
        raise OptionError(f"classes_per_prompt is {shown(classes_per_prompt)}; legal is a whole number of 1 or more")
    whole = mark(names, phrases)  # finds repeated, empty and malformed names by their place in the whole list
    try:
        whole.caption.encode()
    except UnicodeEncodeError:
        return (parse_prompt(names, tokenizer, phrases=phrases, max_tokens=max_tokens),)  # which says what is wrong
    counts = _token_counts(names, tokenizer, max_tokens - 2)
    chunks = _chunks(counts, max_tokens - 2, classes_per_prompt)
    return tuple(
        parse_prompt(names[start:end], tokenizer, phrases=phrases, max_tokens=max_tokens) for start, end in chunks
    )


def _token_counts(names: Sequence[str | ClassName], tokenizer: Tokenizer, room: int) -> list[int]:
    """Return the tokens of each class, with its prefix and suffix."""
    counts: list[int] = []
    for first in range(0, len(names), _BATCH):
        # A dot between two classes is a token of its own, so tokens of a caption are those of its parts.
        captions = [mark([name]).caption for name in names[first : first + _BATCH]]
        counts += [len(encoding.ids) for encoding in tokenizer.encode_batch(captions, add_special_tokens=False)]
    for index, count in enumerate(counts):
        what = f"class {index} ({shown(mark([names[index]]).phrases[0])})" if not 0 < count <= room else ""
        if count > room:
            raise PromptError(f"{what} has {count} tokens by itself, a prompt has room for {room}; shorten it")
        if not count:
            raise PromptError(
                f"{what} has no character that the tokenizer knows, so it could never be detected;"
                " remove it or use other words"
            )
    return counts


def _chunks(counts: Sequence[int], room: int, classes: int | None) -> Iterator[tuple[int, int]]:
    """Give the first class of each chunk and the one after its last."""
    total = [0, *accumulate(count + 1 for count in counts)]  # with the dot that follows

    def fits(start: int, end: int) -> bool:
        return total[end] - total[start] - 1 <= room

    if classes is None:
        if fits(0, len(counts)):
            yield 0, len(counts)
            return
        classes = max(1, int(_FILL * room * len(counts) / total[-1]))
        classes -= classes % _STEP if classes > _STEP else 0
    for start in range(0, len(counts), classes):
        waiting = [(start, min(start + classes, len(counts)))]
        while waiting:
            first, end = waiting.pop()
            if fits(first, end):
                yield first, end
            else:
                middle = (first + end + 1) // 2
                waiting += [(middle, end), (first, middle)]
