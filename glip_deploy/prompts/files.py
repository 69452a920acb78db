"""Prompts kept in files: a class a line, or JSON."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glip_deploy.errors import PromptError, listed, shown
from glip_deploy.prompts.syntax import Caption, ClassName, PromptText

if TYPE_CHECKING:
    import os

__all__ = ["read_prompt_file"]

# Room for thousands of class names; a prompt ends at 256 tokens, so anything larger is another kind of file.
_MAX_BYTES = 1_000_000


def read_prompt_file(path: str | os.PathLike[str]) -> PromptText:
    """Read a prompt from a UTF-8 file, ready for `parse_prompt`.

    * `.json`: a list of class names or of `{"name", "prefix", "suffix"}` objects (mixed as you like), or one
      `{"caption", "spans", "phrases"}` object as in `Caption`, where phrases may be left out, or a string.
    * anything else: a class per line. Empty lines and lines that begin with # are skipped. A single line with
      a dot or a bracket in it is a caption, not a class: "person. dog", "a man with a [green hat]".

    Raises:
        PromptError: missing, empty, not UTF-8, not JSON of these forms, or above a megabyte.
    """
    file = Path(path)
    text = _read(file)
    if file.suffix.lower() == ".json":
        return _from_json(text, file)
    lines = [line.strip() for line in text.splitlines()]
    lines = [line for line in lines if line and not line.startswith("#")]
    if not lines:
        raise _empty(file)
    if len(lines) == 1 and re.search(r"\[|\.(\s|$)", lines[0]):
        return lines[0]
    return lines


def _read(file: Path) -> str:
    try:
        size = file.stat().st_size
        if size > _MAX_BYTES:
            raise PromptError(f"prompt file {file} has {size} bytes, more than {_MAX_BYTES}; is it the right file?")
        text = file.read_bytes().decode("utf-8-sig")
    except FileNotFoundError as error:
        raise PromptError(f"prompt file {file} does not exist; give a .txt or .json file") from error
    except OSError as error:
        raise PromptError(f"prompt file {file} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise PromptError(f"prompt file {file} is not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    if not text.strip():
        raise _empty(file)
    return text


def _from_json(text: str, file: Path) -> PromptText:
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise PromptError(f"prompt file {file} is not JSON: {error}; a list of names is the simplest") from error
    if isinstance(data, str):
        return data
    if isinstance(data, dict):
        _check_keys(data, {"caption"}, {"spans", "phrases"}, f"prompt file {file}")
        if "spans" not in data and "phrases" not in data and isinstance(data["caption"], str):
            return data["caption"]
        return Caption(data["caption"], data.get("spans", ()), data.get("phrases"))
    if not isinstance(data, list):
        raise PromptError(
            f"prompt file {file} holds a JSON {type(data).__name__}; a list of names, an object with"
            ' "caption" and "spans", or a string is needed'
        )
    if not data:
        raise _empty(file)
    return [_class_name(entry, f"class {index} of prompt file {file}") for index, entry in enumerate(data)]


def _class_name(entry: Any, what: str) -> str | ClassName:
    if isinstance(entry, str):
        return entry
    if not isinstance(entry, dict):
        raise PromptError(f'{what} is {shown(entry)}; a name, or an object with "name", "prefix", "suffix" is needed')
    _check_keys(entry, {"name"}, {"prefix", "suffix"}, what)
    for key, value in entry.items():
        if not isinstance(value, str):
            raise PromptError(f'"{key}" of {what} is {shown(value)}; a string is needed')
    return ClassName(**entry)


def _check_keys(data: dict[str, Any], needed: set[str], optional: set[str], what: str) -> None:
    missing, extra = sorted(needed - set(data)), sorted(set(data) - needed - optional)
    if missing or extra:
        problem = f'lacks "{missing[0]}"' if missing else f'has "{listed(extra[:1])}", which means nothing here'
        legal = ", ".join(f'"{key}"' for key in sorted(needed) + sorted(optional))
        raise PromptError(f"{what} {problem}; legal keys are {legal}")


def _empty(file: Path) -> PromptError:
    return PromptError(f"prompt file {file} is empty; write one class name per line")
