"""Result files: written whole or not at all; what cannot be read is refused in one line."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from glip_deploy.errors import OptionError
from glip_deploy.files import not_written, write_atomically

__all__ = ["SCHEMA", "read_result", "write_result"]

SCHEMA = 2


def write_result(path: Path, result: Mapping[str, Any]) -> None:
    """Write a result; whoever reads the file meanwhile sees the old one or the new one.

    Raises:
        OutputError: the disk is full, or the folder may not be written.
    """
    try:
        write_atomically(path, json.dumps(result, indent=1, allow_nan=False) + "\n")
    except OSError as error:
        raise not_written(path, error) from None


def read_result(path: Path) -> dict[str, Any]:
    """Read a detection result of this schema, or of the one before: that is brought into the form of this one.

    Raises:
        OptionError: not there, not readable, not JSON, of another kind, or of a newer schema.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise OptionError(
            f"result {path} cannot be read ({error.strerror or error}); give a file --json wrote"
        ) from None
    except (ValueError, RecursionError):
        raise OptionError(f"result {path} is not JSON; give a file that glip-bench --json wrote") from None
    if not isinstance(content, dict) or content.get("kind") != "detection":
        kind = content.get("kind") if isinstance(content, dict) else type(content).__name__
        raise OptionError(f'result {path} is of kind "{kind}"; a "detection" result of glip-bench --json is needed')
    schema = content.get("schema")
    if not isinstance(schema, int) or schema < 1 or schema > SCHEMA:
        raise OptionError(f"result {path} has schema {schema}, this glip-bench reads 1 to {SCHEMA}; measure again")
    try:
        result = _from_first(content) if schema == 1 else content
        _check(result)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        what = f"{error.args[0]} is missing" if isinstance(error, KeyError) else str(error)
        raise OptionError(f"result {path} is damaged ({what}); measure again") from None
    return result


def _check(result: Mapping[str, Any]) -> None:
    """Read what every reader relies on."""
    _ = result["machine"]["cpu"], result["model"]["variant"], result["model"]["fusion"], result["shape"]["frame"]
    for subject in result["subjects"].values():
        for timing in subject["pieces_ms"].values():
            _ = timing["median"] + timing["mean"] + timing["minimum"]


def _from_first(old: Mapping[str, Any]) -> dict[str, Any]:
    """Return a result of schema 1, which had one subject and no single samples, in the form of this one."""
    subject = old["subject"]
    stages = old["image_branch_stage_ms"]
    return {
        "schema": SCHEMA,
        "kind": "detection",
        "complete": True,
        "date": old["date"],
        "machine": old["machine"],
        "gpus": [],
        "versions": old["versions"],
        "model": {
            "variant": subject["variant"],
            "fusion": stages["fusion"] > 0,
            "precision": subject["precision"],
            "checkpoint_sha256": subject["checkpoint_sha256"],
        },
        "threads": subject["threads"],
        "shape": old["shape"],
        "absent": {},
        "subjects": {
            subject["backend"]: {
                "device": "cpu",
                "precision": subject["precision"],
                "tokens": old["shape"]["tokens"],
                "open_seconds": old["open_seconds"],
                "first_frame_seconds": old["first_frame_seconds"],
                "detections": old["detections"],
                "pieces_ms": old["frame_ms"],
                "stages_ms": stages,
                "peak_resident_bytes": old["peak_resident_bytes"],
                "peak_device_bytes": None,
            }
        },
        "prompt_ms": old["prompt_ms"],
        **({"resize": old["resize"]} if "resize" in old else {}),
    }
