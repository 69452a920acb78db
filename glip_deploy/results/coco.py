"""COCO annotation files: the ids of categories and pictures."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from glip_deploy.errors import GlipError

if TYPE_CHECKING:
    pass

__all__ = ["read_coco_names"]


def read_coco_names(path: str | os.PathLike[str]) -> tuple[dict[str, int], dict[str, int]]:
    """Read what a COCO file calls things: an annotation file, or a bare list of categories.

    Returns:
        Class name -> category_id, and file name -> image_id (empty if the file lists no images).

    Raises:
        GlipError: it cannot be read, is not JSON, or holds no categories.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise GlipError(f"COCO file {path} cannot be read ({reason}); give an annotation file in JSON") from error
    categories = data.get("categories") if isinstance(data, dict) else data
    images = data.get("images", []) if isinstance(data, dict) else []
    try:
        names = {str(entry["name"]): int(entry["id"]) for entry in categories or ()}
        numbers = {Path(str(entry["file_name"])).name: int(entry["id"]) for entry in images}
    except (TypeError, KeyError, ValueError):
        names, numbers = {}, {}
    if not names:
        raise GlipError(f'COCO file {path} holds no "categories" with "id" and "name"; give an annotation file')
    return names, numbers
