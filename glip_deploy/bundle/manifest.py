"""The exported directory: what `glip-export` writes and everything else reads.

    glip_t/
      manifest.json     variant, configuration, IO contract, hashes, tool versions, parity report
      tokenizer.json    WordPiece, offline
      text.onnx         ids, mask -> embedding                 (+ text.onnx.data)
      image.onnx        frames, embedding -> candidate boxes   (+ image.onnx.data)
      backbone.onnx     its first part, frames -> features of the levels           (weights in image.onnx.data)
      head.onnx         its second part, features, embedding -> candidate boxes    (weights in image.onnx.data)

A bundle is checked when it is opened: a newer format, a missing file or a changed byte is one clear error.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, TypeVar

import msgspec
from msgspec import Meta

from glip_deploy.bundle.contract import BACKBONE_GRAPH, HEAD_GRAPH, IMAGE_GRAPH, TEXT_GRAPH, GraphContract
from glip_deploy.bundle.opened import FileState, OpenedFolder
from glip_deploy.bundle.records import Fraction, Positive, Record, Sha256
from glip_deploy.errors import BundleError, GlipError, reason_of
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
_ATTEMPTS = 10
"""At loading a file while others touch it."""
_T = TypeVar("_T")


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
            description="Inputs and outputs by graph: text and image; backbone and head where there are any.",
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
        manifest_sha256: hex digest of that file's bytes; empty where the bundle was not opened.
        verified: whether all files were hashed.
    """

    path: Path
    manifest: Manifest = field(repr=False)
    manifest_sha256: str = field(default="", repr=False)
    verified: bool = field(default=False, repr=False)
    _folder: OpenedFolder | None = field(default=None, repr=False, compare=False)
    _states: dict[str, FileState] = field(default_factory=dict, repr=False, compare=False)
    """Of every file, when it was checked."""

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
        try:
            folder = OpenedFolder(path)
            data = (folder.path / MANIFEST).read_bytes()
        except (OSError, ValueError) as error:
            raise _not_a_bundle(path, error) from None
        manifest = Manifest.parse(data, path / MANIFEST, _AGAIN)
        bundle = cls(path, manifest, hashlib.sha256(data).hexdigest(), verify, folder)
        try:
            bundle._check(folder)
        except OSError as error:
            reason = folder.shown(reason_of(error))
            raise BundleError(f"bundle {path} cannot be read ({reason}); copy the whole directory again") from None
        return bundle

    def _check(self, folder: OpenedFolder) -> None:
        for name in (TOKENIZER, TEXT_GRAPH, IMAGE_GRAPH):
            if name not in self.files:
                raise BundleError(f"{self.path / MANIFEST} does not list {name}; {_AGAIN}")
        for name, record in self.files.items():
            file, read = self.path / name, folder.path / name
            if Path(name).is_absolute() or ".." in Path(name).parts:
                raise BundleError(f"{self.path / MANIFEST} lists {name!r}, a file outside the bundle; {_AGAIN}")
            if not read.is_file():
                raise BundleError(f"bundle {self.path} lacks {name}; copy the whole directory, or {_AGAIN}")
            state = folder.state(name)  # before it is read: a change meanwhile is found when it is loaded
            if state.size != record.size:
                raise BundleError(f"{file} has {state.size} bytes, the manifest says {record.size}; {_AGAIN}")
            if self.verified and sha256_of(read) != record.sha256:
                raise BundleError(f"{file} was changed after the export (its SHA-256 differs); {_AGAIN}")
            self._states[name] = state

    def load(self, loader: Callable[[Path], _T]) -> _T:
        """Let a function load files of the bundle, and check that they are those that were opened.

        A bundle that another process puts in its place meanwhile is never mixed with this one.

        Args:
            loader: is given the folder to read from, and may be called again if a file is touched while it reads.

        Raises:
            BundleError: a file was changed or removed since the bundle was opened.
            GlipError: whatever the loader raises.
        """
        folder = self._folder
        if folder is None:
            return loader(self.path)
        for _ in range(_ATTEMPTS):
            before, renames = self._present(folder), folder.renames
            try:
                loaded = loader(folder.path)
            except GlipError as error:
                if folder.renames != renames:
                    continue
                raise type(error)(folder.shown(str(error))) from None
            if self._present(folder) == before and folder.renames == renames:
                return loaded
        raise BundleError(f"bundle {self.path} changes all the time; open it when it is written")

    def _present(self, folder: OpenedFolder) -> dict[str, FileState]:
        """Return the state of every file, after those that were touched since they were checked are checked again."""
        try:
            found = {name: folder.state(name) for name in self._states}
            for name, state in found.items():
                if state != self._states[name]:
                    # Another link or new permissions change a file's state, but not its bytes.
                    if not self.verified or sha256_of(folder.path / name) != self.files[name].sha256:
                        raise BundleError(f"{self.path / name} was changed since the bundle was opened; open it again")
                    self._states[name] = state
        except OSError:
            raise BundleError(f"bundle {self.path} was removed or replaced meanwhile; open it again") from None
        return found

    @property
    def variant(self) -> str:
        """The model's name: "GLIP-T", "GLIP-L", ..."""
        return self.manifest.variant

    @property
    def files(self) -> Mapping[str, FileRecord]:
        """Size and hash of every file, by its name relative to `path`."""
        return self.manifest.files

    @property
    def is_split(self) -> bool:
        """Whether the image branch is there in two parts too, so that several prompts share one backbone run."""
        parts = {"backbone": BACKBONE_GRAPH, "head": HEAD_GRAPH}
        return all(graph in self.manifest.io and file in self.files for graph, file in parts.items())

    @property
    def key(self) -> str:
        """Hex identity of the text branch: bundles that encode prompts alike share cached embeddings.

        It is made of the files' hashes. Where they were not verified, which files they are takes part: bytes that
        were not hashed may encode otherwise than the manifest says.
        """
        digest = hashlib.sha256(str(FORMAT_VERSION).encode())
        for name in sorted(n for n in self.files if n == TOKENIZER or n.startswith("text.")):
            digest.update(f"\n{name} {self.files[name].sha256}".encode())
            if not self.verified and name in self._states:
                digest.update(f" {tuple(self._states[name])}".encode())
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

        def read(folder: Path) -> Tokenizer:
            try:
                return Tokenizer.from_file(str(folder / TOKENIZER))
            except Exception as error:  # the library raises bare Exception for every fault of the file
                raise BundleError(f"{folder / TOKENIZER} is not a tokenizer ({error}); {_AGAIN}") from None

        return self.load(read)


def _not_a_bundle(path: Path, error: Exception) -> BundleError:
    """Return the error for a path that cannot be opened as a bundle."""
    if isinstance(error, NotADirectoryError):
        checkpoint = path if path.suffix == ".pth" else "glip_t.pth"
        return BundleError(
            f"bundle {path} is a file, not a bundle directory;"
            f" make a bundle with glip-export --model {checkpoint} --output DIR"
        )
    if not isinstance(error, FileNotFoundError):
        return BundleError(f"bundle {path} cannot be read ({reason_of(error)}); check its name and permissions")
    if path.is_dir():
        return BundleError(f"{path} is not a bundle: it has no {MANIFEST}; make one with glip-export --output {path}")
    return BundleError(f"bundle {path} does not exist; make a bundle with glip-export --model glip_t.pth --output DIR")
