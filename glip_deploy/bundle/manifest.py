"""The exported directory: what `glip-export` writes and everything else reads.

    glip_t/
      manifest.json     variant, configuration, IO contract, hashes, tool versions, parity report
      tokenizer.json    WordPiece, offline
      text.onnx         ids, mask -> embedding                 (+ text.onnx.data)
      image.onnx        frames, embedding -> candidate boxes   (+ image.onnx.data)

A bundle is checked when it is opened: a newer format, a missing file or a changed byte is one clear error.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

import msgspec
from msgspec import Meta

from glip_deploy.bundle.contract import IMAGE_GRAPH, TEXT_GRAPH, GraphContract
from glip_deploy.bundle.records import Fraction, Positive, Record, Sha256
from glip_deploy.errors import BundleError, GlipError
from glip_deploy.files import sha256_of

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = [
    "FORMAT",
    "FORMAT_VERSION",
    "MANIFEST",
    "TOKENIZER",
    "Bundle",
    "CheckpointRecord",
    "FileRecord",
    "HeadRecord",
    "InputRecord",
    "Manifest",
    "ModelRecord",
    "ParityRecord",
    "SwinRecord",
    "TextRecord",
]

FORMAT = "glip-deploy bundle"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"
_AGAIN = "export the bundle again with glip-export"


class FileRecord(msgspec.Struct, frozen=True):
    """What the manifest knows of one file."""

    sha256: Sha256
    size: Annotated[int, Meta(ge=0, description="Bytes.")] = msgspec.field(name="bytes")


class CheckpointRecord(msgspec.Struct, frozen=True):
    """The checkpoint that was exported."""

    file: str
    sha256: Sha256
    ignored: Annotated[tuple[str, ...], Meta(description="Tensors that inference does not use.")] = ()


class SwinRecord(msgspec.Struct, frozen=True):
    """The backbone, a Swin Transformer."""

    embed_dim: int
    depths: tuple[int, ...]
    num_heads: tuple[int, ...]
    window: int
    mlp_hidden: tuple[int, ...]


class TextRecord(msgspec.Struct, frozen=True):
    """The text encoder, a BERT."""

    hidden: int
    layers: int
    heads: int
    intermediate: int
    vocabulary: int
    positions: int


class HeadRecord(msgspec.Struct, frozen=True):
    """The fused head and the selection of boxes."""

    channels: int
    blocks: int
    fusion: bool
    fusion_dim: int
    fusion_heads: int
    bert_heads: int
    bert_intermediate: int
    group_norm_groups: int
    strides: tuple[int, ...]
    score_threshold: Annotated[Fraction, Meta(description="Class scores at or below it never leave the graph.")]
    candidates_per_level: int
    nms_iou: Annotated[Fraction, Meta(description="IoU above which a weaker box of the same class is suppressed.")]
    max_detections: Annotated[Positive, Meta(description="Detections kept per picture.")]


class InputRecord(msgspec.Struct, frozen=True):
    """Preprocessing of pictures and prompts."""

    pixel_mean: Annotated[tuple[float, float, float], Meta(description="Of blue, green and red, 0 to 255.")]
    pixel_std: tuple[float, float, float]
    shortest_side: Annotated[int, Meta(description="Pixels.")]
    longest_side: Annotated[int, Meta(description="Pixels.")]
    size_divisibility: int
    max_tokens: Annotated[Positive, Meta(description="Longest prompt in tokens, [CLS] and [SEP] included.")]


class ModelRecord(msgspec.Struct, frozen=True):
    """The architecture and its numbers."""

    variant: str
    swin: SwinRecord
    bert: TextRecord
    head: HeadRecord
    input: InputRecord
    tunable_tokens: Annotated[int, Meta(description="Rows of a tuned prompt, 0 if there is none.")] = 0


class ParityRecord(msgspec.Struct, frozen=True, omit_defaults=True):
    """One output of a graph compared with torch's."""

    graph: str
    output: str
    max_abs: float
    max_rel: float
    tolerance: Annotated[float, Meta(description="For mean_abs where it is given, else for max_abs.")]
    mean_abs: float | None = None


