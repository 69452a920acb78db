"""JSON Schemas of a bundle's two records, for programs in other languages.

    python -m glip_deploy.bundle.schema manifest     of manifest.json
    python -m glip_deploy.bundle.schema engines      of the build.json of a folder of engines

The repository keeps what they print in docs/schema. They are made from the classes that read the files, so they accept
what this version reads, of the format's newest version. Unknown keys are legal, as readers ignore them.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import msgspec

from glip_deploy.bundle.engines import EngineRecord
from glip_deploy.bundle.manifest import Manifest
from glip_deploy.bundle.records import Record

__all__ = ["RECORDS", "json_schema"]

RECORDS: dict[str, type[Record]] = {"manifest": Manifest, "engines": EngineRecord}
"""The records by the name that the command takes."""


def json_schema(record: type[Record]) -> dict[str, Any]:
    """Return the schema (JSON Schema 2020-12) of a record's newest version."""
    schema = msgspec.json.schema(record)
    schema["$defs"][record.__name__]["properties"]["format_version"] = {"const": record.newest}
    title = f"{record.__struct_config__.tag}, format version {record.newest}"
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": title, **schema}


def main(arguments: list[str]) -> int:
    """Print the schema that the only argument names; return the exit status."""
    if len(arguments) != 1 or arguments[0] not in RECORDS:
        sys.stderr.write(f"usage: python -m glip_deploy.bundle.schema {'|'.join(RECORDS)}\n")
        return 2
    sys.stdout.write(json.dumps(json_schema(RECORDS[arguments[0]]), indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
