"""The BERT-base uncased WordPiece tokenizer, built offline and written into every bundle.

GLIP's text branch is `bert-base-uncased`; its vocabulary (30,522 entries, Apache-2.0, see NOTICE) lies beside
this file, so nothing is fetched from a hub.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["VOCABULARY", "build_tokenizer"]

VOCABULARY = Path(__file__).with_name("data") / "bert-base-uncased-vocab.txt"


@lru_cache(maxsize=4)
def build_tokenizer(vocabulary: Path = VOCABULARY) -> Tokenizer:
    """Return the uncased WordPiece tokenizer of a BERT vocabulary file (one entry per line).

    No truncation and no padding: a prompt keeps its true length T, `[CLS]` and `[SEP]` included.
    Same settings as `transformers.BertTokenizerFast`: lower-casing, accents stripped, CJK split.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    entries = {line.rstrip("\n"): i for i, line in enumerate(vocabulary.open(encoding="utf-8"))}
    tokenizer = Tokenizer(
        models.WordPiece(vocab=entries, unk_token="[UNK]", max_input_chars_per_word=100, continuing_subword_prefix="##")
    )
    tokenizer.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        special_tokens=[("[CLS]", entries["[CLS]"]), ("[SEP]", entries["[SEP]"])],
    )
    return tokenizer