class Manifest(Record, frozen=True, kw_only=True, tag=FORMAT):
    """A `manifest.json`."""

    newest: ClassVar[int] = FORMAT_VERSION
    error: ClassVar[type[GlipError]] = BundleError

    variant: Annotated[str, Meta(description="GLIP-T, GLIP-T (A), GLIP-L, GLIP (custom), ...")]
    precision: Annotated[str, Meta(description="Of weights and activations: fp32 or fp16.")] = "fp32"
    checkpoint: CheckpointRecord
    config: ModelRecord
    io: Annotated[
        dict[str, GraphContract],
        Meta(
            description="Inputs and outputs of the graphs text and image.",
            extra_json_schema={"required": ["text", "image"]},
        ),
    ]
    files: Annotated[dict[str, FileRecord], Meta(description="By name, relative to the bundle.")]
    parity: tuple[ParityRecord, ...] = ()
    tools: Annotated[dict[str, str], Meta(description="Versions of what wrote the bundle.")] = msgspec.field(
        default_factory=dict
    )

    def __post_init__(self) -> None:
        missing = [graph for graph in ("text", "image") if graph not in self.io]
        if missing:
            raise ValueError(f"io lacks the {missing[0]} graph")


@dataclass(frozen=True)
class Bundle:
    """An opened bundle. Use `Bundle.open`.

    Attributes:
        path: its directory.
        manifest: what its `manifest.json` says.
    """

    path: Path
    manifest: Manifest = field(repr=False)

    @classmethod
    def open(cls, path: str | Path, *, verify: bool = True) -> Bundle:
        """Open and check a bundle.

        Args:
            path: the directory that `glip-export --output` named.
            verify: hash every file (about a second a gigabyte). Without it only presence and size are checked.

        Raises:
            BundleError: not a bundle, a damaged manifest, a newer format, a missing file, a changed byte.
        """
        path = Path(path)
        file = path / MANIFEST
        if not path.is_dir():
            what = "is a file, not a bundle directory" if path.exists() else "does not exist"
            checkpoint = path if path.suffix == ".pth" else "glip_t.pth"
            raise BundleError(f"bundle {path} {what}; make a bundle with glip-export --model {checkpoint} --output DIR")
        if not file.is_file():
            raise BundleError(
                f"{path} is not a bundle: it has no {MANIFEST}; make one with glip-export --output {path}"
            )
        bundle = cls(path, Manifest.read_file(file, _AGAIN))
        bundle._check(verify)
        return bundle

    def _check(self, verify: bool) -> None:
        for name in (TOKENIZER, TEXT_GRAPH, IMAGE_GRAPH):
            if name not in self.files:
                raise BundleError(f"{self.path / MANIFEST} does not list {name}; {_AGAIN}")
        for name, record in self.files.items():
            file = self.path / name
            if Path(name).is_absolute() or ".." in Path(name).parts:
                raise BundleError(f"{self.path / MANIFEST} lists {name!r}, a file outside the bundle; {_AGAIN}")
            if not file.is_file():
                raise BundleError(f"bundle {self.path} lacks {name}; copy the whole directory, or {_AGAIN}")
            size = file.stat().st_size
            if size != record.size:
                raise BundleError(f"{file} has {size} bytes, the manifest says {record.size}; {_AGAIN}")
            if verify and sha256_of(file) != record.sha256:
                raise BundleError(f"{file} was changed after the export (its SHA-256 differs); {_AGAIN}")

    @property
    def variant(self) -> str:
        """The model's name: "GLIP-T", "GLIP-L", ..."""
        return self.manifest.variant

    @property
    def files(self) -> Mapping[str, FileRecord]:
        """Size and hash of every file, by its name relative to `path`."""
        return self.manifest.files

    @property
    def key(self) -> str:
        """Hex identity of the text branch: bundles that encode prompts alike share cached embeddings."""
        digest = hashlib.sha256(str(FORMAT_VERSION).encode())
        for name in sorted(n for n in self.files if n == TOKENIZER or n.startswith("text.")):
            digest.update(f"\n{name} {self.files[name].sha256}".encode())
        return digest.hexdigest()

    @property
    def score_threshold(self) -> float:
        """Class scores at or below this never leave the network (0.05 in the released models)."""
        return self.manifest.config.head.score_threshold

    @property
    def nms_iou(self) -> float:
        """IoU above which a weaker box of the same class is suppressed (0.6)."""
        return self.manifest.config.head.nms_iou

    @property
    def max_detections(self) -> int:
        """Detections kept per picture (100)."""
        return self.manifest.config.head.max_detections

    @property
    def max_tokens(self) -> int:
        """Longest prompt in tokens, `[CLS]` and `[SEP]` included (256)."""
        return self.manifest.config.input.max_tokens

    def tokenizer(self) -> Tokenizer:
        """Load the bundle's tokenizer (offline).

        Raises:
            BundleError: the file is no tokenizer.
        """
        from tokenizers import Tokenizer

        try:
            return Tokenizer.from_file(str(self.path / TOKENIZER))
        except Exception as error:  # the library raises bare Exception for every fault of the file
            raise BundleError(f"{self.path / TOKENIZER} is not a tokenizer ({error}); {_AGAIN}") from None
