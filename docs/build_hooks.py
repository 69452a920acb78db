"""Two additions to the site's Markdown, so that nothing is written down twice.

    <!-- include: engines/precision.md -->    the text of a file of the repository; its relative links are kept right
    <!-- help: glip-detect -->                what the command prints for --help

An include is a whole page's content, so its first heading is the page's title.
"""

from __future__ import annotations

import os
import posixpath
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
_INCLUDE = re.compile(r"^<!-- include: (\S+) -->$", re.MULTILINE)
_HELP = re.compile(r"^<!-- help: (\S+)((?: \S+)*) -->$", re.MULTILINE)
_LINK = re.compile(r"(?<!!)\[([^\]]+)\]\((?!\w+:|#)([^)#\s]+)(#[^)\s]*)?\)")
_RUN = "import sys; from {module} import {function}; sys.argv[0] = {name!r}; sys.exit({function}())"


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Replace the two comments of this module's description in a page."""
    markdown = _INCLUDE.sub(lambda found: _included(found[1], page.file.src_uri), markdown)
    return _HELP.sub(lambda found: f"```text\n{help_of(found[1], *found[2].split())}\n```", markdown)


def _included(path: str, page: str) -> str:
    """Return a file's text for a page, with links to what is no page written as paths."""
    pages = {source: f"docs/{at}" for at in _pages() for source in _INCLUDE.findall((ROOT / "docs" / at).read_text())}
    folder = posixpath.dirname(path)

    def link(found: re.Match[str]) -> str:
        text, target = found[1], posixpath.normpath(posixpath.join(folder, found[2]))
        target = pages.get(target, target)
        if target.startswith("docs/"):
            return f"[{text}]({posixpath.relpath(target, posixpath.dirname(f'docs/{page}'))}{found[3] or ''})"
        return f"`{target}`" if text.strip("`") in target else f"{text} (`{target}`)"

    return _LINK.sub(link, (ROOT / path).read_text(encoding="utf-8"))


def _pages() -> list[str]:
    return [file.relative_to(ROOT / "docs").as_posix() for file in sorted((ROOT / "docs").rglob("*.md"))]


def help_of(command: str, *words: str, columns: int = 100) -> str:
    """Return what a command of this project prints for --help.

    Raises:
        CalledProcessError: it has no such subcommand.
    """
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
    module, function = scripts[command].split(":")
    environment = {**os.environ, "COLUMNS": str(columns), "TERM": "dumb", "NO_COLOR": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(str(ROOT / room) for room in (".", "export", "engines", "benchmarks"))
    done = subprocess.run(
        [sys.executable, "-c", _RUN.format(module=module, function=function, name=command), *words, "--help"],
        capture_output=True, text=True, check=True, env=environment,
    )  # fmt: skip
    return done.stdout.strip()
