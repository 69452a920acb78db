"""What a folder of engines says of itself, `build.json`, and whether its engines may run here.

    glip_t/engines/sm80-tensorrt-rtx-1.7.1.116-fp16-native/
      text.plan, image.plan
      libglip_deform.so  the plugin, if they need it
      build.json        what they were built from, by what, for what, and how to build them again

A TensorRT engine belongs to one GPU type, one TensorRT version and one bundle. Loaded elsewhere it fails late or,
worse, runs with the wrong weights; `EngineRecord.check` says so first, without importing TensorRT.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import msgspec
from msgspec import Meta

from glip_deploy.bundle.manifest import Bundle
from glip_deploy.bundle.records import Record, Sha256
from glip_deploy.errors import EngineError, EngineMismatch, GlipError
from glip_deploy.files import sha256_of

__all__ = [
    "BUILD_FILE",
    "ENGINES",
    "RECORD_FORMAT",
    "RECORD_VERSION",
    "EngineFile",
    "EngineRecord",
    "Machine",
    "PluginRecord",
    "TensorRecord",
    "find_engines",
    "read_records",
]

BUILD_FILE = "build.json"
ENGINES = "engines"
RECORD_FORMAT = "glip-deploy engines"
RECORD_VERSION = 1


@dataclass(frozen=True)
class Machine:
    """What is here to run an engine."""

    flavour: str
    """`tensorrt` or `tensorrt-rtx`."""
    version: str
    """The library's `__version__`."""
    gpu: str
    """The GPU's name as the driver gives it."""
    compute_capability: int
    """Major and minor as one number: 80 for 8.0."""


class TensorRecord(msgspec.Struct, frozen=True):
    """An input or output as the network has it."""

    name: str
    dtype: str
    shape: Annotated[tuple[int, ...], Meta(description="-1 is an axis that the profiles bound.")]


class PluginRecord(msgspec.Struct, frozen=True):
    """The library that an engine cannot be loaded without; it lies beside the engines."""

    file: str
    sha256: Sha256


class EngineFile(msgspec.Struct, frozen=True):
    """One engine."""

    sha256: Sha256
    size: Annotated[int, Meta(ge=0, description="Bytes.")] = msgspec.field(name="bytes")
    seconds: Annotated[float, Meta(ge=0, description="Duration of the build.")]
    inputs: tuple[TensorRecord, ...]
    outputs: tuple[TensorRecord, ...]
    profiles: Annotated[
        tuple[Mapping[str, Annotated[tuple[tuple[int, ...], ...], Meta(min_length=3, max_length=3)]], ...],
        Meta(description="By optimization profile and input: smallest, best and largest shape."),
    ]


class EngineRecord(Record, frozen=True, kw_only=True, tag=RECORD_FORMAT):
    """A `build.json`. Use `EngineRecord.read`."""

    newest: ClassVar[int] = RECORD_VERSION
    error: ClassVar[type[GlipError]] = EngineError

    flavour: Annotated[str, Meta(description="tensorrt or tensorrt-rtx.")]
    version: Annotated[str, Meta(description="Of the flavour's library.")]
    compute_capability: Annotated[int, Meta(description="Major and minor as one number: 80 for 8.0.")]
    gpu: Annotated[str | None, Meta(description="GPU it was built on; null without one (tensorrt-rtx needs none).")]
    precision: Annotated[str, Meta(description="fp32, fp16 or bf16.")]
    form: Annotated[str, Meta(description="Of the deformable convolution: native or plugin.")]
    plugin: PluginRecord | None
    manifest_sha256: Annotated[Sha256, Meta(description="Of the bundle's manifest, which has all other hashes.")]
    options: Annotated[str, Meta(description="What glip-build takes after BUNDLE, --flavor and target left out.")]
    engines: Annotated[
        dict[str, EngineFile],
        Meta(description="By file name: text.plan, image.plan; backbone.plan and head.plan with --split."),
    ]

    @classmethod
    def read(cls, folder: Path) -> EngineRecord:
        """Read a folder's record.

        Raises:
            EngineError: no record, a damaged one, or a newer format.
        """
        file = folder / BUILD_FILE
        if not file.is_file():
            raise EngineError(f"{folder} holds no engines (it has no {BUILD_FILE}); build them with glip-build BUNDLE")
        return cls.read_file(file, f"delete {folder} and build again with glip-build")

    def write(self, folder: Path) -> None:
        """Write `build.json` into a folder."""
        self.write_file(folder / BUILD_FILE)

    def check(self, folder: Path, bundle: Bundle, machine: Machine, *, verify: bool = True) -> None:
        """Raise unless these engines may run here.

        Args:
            folder: where the record was read.
            bundle: the bundle they are to serve.
            machine: what is here.
            verify: hash the engines and the plugin (about a second a gigabyte); without it the engines' sizes and the
                bundle's manifest are checked.

        Raises:
            EngineMismatch: the first thing that differs, in one line that ends with the command that builds again.
        """
        words = ("glip-build", str(bundle.path), "--flavor", machine.flavour, self.options, "--overwrite")
        again = f"build again: {' '.join(word for word in words if word)}"
        self._check_machine(folder, machine, again)
        if bundle.manifest_sha256 != self.manifest_sha256:
            raise EngineMismatch(f"engines {folder} were built from another export than {bundle.path}; {again}")
        if self.plugin is not None:
            library = folder / self.plugin.file
            if Path(self.plugin.file).name != self.plugin.file or not library.is_file():
                raise EngineMismatch(f"engines {folder} lack their plugin library {self.plugin.file}; {again}")
            if verify and sha256_of(library) != self.plugin.sha256:
                raise EngineMismatch(f"plugin library {library} is not the one these engines were built with; {again}")
        for name, engine in self.engines.items():
            file = folder / name
            if Path(name).name != name or not file.is_file():
                raise EngineMismatch(f"engines {folder} lack {name}; {again}")
            size = file.stat().st_size
            if size != engine.size or (verify and sha256_of(file) != engine.sha256):
                raise EngineMismatch(f"{file} was changed or cut short after its build; {again}")

    def _check_machine(self, folder: Path, machine: Machine, again: str) -> None:
        if machine.flavour != self.flavour:
            raise EngineMismatch(f"engines {folder} were built for {self.flavour}, here is {machine.flavour}; {again}")
        if machine.version != self.version:
            raise EngineMismatch(
                f"engines {folder} were built by {self.flavour} {self.version}, here is {machine.version}; {again}"
            )
        if machine.compute_capability != self.compute_capability:
            raise EngineMismatch(
                f"engines {folder} were built for SM{self.compute_capability}, here is {machine.gpu}"
                f" (SM{machine.compute_capability}); {again}"
            )
        # The full TensorRT chooses kernels by timing them on the very GPU; tensorrt-rtx finishes them on the target.
        if self.flavour == "tensorrt" and self.gpu is not None and self.gpu != machine.gpu:
            raise EngineMismatch(f"engines {folder} were built on {self.gpu}, here is {machine.gpu}; {again}")


def find_engines(bundle: Path) -> list[Path]:
    """Return the folders of engines a bundle holds, by name; without those still being built."""
    folder = bundle / ENGINES
    if not folder.is_dir():
        return []
    return sorted(f for f in folder.iterdir() if not f.name.startswith(".") and (f / BUILD_FILE).is_file())


def read_records(bundle: Path) -> list[tuple[Path, EngineRecord]]:
    """Return every folder of engines with its record.

    Raises:
        EngineError: a damaged record.
    """
    return [(folder, EngineRecord.read(folder)) for folder in find_engines(bundle)]
