"""Models without values, which are then given those of a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

__all__ = ["blank"]


class _NoInitialization(TorchFunctionMode):
    """Passes over the functions of `torch.nn.init`."""

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if getattr(function, "__module__", None) == torch.nn.init.__name__:
            return args[0] if args else (kwargs or {})["tensor"]
        return function(*args, **(kwargs or {}))


@contextmanager
def blank() -> Iterator[None]:
    """Make modules on the meta device, with shapes and types only.

    Nothing is initialized: `torch.nn.init` draws numbers for tensors of that device, too, and imports torch's compiler
    for it, which takes two seconds.
    """
    with torch.device("meta"), _NoInitialization():
        yield
