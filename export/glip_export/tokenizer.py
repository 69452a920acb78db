"""The BERT-base uncased WordPiece tokenizer, built offline and written into every bundle.

GLIP's text branch is `bert-base-uncased`; its vocabulary (30,522 entries, Apache-2.0, see NOTICE) lies beside
this file, so nothing is fetched from a hub. A checkpoint with another vocabulary carries it itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["SPECIAL_TOKENS", "VOCABULARY", "bert_base_vocabulary", "build_tokenizer"]

VOCABULARY = Path(__file__).with_name("data") / "bert-base-uncased-vocab.txt"
SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def bert_base_vocabulary() -> tuple[str, ...]:
    """Return the 30,522 entries of `bert-base-uncased`, in order of their ids."""
    return tuple(VOCABULARY.read_text(encoding="utf-8").removesuffix("\n").split("\n"))


def build_tokenizer(vocabulary: Sequence[str] | None = None) -> Tokenizer:
    """Return the uncased WordPiece tokenizer of a BERT vocabulary, by default that of `bert-base-uncased`.

    No truncation and no padding: a prompt keeps its true length T, `[CLS]` and `[SEP]` included.
    Same settings as `transformers.BertTokenizerFast`: lower-casing, accents stripped, CJK split.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    entries = {entry: i for i, entry in enumerate(bert_base_vocabulary() if vocabulary is None else vocabulary)}
    tokenizer = Tokenizer(
        models.WordPiece(vocab=entries, unk_token="[UNK]", max_input_chars_per_word=100, continuing_subword_prefix="##")
    )
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        special_tokens=[("[CLS]", entries["[CLS]"]), ("[SEP]", entries["[SEP]"])],
    )
    return tokenizer
