"""The one exception a user of this toolkit has to know.

A message is a single line that says what was wrong (with the value), what is legal, and what to do next.
Command-line programs print it without a traceback and exit with status 1.
"""

from __future__ import annotations

__all__ = ["GlipError"]


class GlipError(Exception):
    """Something the user can put right: a bad file, prompt, picture, option or machine."""
