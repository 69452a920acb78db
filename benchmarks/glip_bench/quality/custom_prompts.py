"""Prompts in place of the names of a set's classes, as the official configurations of ODinW have them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from glip_deploy.errors import MissingPackage, OptionError
from glip_deploy.prompts.syntax import ClassName

__all__ = ["read_custom_prompts"]

FORM = 'class names with what to ask for, as in `pothole: {prefix: "some ", name: holes, suffix: " on the road"}`'


def read_custom_prompts(file: Path, categories: Sequence[tuple[int, str]]) -> dict[str, str | ClassName]:
    """Read a YAML file of prompts.

    Either of two forms:

    * a mapping from class names of the set to what is asked for in their place: a text, or `prefix`, `name` and
      `suffix`, each of which may be left out. Classes that it does not mention are asked for by their names.
    * a task configuration of the official code (`configs/odinw_35/*.yaml`): `DATASETS.OVERRIDE_CATEGORY`, other names
      by category id, and `DATASETS.CAPTION_PROMPT`, prefix, name and suffix of every category in the order of their
      ids; each a list, or a string that holds one. The second counts where both are there. All else is passed over.

    Args:
        file: the YAML file.
        categories: (id, name) of the set.

    Returns:
        What to ask for, by class name of the set; all of them.

    Raises:
        OptionError: not readable, not YAML of these forms, a class or id that the set does not have.
        MissingPackage: PyYAML is not installed.
    """
    try:
        import yaml
    except ImportError:
        raise MissingPackage("--prompts needs PyYAML; pip install 'glip-deploy[bench]'") from None

    def parsed(text: str) -> Any:
        try:
            return yaml.safe_load(text)
        except (yaml.YAMLError, RecursionError):
            raise OptionError(f"--prompts {file} is not YAML; write {FORM}") from None

    try:
        content = parsed(file.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise OptionError(f"--prompts {file} cannot be read ({error.strerror or error}); name a YAML file") from None
    except UnicodeDecodeError:
        raise OptionError(f"--prompts {file} is not UTF-8 text; name a YAML file") from None
    if not isinstance(content, Mapping):
        raise OptionError(f"--prompts {file} holds a {type(content).__name__}; write {FORM}")
    prompts: dict[str, str | ClassName] = {name: name for _, name in categories}
    official = content.get("DATASETS")
    if isinstance(official, Mapping) and "DATASETS" not in prompts:
        lists = {}
        for key in ("OVERRIDE_CATEGORY", "CAPTION_PROMPT"):
            value = official.get(key) or []
            lists[key] = parsed(value) if isinstance(value, str) else value
            if not isinstance(lists[key], list):
                raise OptionError(f"--prompts {file}: {key} is a {type(lists[key]).__name__}; a list is needed")
        if not any(lists.values()):
            raise OptionError(f"--prompts {file} has neither CAPTION_PROMPT nor OVERRIDE_CATEGORY; leave it out")
        _override(prompts, lists["OVERRIDE_CATEGORY"], dict(categories), file)
        _describe(prompts, lists["CAPTION_PROMPT"], categories, file)
        return prompts
    for name, wanted in content.items():
        if name not in prompts:
            known = ", ".join(list(prompts)[:5])
            raise OptionError(f"--prompts {file} names the class {name!r}, which the set does not have; it has {known}")
        prompts[name] = _wanted(wanted, name, f"class {name!r} of --prompts {file}")
    return prompts


def _override(prompts: dict[str, str | ClassName], rows: list[Any], names: Mapping[int, str], file: Path) -> None:
    for row in rows:
        if not isinstance(row, Mapping) or not isinstance(row.get("name"), str) or "id" not in row:
            raise OptionError(f"--prompts {file}: OVERRIDE_CATEGORY has {row!r}; an id and a name are needed")
        if row["id"] not in names:
            raise OptionError(
                f"--prompts {file} names the category {row['id']!r}, which the set does not have;"
                f" it has {', '.join(map(str, list(names)[:5]))}"
            )
        prompts[names[row["id"]]] = row["name"]


def _describe(
    prompts: dict[str, str | ClassName], rows: list[Any], categories: Sequence[tuple[int, str]], file: Path
) -> None:
    if rows and len(rows) != len(categories):
        raise OptionError(
            f"--prompts {file}: CAPTION_PROMPT has {len(rows)} entries for the {len(categories)} categories of the set;"
            " one of each is needed"
        )
    for (_, name), row in zip(sorted(categories), rows, strict=False):
        prompts[name] = _wanted(row, name, f"CAPTION_PROMPT of {name!r} in --prompts {file}")


def _wanted(value: Any, name: str, what: str) -> str | ClassName:
    if isinstance(value, str):
        return value
    if not isinstance(value, Mapping) or not set(value) <= {"prefix", "name", "suffix"}:
        raise OptionError(f"{what} is {value!r}; a text, or prefix, name and suffix are needed")
    parts = {"name": name, **value}
    if not all(isinstance(part, str) for part in parts.values()):
        raise OptionError(f"{what} is {value!r}; prefix, name and suffix are texts, put them in quotes")
    return ClassName(**parts)
