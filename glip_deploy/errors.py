"""The exceptions of this toolkit, one class for each thing a caller can do about them.

    GlipError                      catch this to catch all of them
      OptionError                  pass another value
      PromptError                  change the prompt
      FrameError                   skip or convert this picture
      SourceError                  name another source
        SourceLost                 a live source went away: open it again
      OutputError                  free space, or write elsewhere
      BundleError                  copy the bundle again, or export it again
      CheckpointError              use another checkpoint file
      ParityError                  an export differs from torch: report it, the bundle was not delivered
      EngineError                  an engine cannot be built, loaded or run
        EngineMismatch             it was built for something else: run the command in the message
      MissingPackage               install what the message names
      BackendError                 the inference library failed or is too old
      ClosedError                  open the detector again

A message is a single line that says what was wrong (with the value), what is legal, and what to do next.
Command-line programs print it without a traceback and exit with status 1.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterable
from itertools import islice

__all__ = [
    "BackendError",
    "BundleError",
    "CheckpointError",
    "ClosedError",
    "EngineError",
    "EngineMismatch",
    "FrameError",
    "GlipError",
    "MissingPackage",
    "OptionError",
    "OutputError",
    "ParityError",
    "PromptError",
    "SourceError",
    "SourceLost",
    "listed",
    "reason_of",
    "shown",
]


class GlipError(Exception):
    """Something the caller can put right: a bad file, prompt, picture, option or machine."""


class OptionError(GlipError):
    """An argument or option is outside its legal range; the message names the range."""


class PromptError(GlipError):
    """A prompt or its file cannot be used (empty, malformed, too long), or a threshold names a class that it lacks."""


class FrameError(GlipError):
    """A picture cannot be used: not decodable, of an illegal shape or dtype, or too large."""


class SourceError(GlipError):
    """A source of frames does not exist, cannot be opened or gives nothing."""


class SourceLost(SourceError):
    """A live source that had worked went away or fell silent; opening it again may help."""


class OutputError(GlipError):
    """A file or folder cannot be written; what was there before is untouched unless the message says otherwise."""


class BundleError(GlipError):
    """A bundle is missing, damaged, of a newer format, or not a bundle at all."""


class CheckpointError(GlipError):
    """A checkpoint file is missing, damaged, not a GLIP, or of another variant than was asked for."""


class ParityError(GlipError):
    """An exported graph differs from torch by more than is allowed; nothing was delivered."""


class EngineError(GlipError):
    """An engine cannot be built, loaded or run."""


class EngineMismatch(EngineError):
    """An engine was built for another GPU, library, bundle or shape; the message has the command that rebuilds it."""


class MissingPackage(GlipError):
    """An optional package is not installed; the message has the command that installs it."""


class BackendError(GlipError):
    """The inference library is too old, cannot load a graph, or failed while it ran."""


class ClosedError(GlipError):
    """A detector was used after it was closed."""


def reason_of(error: BaseException) -> str:
    """Return why something failed, as a single line of at most 200 characters to put into a message."""
    text = getattr(error, "strerror", None) or str(error)
    return " ".join(str(text).split())[:200] or type(error).__name__


def shown(value: object, limit: int = 60) -> str:
    """Return a value as `repr` writes it, shortened to about `limit` characters to put into a message."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = limit
    try:
        if isinstance(value, str):
            return repr(value if len(value) <= limit else f"{value[: limit - 3]}...")
        return short.repr(value)
    except Exception:  # an int of too many digits, or whatever the value's own class raises
        return f"a {type(value).__name__}"


def listed(names: Iterable[str], count: int = 10, limit: int = 60) -> str:
    """Return the first `count` names with commas between them, each at most `limit` long, to put into a message."""
    first = list(islice(names, count + 1))
    texts = [name if len(name) <= limit else f"{name[: limit - 3]}..." for name in first[:count]]
    return ", ".join(texts + (["..."] if len(first) > count else []))
