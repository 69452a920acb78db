"""What a folder of engines says of itself, `build.json`, and whether its engines may run here.

    glip_t/engines/sm80-tensorrt-rtx-1.7.1.116-fp16-native/
      text.plan, image.plan
      libglip_deform.so  the plugin, if they need it
      build.json        what they were built from, by what, for what, and how to build them again

A TensorRT engine belongs to one GPU type, one TensorRT version and one bundle. Loaded elsewhere it fails late or,
worse, runs with the wrong weights; `EngineRecord.check` says so first, without importing TensorRT.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from glip_deploy.bundle.manifest import MANIFEST, Bundle
from glip_deploy.errors import GlipError
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
    """tensorrt or tensorrt-rtx."""
    version: str
    """Of the flavour, as its `__version__` says."""
    gpu: str
    """Name as the driver gives it."""
    compute_capability: int
    """Major and minor as one number: 80 for 8.0."""


@dataclass(frozen=True)
class TensorRecord:
    """An input or output as the network has it; -1 is an axis the profiles bound."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class PluginRecord:
    """The library an engine cannot be loaded without; it lies beside the engines."""

    file: str
    sha256: str


@dataclass(frozen=True)
class EngineFile:
    """One engine."""

    sha256: str
    size: int
    """Bytes."""
    seconds: float
    """The build took."""
    inputs: tuple[TensorRecord, ...]
    outputs: tuple[TensorRecord, ...]
    profiles: tuple[Mapping[str, tuple[tuple[int, ...], ...]], ...]
    """By optimisation profile and input: smallest, best and largest shape."""


