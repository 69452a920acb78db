"""A small stand-in for `triton_python_backend_utils`, which exists only inside Triton's Python backend."""

from __future__ import annotations

import json
import types
from typing import Any

import numpy as np

__all__ = ["Request", "Tensor", "as_module"]


class Tensor:
    """A named array, of the dtypes that Triton has."""

    def __init__(self, name: str, array: Any) -> None:
        assert isinstance(array, np.ndarray)
        if array.dtype == np.object_:
            assert all(isinstance(value, bytes) for value in array.reshape(-1))
        self._name, self._array = name, array

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> Any:
        return self._array


class TritonError:
    """An error of one request."""

    INTERNAL, INVALID_ARG, CANCELLED = "internal", "invalid", "canceled"

    def __init__(self, message: str, code: str = INTERNAL) -> None:
        self.text, self.kind = message, code


class InferenceResponse:
    """Outputs, or an error."""

    def __init__(self, output_tensors: list[Tensor] | None = None, error: TritonError | None = None) -> None:
        assert (output_tensors is None) != (error is None)
        self.tensors = output_tensors or []
        self.error = error

    def arrays(self) -> dict[str, Any]:
        assert self.error is None, self.error.text
        return {tensor.name(): tensor.as_numpy() for tensor in self.tensors}


class TritonModelException(Exception):
    """What a model raises that cannot be loaded."""


class Request:
    """A request of pictures, each with a prompt."""

    def __init__(
        self,
        images: list[bytes],
        prompts: list[str | bytes],
        thresholds: Any = None,
        *,
        wanted: tuple[str, ...] = (),
        canceled: bool = False,
    ) -> None:
        texts = [text.encode() if isinstance(text, str) else text for text in prompts]
        self._tensors = {
            "IMAGE": Tensor("IMAGE", np.array(images, np.object_).reshape(-1, 1)),
            "PROMPT": Tensor("PROMPT", np.array(texts, np.object_).reshape(-1, 1)),
        }
        if thresholds is not None:
            self._tensors["THRESHOLD"] = Tensor("THRESHOLD", np.asarray(thresholds, np.float32))
        self._wanted = wanted
        self._canceled = canceled

    def tensor(self, name: str) -> Tensor | None:
        return self._tensors.get(name)

    def requested_output_names(self) -> list[str]:
        return list(self._wanted)

    def is_cancelled(self) -> bool:
        return self._canceled


def as_module() -> types.ModuleType:
    """Return it as the module that model.py imports; `logged` in it holds what went to Triton's log."""
    logged: list[str] = []
    module: Any = types.ModuleType("triton_python_backend_utils")
    module.Tensor, module.TritonError, module.InferenceResponse = Tensor, TritonError, InferenceResponse
    module.TritonModelException = TritonModelException
    module.get_input_tensor_by_name = lambda request, name: request.tensor(name)
    module.Logger = types.SimpleNamespace(log_warn=logged.append, log_error=logged.append)
    module.logged = logged
    return module  # type: ignore[no-any-return]


def arguments(parameters: dict[str, str] | None = None, *, batch: int = 8) -> dict[str, str]:
    """Return what Triton gives `initialize`."""
    config = {
        "max_batch_size": batch,
        "parameters": {name: {"string_value": text} for name, text in (parameters or {}).items()},
    }
    return {"model_config": json.dumps(config), "model_instance_kind": "CPU", "model_instance_device_id": "0"}
