"""Read and write the JSON records of a bundle: its manifest, and the `build.json` of its engines.

Both begin with `format` and `format_version`, and follow one rule. A reader ignores keys that it does not know, so a
writer may add some; it accepts every version up to its own, and refuses a newer one. A change that would mislead an
older reader takes a new version, and a step in `Record.migrations` that turns the older content into the newer.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

import msgspec
from msgspec import Meta

from glip_deploy.errors import GlipError, reason_of
from glip_deploy.files import write_atomically

__all__ = ["Fraction", "Positive", "Record", "Sha256"]

Fraction = Annotated[float, Meta(ge=0, le=1)]
Positive = Annotated[int, Meta(ge=1)]
Sha256 = Annotated[str, Meta(pattern="^[0-9a-f]{64}$", description="SHA-256 in hexadecimal.")]


class Record(msgspec.Struct, frozen=True, kw_only=True, tag_field="format"):
    """A JSON file with a format name (the tag of a subclass) and a version."""

    newest: ClassVar[int]
    """The version that is written, and the highest that can be read."""
    migrations: ClassVar[tuple[Callable[[dict[str, Any]], dict[str, Any]], ...]] = ()
    """Entry i turns the content of version i + 1 into that of version i + 2."""
    error: ClassVar[type[GlipError]]
    """What `read_file` raises."""

    format_version: Positive

    @classmethod
    def read_file(cls, file: Path, remedy: str) -> Self:
        """Read a record.

        Args:
            file: the JSON file.
            remedy: what to do about a damaged one, the end of the message.

        Raises:
            GlipError: `cls.error` for a file that cannot be read, is damaged, of another format or of a newer version.
        """
        try:
            return cls.parse(file.read_bytes(), file, remedy)
        except OSError as error:
            raise cls.error(f"{file} cannot be read ({reason_of(error)}); {remedy}") from None

    @classmethod
    def parse(cls, data: bytes, file: Path, remedy: str) -> Self:
        """Read a record from the bytes of `file`; see `read_file`."""
        name = cls.__struct_config__.tag
        try:
            content = msgspec.json.decode(data)
            found = content.get("format") if isinstance(content, dict) else None
            if found != name:
                raise ValueError(f'"format" is {found!r}, not "{name}"')
            version = content.get("format_version")
            if type(version) is not int or version < 1:
                raise ValueError(f"format_version is {version!r}")
            if version > cls.newest:
                raise cls.error(
                    f"{file} has format {version}, this glip-deploy reads up to {cls.newest};"
                    " upgrade with pip install -U glip-deploy"
                )
            for migrate in cls.migrations[version - 1 :]:
                content = migrate(content)
            return msgspec.convert(content, cls)
        except (ValueError, RecursionError) as error:  # msgspec's own are ValueErrors
            raise cls.error(f"{file} is damaged ({reason_of(error)}); {remedy}") from None

    def write_file(self, file: Path) -> None:
        """Write the record as indented JSON, whole or not at all.

        Raises:
            OSError: it cannot be written.
        """
        write_atomically(file, msgspec.json.format(msgspec.json.encode(self), indent=1) + b"\n")
