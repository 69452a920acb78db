"""COCO: results in its format, and the ids of classes and pictures.

Format: https://cocodataset.org/#format-results.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glip_deploy.errors import OptionError, PromptError
from glip_deploy.prompts.syntax import fold

if TYPE_CHECKING:
    from glip_deploy.results.detections import Detections

__all__ = ["CocoIds", "coco_results", "read_coco_names"]


class CocoIds:
    """The COCO ids of classes and pictures.

    Args:
        categories: class name -> category_id, compared without letter case, spaces and underscores; None numbers the
            classes by their place in the prompt, from 1.
        image_ids: file name -> image_id.
    """

    def __init__(self, categories: Mapping[str, int] | None = None, image_ids: Mapping[str, int] | None = None) -> None:
        self._categories = None if categories is None else {fold(name): number for name, number in categories.items()}
        self._image_ids = dict(image_ids or {})

    def category_of(self, phrase: str) -> int:
        """Return the category_id of a class by its name.

        Raises:
            PromptError: there is no category of that name.
        """
        categories = self._categories or {}
        try:
            return categories[fold(phrase)]
        except KeyError:
            some = ", ".join(list(categories)[:8])
            raise PromptError(
                f'class "{phrase}" is not among the {len(categories)} COCO categories ({some}, ...);'
                " use their names in the prompt, or leave the categories out"
            ) from None

    def check(self, phrases: Sequence[str]) -> None:
        """Check that every class of a prompt has a category.

        Raises:
            PromptError: one has none.
        """
        if self._categories is not None:
            for phrase in phrases:
                self.category_of(phrase)

    def image_ids(self, pictures: Sequence[tuple[str, int]]) -> list[int]:
        """Return the image_id of each picture.

        The image_id of a picture is the first of these that there is: the id of its file name among `image_ids`; the
        number of which its name consists, as in 000000000139.jpg, if all pictures have such a name and no two the same
        number; its index.

        Args:
            pictures: source file and index of each.
        """
        stems = [Path(source).stem for source, _ in pictures]
        numbers = [int(stem) for stem in stems if stem.isdecimal()]
        numbered = len(set(numbers)) == len(pictures)
        return [
            self._image_ids.get(Path(source).name, numbers[place] if numbered else index)
            for place, (source, index) in enumerate(pictures)
        ]

    def results(self, pictures: Sequence[tuple[str, int, Detections]]) -> list[dict[str, Any]]:
        """Return the COCO results of pictures; `image_ids` says which id a picture has.

        Args:
            pictures: source file, index and detections of each.

        Raises:
            PromptError: a class that has no category.
        """
        ids = self.image_ids([(source, index) for source, index, _ in pictures])
        return [
            entry
            for image_id, (_, _, found) in zip(ids, pictures, strict=True)
            for entry in self.result(image_id, found)
        ]

    def result(self, image_id: int, detections: Detections) -> list[dict[str, Any]]:
        """Return the COCO results of one picture.

        Raises:
            PromptError: a class that has no category.
        """
        return coco_results(detections, image_id, self._category_ids(detections))

    def _category_ids(self, detections: Detections) -> list[int] | None:
        if self._categories is None:
            return None
        ids = [0] * (1 + max(detections.labels.tolist(), default=-1))
        for label, phrase in zip(detections.labels.tolist(), detections.phrases, strict=True):
            ids[label] = self.category_of(phrase)
        return ids


def coco_results(
    detections: Detections, image_id: int | str, category_ids: Sequence[int] | None = None
) -> list[dict[str, Any]]:
    """Return `{"image_id", "category_id", "bbox": [x, y, w, h], "score"}` per box; see `Detections.to_coco`."""
    if category_ids is not None and len(detections) and detections.labels.max() >= len(category_ids):
        raise OptionError(
            f"{len(category_ids)} category ids, but class {detections.labels.max()} was found;"
            " give one id per class of the prompt"
        )
    results = []
    for one in detections:
        x1, y1, x2, y2 = one.box
        results.append(
            {
                "image_id": image_id,
                "category_id": one.label + 1 if category_ids is None else int(category_ids[one.label]),
                "bbox": [x1, y1, x2 - x1 + 1, y2 - y1 + 1],
                "score": one.score,
                **({} if one.track is None else {"track_id": one.track}),
            }
        )
    return results


def read_coco_names(path: str | os.PathLike[str]) -> tuple[dict[str, int], dict[str, int]]:
    """Read the names and ids in a COCO annotation file, or in a bare list of categories.

    Returns:
        Class name -> category_id, and file name -> image_id (empty if the file lists no images).

    Raises:
        OptionError: the file cannot be read, is not JSON, or holds no categories.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise OptionError(f"COCO file {path} cannot be read ({reason}); give an annotation file in JSON") from error
    categories = data.get("categories") if isinstance(data, dict) else data
    images = data.get("images", []) if isinstance(data, dict) else []
    try:
        names = {str(entry["name"]): int(entry["id"]) for entry in categories or ()}
        numbers = {Path(str(entry["file_name"])).name: int(entry["id"]) for entry in images}
    except (TypeError, KeyError, ValueError, OverflowError):
        names, numbers = {}, {}
    if not names:
        raise OptionError(f'COCO file {path} holds no "categories" with "id" and "name"; give an annotation file')
    return names, numbers
