"""Noun phrases of a caption: what GLIP grounds when nothing in the caption is marked.

The words are tagged with parts of speech (Penn Treebank tags), by spaCy where it and an English model are installed,
else by TextBlob's tagger, which carries its data in its package. Nothing is downloaded. A grammar over the tags finds
the phrases. It covers the official demo's (`find_noun_phrases` in maskrcnn_benchmark/engine/predictor_glip.py:
determiner? adjective* noun+) and adds what that one loses: numbers, possessives, participles and coordinated
adjectives, and quantities ("a pile of rocks"). As in the demo, a phrase includes its determiner.
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING

from glip_deploy.errors import MissingPackage, PromptError, shown

if TYPE_CHECKING:
    from glip_deploy.prompts.syntax import Span

__all__ = ["find_phrases", "is_plain_name", "tagger_installed"]

_log = logging.getLogger(__name__)
_LOADING = threading.Lock()
_Tagger = Callable[[list[list[str]]], list[list[str]]]
"""Sentences of words to sentences of Penn tags, one tag a word."""
SPACY_MODELS = ("en_core_web_trf", "en_core_web_lg", "en_core_web_md", "en_core_web_sm")

_WORD = re.compile(r"\w+(?:['’./-]\w+)*|[^\w\s]")
_SENTENCE_END = frozenset(".!?;:")


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_AUXILIARIES = _words("am is are was were be been being has have had do does did get gets got")
_ARTICLES = _words("a an the")
_PRONOUN_CONTRACTION = re.compile(r"(?:i|you|he|she|it|we|they|that|there|here|who|what|where)'(?:s|m|re|ve|ll|d)")
# An adverb belongs to a phrase only before an adjective: "a brightly colored kite", "a very tall man".
_DEGREES = _words("very quite rather extremely well half most more less too newly")
# After these, a word in -ing is a verb with an object ("a bag for carrying tools"), not an adjective.
_BEFORE_VERB = _words("for by while after before when without from")
_AFTER_MOTION = _words("over into onto through")
# "a pile of rocks" is one thing to ground, "a man of the sea" two.
_QUANTITIES = _words(
    "couple pair pairs group groups crowd pile piles heap stack stacks bunch bunches row rows lot lots set sets number"
    " herd flock collection assortment variety handful piece pieces slice slices"
)
# With "of", these say where a thing is: "left of two dogs", "on top of the shelf", "in the middle of a street".
_SIDES = _words("left right")
_PLACES = _SIDES | _words("top bottom front back middle center centre side")
# Words that a class name has inside at most by exception, so a caption that has one is no mere name.
_FUNCTION_WORDS = (
    _AUXILIARIES
    | _ARTICLES
    | _words(
        "and or but of on in at by to from for with without into onto over under above below behind beside between"
        " near across along through around next off up down inside outside against while as that which who whose"
        " this these those there here he she it they his her its their him them"
    )
)

# One letter a word, so that the grammar is a regular expression:
#   T article or possessive   D other determiner   C number   A adjective   P participle that describes a noun
#   B bare verb where a noun is due ("a stop sign", "a swing")   R adverb   N noun   Q noun of quantity   o "of"
#   & "and", "or"   , comma   I preposition   X auxiliary   V verb   . all else
# Repetitions are possessive, as what follows begins with other letters, or bounded: time is linear in the text.
_ADJECTIVE = r"(?>R{0,2}+[APB](?:,?&?(?=R{0,2}+[AP]))?)"  # with the comma or "and" before another one
_BEFORE_NOUN = rf"[TD]{{0,2}}+C{{0,2}}+{_ADJECTIVE}{{0,12}}+"
_PHRASE = re.compile(
    rf"(?:{_BEFORE_NOUN}N{{0,8}}+Qo){{0,3}}"
    rf"(?:{_BEFORE_NOUN}[NQ]++"
    # A determiner promises a noun: without any, the last word is it, whatever its tag ("a remote", "a sliced orange").
    rf"|(?:[TD]?T|[TD]{{0,2}}+C{{1,2}}+){_ADJECTIVE}{{1,12}}+(?<=[APB]))"
)


def find_phrases(text: str) -> list[Span]:
    """Return where the noun phrases of an English text are.

    Args:
        text: any text; time is linear in its length.

    Returns:
        (start, end) character positions, end exclusive: ascending, inside `text`, not overlapping, none empty.
        A phrase that occurs twice is there twice. The same text and the same tagger give the same spans.

    Raises:
        MissingPackage: neither TextBlob nor spaCy with an English model is installed.
        PromptError: the text has no noun.
    """
    sentences: list[list[re.Match[str]]] = [[]]
    for match in _WORD.finditer(text):
        if match[0] in _SENTENCE_END:
            sentences.append([])
        else:
            sentences[-1].append(match)
    sentences = [sentence for sentence in sentences if sentence]
    words = [[match[0].lower().replace("’", "'") for match in sentence] for sentence in sentences]
    with _LOADING:
        tagger = _tagger()
    spans = []
    for sentence, lower, tags in zip(sentences, words, tagger(words), strict=True):
        for found in _PHRASE.finditer(_letters(lower, tags)):
            spans.append((sentence[found.start()].start(), sentence[found.end() - 1].end()))
    if not spans:
        raise PromptError(f"no noun is found in {shown(text)}; put brackets around what to find: 'a [dog] that runs'")
    return spans


def is_plain_name(text: str) -> bool:
    """Tell whether a caption is but a name, such as "traffic light" or "a red apple", and no sentence.

    That takes no tagger: a name has no punctuation between its words, and no function word after the first.
    """
    words = [match[0].lower() for match in _WORD.finditer(text.strip(" \t\r\n."))]
    return all(word[0].isalnum() or word[0] == "_" for word in words) and _FUNCTION_WORDS.isdisjoint(words[1:])


def tagger_installed() -> bool:
    """Tell whether `find_phrases` can work here."""
    return _spacy_model() is not None or find_spec("textblob") is not None


def _letters(words: Sequence[str], tags: Sequence[str]) -> str:
    """Return one letter a word of a sentence; see `_PHRASE`."""
    mended = _mended(words, tags)
    letters: list[str] = []
    for index, (word, tag) in enumerate(zip(words, mended, strict=True)):
        before = next((letter for letter in reversed(letters[-3:]) if letter != "R"), "")
        following = mended[index + 1] if index + 1 < len(words) else ""
        letters.append(_letter(word, tag, before, words[index - 1] if index else "", following))
    for index, word in enumerate(words):
        _drop_place(index, word, words, mended, letters)
    return "".join(letters)


def _mended(words: Sequence[str], tags: Sequence[str]) -> list[str]:
    """Return the tags of a sentence; where nouns and verbs were taken for each other, their neighbors put it right."""
    out: list[str] = []
    joined = counted = False
    for index, (word, tag) in enumerate(zip(words, tags, strict=True)):
        before, following = (out[-1] if out else ""), ([*tags[index + 1 : index + 2], ""])[0]
        joined |= tag == "CC"
        counted = (tag == "CD" and word != "one") or (counted and before.startswith(("CD", "NN", "JJ")))
        next_word = words[index + 1] if index + 1 < len(words) else ""
        noun = verb = False
        if tag in ("VB", "VBP"):
            # One dog "runs" and two "run", so a bare verb after one noun is a noun: "a teddy bear".
            compound = before in ("NN", "NNP") and not joined and following not in ("DT", "PRP", "PRP$")
            listed = before in ("", ",") and (following == "," or (following == "" and before == ","))
            name = len(words) == 2 and index == 1 and before in ("VB", "VBP", "JJ")  # "stop sign"
            noun = compound or listed or name or before == "IN"
        elif tag == "VBZ":
            noun = counted and before == "NN"  # "two dog faces"
        elif tag == "MD":
            noun = word == "can" and before == "NN" and following not in ("VB", "VBP", "RB")  # "a trash can"
        elif tag == "NNS":
            # "a boy rides his bike", "the brown fox jumps over the dog"
            verb = before == "NN" and (following in ("DT", "PRP$") or next_word in _AFTER_MOTION)
        out.append("NN" if noun else "VBZ" if verb else tag)
    return out


def _letter(word: str, tag: str, before: str, previous: str, following: str) -> str:
    """Return the letter of a word, given the letter and the word before it, and the tag of the word after it.

    `before` passes over adverbs, and is empty at the start of a sentence.
    """
    if not any(character.isalnum() for character in word):
        return "," if word == "," else "."
    if _PRONOUN_CONTRACTION.fullmatch(word) or (word, following) == ("next", "TO"):
        return "."
    if word in _AUXILIARIES or tag == "MD" or word.endswith("n't"):
        return "X"
    if word in _ARTICLES or tag in ("PRP$", "WP$"):
        return "T"
    if word == "of":
        return "o"
    if tag.startswith("NN") or tag == "FW" or word.endswith("'s"):
        return "Q" if word in _QUANTITIES else "N"
    if tag.startswith("VB"):
        return _verb(tag, before, previous, following)
    if tag.startswith("RB"):
        return "R" if word.endswith("ly") or word in _DEGREES else "."
    if tag.startswith("JJ"):
        return "A"
    return {"DT": "D", "PDT": "D", "CD": "C", "CC": "&", "IN": "I", "TO": "I"}.get(tag, ".")


def _verb(tag: str, before: str, previous: str, following: str) -> str:
    """Return the letter of a word tagged as a verb: many are adjectives or nouns where they stand."""
    noun_is_due = before in ("T", "C", "A", "P", "B")
    starts_name = before == "" and following.startswith("NN")
    if tag == "VBZ":
        return "N" if noun_is_due else "V"
    if tag == "VBN":
        return "V" if before in ("N", "Q", "X") else "P"
    if tag == "VBG":
        after_preposition = before in ("I", "o") and previous not in _BEFORE_VERB
        return "P" if noun_is_due or starts_name or after_preposition else "V"
    if tag == "VBD":
        return "P" if noun_is_due else "V"
    return "B" if noun_is_due or starts_name else "V"


def _drop_place(index: int, word: str, words: Sequence[str], tags: Sequence[str], letters: list[str]) -> None:
    """Take a word that only says where something is, such as "top" in "on top of", out of the grammar."""
    if word not in _PLACES:
        return
    following = words[index + 1] if index + 1 < len(words) else ""
    start = index - 1 if index and words[index - 1] == "the" else index
    after_preposition = start > 0 and letters[start - 1] == "I"
    if following == "of":
        bare = start == index and (index == 0 or word in _SIDES)
        drop = bare or after_preposition
    else:
        ends = index + 1 == len(words) or not tags[index + 1].startswith(("NN", "JJ", "VBG", "VBN"))
        drop = word in _SIDES and after_preposition and ends
    if drop:
        letters[start : index + 1] = "." * (index + 1 - start)


@cache
def _tagger() -> _Tagger:
    model = _spacy_model()
    if model is not None:
        try:
            return _spacy_tagger(model)
        except (ImportError, OSError, ValueError) as error:
            _log.warning("spaCy's %s cannot be used to find phrases: %s", model, error)
    if find_spec("textblob") is not None:
        return _textblob_tagger()
    raise MissingPackage(
        "the phrases of a caption are found with a package that is not installed; pip install 'glip-deploy[captions]',"
        " or put brackets around what to find: 'a man with a [green hat]'"
    )


def _spacy_model() -> str | None:
    if find_spec("spacy") is None:
        return None
    return next((name for name in SPACY_MODELS if find_spec(name) is not None), None)


def _spacy_tagger(model: str) -> _Tagger:
    # Neither is imported by name: they are the user's own, and no extra brings them.
    nlp = import_module(model).load(exclude=["parser", "ner", "lemmatizer", "attribute_ruler"])
    document = import_module("spacy.tokens").Doc
    _log.info("captions are tagged by spaCy's %s", model)

    def tag(sentences: list[list[str]]) -> list[list[str]]:
        documents = (document(nlp.vocab, words=words) for words in sentences)
        return [[str(token.tag_) for token in tagged] for tagged in nlp.pipe(documents)]

    return tag


def _textblob_tagger() -> _Tagger:
    from textblob.taggers import PatternTagger

    tagger = PatternTagger()
    tagger.tag("the unheardofest", tokenize=False)  # loads all its tables, here where one thread does it
    _log.info("captions are tagged by TextBlob")

    def tag(sentences: list[list[str]]) -> list[list[str]]:
        # Sentences are lines and words are set apart by spaces: the tagger's own tokenizer is not used.
        tagged = tagger.tag("\n".join(map(" ".join, sentences)), tokenize=False) if sentences else []
        tags = iter([tag for _, tag in tagged])
        return [[next(tags) for _ in sentence] for sentence in sentences]

    return tag
