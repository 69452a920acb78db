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
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glip_deploy.bundle.contract import IMAGE_GRAPH, TEXT_GRAPH
from glip_deploy.errors import GlipError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
from glip_deploy.files import sha256_of

__all__ = ["FORMAT", "FORMAT_VERSION", "MANIFEST", "TOKENIZER", "Bundle", "FileRecord"]

FORMAT = "glip-deploy bundle"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"


@dataclass(frozen=True)
class FileRecord:
    """What the manifest knows of one file."""

    sha256: str
    size: int


@dataclass(frozen=True)
class Bundle:
    """An opened bundle. Use `Bundle.open`."""

    path: Path
    variant: str
    files: Mapping[str, FileRecord]
    manifest: Mapping[str, Any] = field(repr=False)

    @classmethod
    def open(cls, path: str | Path, *, verify: bool = True) -> Bundle:
        """Open and check a bundle.

        Args:
            path: the directory that `glip-export --output` named.
            verify: hash every file (about a second a gigabyte). Without it only presence and size are checked.

        Raises:
            GlipError: not a bundle, a newer format, a missing file, a changed byte.
        """
        path = Path(path)
        manifest = _read_manifest(path)
        try:
            files = {
                name: FileRecord(str(record["sha256"]), int(record["bytes"]))
                for name, record in manifest["files"].items()
            }
            bundle = cls(path, str(manifest["variant"]), files, manifest)
            for name, value, least, most in (
                ("score_threshold", bundle.score_threshold, 0, 1.0),
                ("nms_iou", bundle.nms_iou, 0, 1.0),
                ("max_detections", bundle.max_detections, 1, math.inf),
                ("max_tokens", bundle.max_tokens, 1, math.inf),
            ):
                if not least <= value <= most:
                    raise ValueError(f"{name} is {value}")
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise GlipError(
                f"{path / MANIFEST} is damaged ({type(error).__name__}: {error}); export the bundle again"
            ) from None
        bundle._check(verify)
        return bundle

    def _check(self, verify: bool) -> None:
        again = "export the bundle again with glip-export"
        for name in (TOKENIZER, TEXT_GRAPH, IMAGE_GRAPH):
            if name not in self.files:
                raise GlipError(f"{self.path / MANIFEST} does not list {name}; {again}")
        for name, record in self.files.items():
            file = self.path / name
            if Path(name).is_absolute() or ".." in Path(name).parts:
                raise GlipError(f"{self.path / MANIFEST} lists {name!r}, a file outside the bundle; {again}")
            if not file.is_file():
                raise GlipError(f"bundle {self.path} lacks {name}; copy the whole directory, or {again}")
            size = file.stat().st_size
            if size != record.size:
                raise GlipError(f"{file} has {size} bytes, the manifest says {record.size}; {again}")
            if verify and sha256_of(file) != record.sha256:
                raise GlipError(f"{file} was changed after the export (its SHA-256 differs); {again}")

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
        return float(self.manifest["config"]["head"]["score_threshold"])

    @property
    def nms_iou(self) -> float:
        """IoU above which a weaker box of the same class is suppressed (0.6)."""
        return float(self.manifest["config"]["head"]["nms_iou"])

    @property
    def max_detections(self) -> int:
        """Detections kept per picture (100)."""
        return int(self.manifest["config"]["head"]["max_detections"])

    @property
    def max_tokens(self) -> int:
        """Longest prompt in tokens, `[CLS]` and `[SEP]` included (256)."""
        return int(self.manifest["config"]["input"]["max_tokens"])

    def tokenizer(self) -> Tokenizer:
        """Load the bundle's tokenizer (offline)."""
        from tokenizers import Tokenizer

        try:
            return Tokenizer.from_file(str(self.path / TOKENIZER))
        except Exception as error:  # the library raises bare Exception for every fault of the file
            raise GlipError(f"{self.path / TOKENIZER} is not a tokenizer ({error}); export the bundle again") from None


def _read_manifest(path: Path) -> Mapping[str, Any]:
    file = path / MANIFEST
    if not path.is_dir():
        what = "is a file, not a bundle directory" if path.exists() else "does not exist"
        checkpoint = path if path.suffix == ".pth" else "glip_t.pth"
        raise GlipError(f"bundle {path} {what}; make a bundle with glip-export --model {checkpoint} --output DIR")
    if not file.is_file():
        raise GlipError(f"{path} is not a bundle: it has no {MANIFEST}; make one with glip-export --output {path}")
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise GlipError(f"{file} cannot be read ({error}); export the bundle again") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise GlipError(f'{file} is not a glip-deploy manifest ("format" is not "{FORMAT}")')
    version = manifest.get("format_version")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise GlipError(f"{file} is damaged (format_version is {version!r}); export the bundle again")
    if version > FORMAT_VERSION:
        raise GlipError(
            f"bundle {path} has format {version}, this glip-deploy reads up to {FORMAT_VERSION};"
            " upgrade with pip install -U glip-deploy"
        )
    return manifest