@dataclass(frozen=True)
class EngineRecord:
    """A `build.json`. Use `EngineRecord.read`."""

    flavour: str
    version: str
    compute_capability: int
    gpu: str | None
    """Name of the GPU it was built on; None where there was none (tensorrt-rtx builds without)."""
    precision: str
    form: str
    """Of the deformable convolution: native or plugin."""
    plugin: PluginRecord | None
    manifest_sha256: str
    """Of the bundle's manifest, which holds the hash of everything else."""
    options: str
    """What to give glip-build after the bundle to build the same again; without flavour and target."""
    engines: Mapping[str, EngineFile]
    """By file name: text.plan, image.plan."""

    @classmethod
    def read(cls, folder: Path) -> EngineRecord:
        """Read a folder's record.

        Raises:
            GlipError: no record, a damaged one, or a newer format.
        """
        file = folder / BUILD_FILE
        if not file.is_file():
            raise GlipError(f"{folder} holds no engines (it has no {BUILD_FILE}); build them with glip-build BUNDLE")
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            if content.get("format") != RECORD_FORMAT:
                raise ValueError(f'"format" is not "{RECORD_FORMAT}"')
            version = content["format_version"]
            if isinstance(version, int) and version > RECORD_VERSION:
                raise GlipError(
                    f"{file} has format {version}, this glip-deploy reads up to {RECORD_VERSION};"
                    " upgrade with pip install -U glip-deploy"
                )
            return cls._from_dict(content)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise GlipError(
                f"{file} is damaged ({type(error).__name__}: {error}); delete {folder} and build again with glip-build"
            ) from None

    @classmethod
    def _from_dict(cls, content: Mapping[str, Any]) -> EngineRecord:
        def tensors(rows: list[dict[str, Any]]) -> tuple[TensorRecord, ...]:
            return tuple(TensorRecord(str(r["name"]), str(r["dtype"]), tuple(map(int, r["shape"]))) for r in rows)

        def profile(row: dict[str, Any]) -> dict[str, tuple[tuple[int, ...], ...]]:
            return {name: tuple(tuple(map(int, shape)) for shape in shapes) for name, shapes in row.items()}

        engines = {
            str(name): EngineFile(
                str(row["sha256"]),
                int(row["bytes"]),
                float(row["seconds"]),
                tensors(row["inputs"]),
                tensors(row["outputs"]),
                tuple(profile(p) for p in row["profiles"]),
            )
            for name, row in content["engines"].items()
        }
        plugin, gpu = content["plugin"], content["gpu"]
        return cls(
            flavour=str(content["flavour"]),
            version=str(content["version"]),
            compute_capability=int(content["compute_capability"]),
            gpu=None if gpu is None else str(gpu),
            precision=str(content["precision"]),
            form=str(content["form"]),
            plugin=None if plugin is None else PluginRecord(str(plugin["file"]), str(plugin["sha256"])),
            manifest_sha256=str(content["manifest_sha256"]),
            options=str(content["options"]),
            engines=engines,
        )

    def write(self, folder: Path) -> None:
        """Write `build.json` into a folder."""
        content = {"format": RECORD_FORMAT, "format_version": RECORD_VERSION, **asdict(self)}
        for row in content["engines"].values():
            row["bytes"] = row.pop("size")
        text = json.dumps(content, indent=1, allow_nan=False) + "\n"
        (folder / BUILD_FILE).write_text(text, encoding="utf-8")

    def check(self, folder: Path, bundle: Bundle, machine: Machine, *, verify: bool = True) -> None:
        """Raise unless these engines may run here.

        Args:
            folder: where the record was read.
            bundle: the bundle they are to serve.
            machine: what is here.
            verify: hash the engines and the plugin (about a second a gigabyte); without it the engines' sizes and the
                bundle's manifest are checked.

        Raises:
            GlipError: the first thing that differs, in one line that ends with the command that builds again.
        """
        words = ("glip-build", str(bundle.path), "--flavour", machine.flavour, self.options, "--overwrite")
        again = f"build again: {' '.join(word for word in words if word)}"
        self._check_machine(folder, machine, again)
        if sha256_of(bundle.path / MANIFEST) != self.manifest_sha256:
            raise GlipError(f"engines {folder} were built from another export than {bundle.path}; {again}")
        if self.plugin is not None:
            library = folder / self.plugin.file
            if Path(self.plugin.file).name != self.plugin.file or not library.is_file():
                raise GlipError(f"engines {folder} lack their plugin library {self.plugin.file}; {again}")
            if verify and sha256_of(library) != self.plugin.sha256:
                raise GlipError(f"plugin library {library} is not the one these engines were built with; {again}")
        for name, engine in self.engines.items():
            file = folder / name
            if Path(name).name != name or not file.is_file():
                raise GlipError(f"engines {folder} lack {name}; {again}")
            size = file.stat().st_size
            if size != engine.size or (verify and sha256_of(file) != engine.sha256):
                raise GlipError(f"{file} was changed or cut short after its build; {again}")

    def _check_machine(self, folder: Path, machine: Machine, again: str) -> None:
        if machine.flavour != self.flavour:
            raise GlipError(f"engines {folder} were built for {self.flavour}, here is {machine.flavour}; {again}")
        if machine.version != self.version:
            raise GlipError(
                f"engines {folder} were built by {self.flavour} {self.version}, here is {machine.version}; {again}"
            )
        if machine.compute_capability != self.compute_capability:
            raise GlipError(
                f"engines {folder} were built for SM{self.compute_capability}, here is {machine.gpu}"
                f" (SM{machine.compute_capability}); {again}"
            )
        # The full TensorRT chooses kernels by timing them on the very GPU; tensorrt-rtx finishes them on the target.
        if self.flavour == "tensorrt" and self.gpu is not None and self.gpu != machine.gpu:
            raise GlipError(f"engines {folder} were built on {self.gpu}, here is {machine.gpu}; {again}")


def find_engines(bundle: Path) -> list[Path]:
    """Return the folders of engines a bundle holds, by name; without those still being built."""
    folder = bundle / ENGINES
    if not folder.is_dir():
        return []
    return sorted(f for f in folder.iterdir() if not f.name.startswith(".") and (f / BUILD_FILE).is_file())


def read_records(bundle: Path) -> list[tuple[Path, EngineRecord]]:
    """Return every folder of engines with its record.

    Raises:
        GlipError: a damaged record.
    """
    return [(folder, EngineRecord.read(folder)) for folder in find_engines(bundle)]
